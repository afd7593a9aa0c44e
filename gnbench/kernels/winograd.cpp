// Convolutions by 3 x 3, stride 1 and padding 1, of maps stored as (N, H, W, C), by Winograd's minimal filtering
// F(2 x 2, 3 x 3) (arXiv:1509.09308): 16 multiplications for 2 x 2 outputs of a channel, and not 36.
//
// A tile is 2 x 2 outputs y and the patch d of 4 x 4 inputs that they depend on. With g the weights, and summed over
// the input channels,
//   y = A' [(G g G') * (B' d B)] A,
// and of dy, the gradient of y, the patch of the input's gradient is made in the same way from weights that are turned
// by half a circle, while the weights' own gradient, summed over the tiles, is
//   dg = G' [(A dy A') * (B' d B)] G.
// Each product `*` is one of 4 x 4 numbers; at each of these 16 places the sums are a product of two matrices. So many
// tiles at a time as fit into the cache are transformed, multiplied and transformed back.
//
// Channels fall into lanes, groups of a grouped convolution, that are convolved by themselves.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

#include "vectors.h"

namespace {

constexpr int PLACES = 16;
constexpr int64_t TILES = 16;  // at a time: their patches and products fit into the cache
constexpr int64_t LINE = 64;   // bytes of a line of the cache

// Rows of a product that are summed up at a time; the sums and a row of the factor they share are kept in registers.
#if defined(__AVX512F__)
constexpr int ROWS = 8;
#else
constexpr int ROWS = 4;
#endif
static_assert(TILES % ROWS == 0 && WIDTH % ROWS == 0, "products have whole numbers of ROWS");

template <typename T>
Vec<T> load(const T* from) {
    return Plain<T>::load(from);
}

struct Shape {
    int64_t lanes, images, height, width, inputs, outputs;  // the last two: channels of a lane

    int64_t tiles_across() const { return (width + 1) / 2; }
    int64_t tiles_down() const { return (height + 1) / 2; }
    int64_t tiles() const { return images * tiles_down() * tiles_across(); }
};

// Tiles `first` to `first + count` of all, in pieces that lie in one row of a map: change(t, n, image, y, x) for the n
// from the t-th of them on, whose outputs begin at row y, column x.
template <typename Change>
void for_rows(const Shape& s, int64_t first, int64_t count, Change change) {
    for (int64_t t = 0, n; t < count; t += n) {
        const int64_t row = (first + t) / s.tiles_across(), x = (first + t) % s.tiles_across();
        n = std::min(count - t, s.tiles_across() - x);
        change(t, n, row / s.tiles_down(), 2 * (row % s.tiles_down()), 2 * x);
    }
}

// A map's channels of one lane.
template <typename T>
struct Map {
    T* first;
    int64_t height, width, channels, column, row;  // the last two: distances of neighbouring positions

    Map(T* all, const Shape& s, int64_t lane, int64_t channels)
        : first(all + lane * channels), height(s.height), width(s.width), channels(channels),
          column(s.lanes * channels), row(s.width * column) {}
    T* at(int64_t image, int64_t y, int64_t x) const { return first + (image * height + y) * row + x * column; }
};

// PLACES matrices of rows x columns. They begin at a line of the cache, each a line further from the last than it is
// long: at distances of a power of 2 they would push each other out of the cache.
template <typename T>
struct Matrices {
    static constexpr int64_t PER_LINE = LINE / sizeof(T);
    const int64_t rows, columns, distance;
    const std::unique_ptr<T[]> space;
    T* first;

    Matrices(int64_t rows, int64_t columns)
        : rows(rows), columns(columns), distance(rows * columns + PER_LINE),
          space(new T[PLACES * distance + PER_LINE]) {
        first = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(space.get()) + LINE - 1) / LINE * LINE);
    }
    void clear() const { std::fill(first, first + PLACES * distance, T(0)); }
    T* at(int place, int64_t row = 0, int64_t column = 0) const {
        return first + place * distance + row * columns + column;
    }
    void store(int place, int64_t row, int64_t column, Vec<T> v) const { Plain<T>::store(at(place, row, column), v); }
};

// B' d B of the patch of each tile: row t of the matrices. Beyond a map's edges are zeros.
template <typename T>
void transform_input(const Shape& s, const Map<const T>& map, int64_t first, int64_t count, const Matrices<T>& to) {
    for_rows(s, first, count, [&](int64_t t, int64_t n, int64_t image, int64_t y, int64_t x) {
        const T* const d = map.at(image, y - 1, x);  // of the first map's first row nothing is read there
        const bool above = y > 0, below = y + 1 < map.height, far_below = y + 2 < map.height;
        for (int64_t c = 0; c < map.channels; c += WIDTH) {
            // B' d of the column at `x + across`
            const auto column = [&](int64_t across, Vec<T>* m) {
                const T* const at = d + across * map.column + c;
                const bool inside = x + across >= 0 && x + across < map.width;
                const Vec<T> d0 = inside && above ? load(at) : Vec<T>{};
                const Vec<T> d1 = inside ? load(at + map.row) : Vec<T>{};
                const Vec<T> d2 = inside && below ? load(at + 2 * map.row) : Vec<T>{};
                const Vec<T> d3 = inside && far_below ? load(at + 3 * map.row) : Vec<T>{};
                m[0] = d0 - d2, m[1] = d1 + d2, m[2] = d2 - d1, m[3] = d1 - d3;
            };
            Vec<T> m[4][4];  // by columns, of which neighbouring tiles share two
            column(-1, m[0]);
            column(0, m[1]);
            for (int64_t k = 0; k < n; ++k) {
                column(2 * k + 1, m[2]);
                column(2 * k + 2, m[3]);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    to.store(4 * i, t + k, c, m[0][i] - m[2][i]);
                    to.store(4 * i + 1, t + k, c, m[1][i] + m[2][i]);
                    to.store(4 * i + 2, t + k, c, m[2][i] - m[1][i]);
                    to.store(4 * i + 3, t + k, c, m[1][i] - m[3][i]);
                    m[0][i] = m[2][i], m[1][i] = m[3][i];
                }
            }
        }
    });
}

// y = A' m A of row t of the matrices, for the outputs of each tile.
template <typename T>
void transform_output(const Shape& s, const Matrices<T>& from, int64_t first, int64_t count, const Map<T>& map) {
    for_rows(s, first, count, [&](int64_t t, int64_t n, int64_t image, int64_t y, int64_t x) {
        const bool below = y + 1 < map.height;
        for (int64_t k = 0; k < n; ++k) {
            T* const out = map.at(image, y, x + 2 * k);
            const bool right = x + 2 * k + 1 < map.width;
            for (int64_t c = 0; c < map.channels; c += WIDTH) {
                Vec<T> m[2][4];
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    const Vec<T> m0 = load(from.at(4 * i, t + k, c)), m1 = load(from.at(4 * i + 1, t + k, c));
                    const Vec<T> m2 = load(from.at(4 * i + 2, t + k, c)), m3 = load(from.at(4 * i + 3, t + k, c));
                    m[0][i] = m0 + m1 + m2, m[1][i] = m1 - m2 - m3;
                }
                const auto store = [&](T* to, const Vec<T>* m) {
                    Plain<T>::store(to + c, m[0] + m[1] + m[2]);
                    if (below) Plain<T>::store(to + map.row + c, m[1] - m[2] - m[3]);
                };
                store(out, m[0]);
                if (right) store(out + map.column, m[1]);
            }
        }
    });
}

// A dy A' of the outputs of each tile: row t of the matrices.
template <typename T>
void transform_gradient(const Shape& s, const Map<const T>& map, int64_t first, int64_t count, const Matrices<T>& to) {
    for_rows(s, first, count, [&](int64_t t, int64_t n, int64_t image, int64_t y, int64_t x) {
        const bool below = y + 1 < map.height;
        for (int64_t k = 0; k < n; ++k) {
            const T* const dy = map.at(image, y, x + 2 * k);
            const bool right = x + 2 * k + 1 < map.width;
            for (int64_t c = 0; c < map.channels; c += WIDTH) {
                Vec<T> m[2][4];
                for (int j = 0; j < 2; ++j) {
                    const T* const at = dy + j * map.column + c;
                    const Vec<T> d0 = j == 0 || right ? load(at) : Vec<T>{};
                    const Vec<T> d1 = below && (j == 0 || right) ? load(at + map.row) : Vec<T>{};
                    m[j][0] = d0, m[j][1] = d0 + d1, m[j][2] = d0 - d1, m[j][3] = -d1;
                }
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    to.store(4 * i, t + k, c, m[0][i]);
                    to.store(4 * i + 1, t + k, c, m[0][i] + m[1][i]);
                    to.store(4 * i + 2, t + k, c, m[0][i] - m[1][i]);
                    to.store(4 * i + 3, t + k, c, -m[1][i]);
                }
            }
        }
    });
}

// WIDTH x WIDTH numbers, a register a row.
template <typename T>
struct Block {
    Vec<T> rows[WIDTH];
};

// b0[k], b1[k], b0[k + 1], b1[k + 1], ... from FIRST on.
template <int FIRST, typename T, int... I>
Vec<T> interleave(Vec<T> b0, Vec<T> b1, std::integer_sequence<int, I...>) {
    return Vec<T>{(I % 2 ? b1[FIRST + I / 2] : b0[FIRST + I / 2])...};
}

// Each round interleaves the rows of the upper half with those of the lower: log2(WIDTH) of them make rows of columns.
template <typename T>
void transpose(Block<T>& block) {
    constexpr auto all = std::make_integer_sequence<int, WIDTH>();
#pragma GCC unroll 4
    for (int64_t round = 1; round < WIDTH; round *= 2) {
        const Block<T> last = block;
#pragma GCC unroll 8
        for (int64_t r = 0; r < WIDTH / 2; ++r) {
            block.rows[2 * r] = interleave<0, T>(last.rows[r], last.rows[r + WIDTH / 2], all);
            block.rows[2 * r + 1] = interleave<WIDTH / 2, T>(last.rows[r], last.rows[r + WIDTH / 2], all);
        }
    }
}

// change(o, i, at) for each WIDTH outputs from o and inputs from i on of weights (outputs, 3, 3, inputs): at(r, n)
// is where the WIDTH numbers of output o + r at the n-th of the 9 positions begin.
template <typename T, typename Change>
void for_blocks(int64_t inputs, int64_t outputs, T* weights, Change change) {
    for (int64_t o = 0; o < outputs; o += WIDTH)
        for (int64_t i = 0; i < inputs; i += WIDTH)
            change(o, i, [=](int64_t r, int n) { return weights + ((o + r) * 9 + n) * inputs + i; });
}

// G g G': rows of the matrices are input channels and columns output channels, or with TURNED, which also turns g by
// half a circle, the other way round.
template <bool TURNED, typename T>
void transform_weights(int64_t inputs, int64_t outputs, const T* weights, const Matrices<T>& to) {
    for_blocks(inputs, outputs, weights, [&](int64_t o, int64_t i, auto at) {
        Block<T> g[9];
        for (int n = 0; n < 9; ++n) {
            for (int64_t r = 0; r < WIDTH; ++r) g[n].rows[r] = load(at(r, TURNED ? 8 - n : n));
            if (!TURNED) transpose(g[n]);
        }
        for (int64_t r = 0; r < WIDTH; ++r) {
            Vec<T> m[4][3];
            for (int j = 0; j < 3; ++j) {
                const Vec<T> g0 = g[j].rows[r], g1 = g[3 + j].rows[r], g2 = g[6 + j].rows[r];
                m[0][j] = g0, m[1][j] = (g0 + g1 + g2) / 2, m[2][j] = (g0 - g1 + g2) / 2, m[3][j] = g2;
            }
            const int64_t row = (TURNED ? o : i) + r, column = TURNED ? i : o;
            for (int k = 0; k < 4; ++k) {
                to.store(4 * k, row, column, m[k][0]);
                to.store(4 * k + 1, row, column, (m[k][0] + m[k][1] + m[k][2]) / 2);
                to.store(4 * k + 2, row, column, (m[k][0] - m[k][1] + m[k][2]) / 2);
                to.store(4 * k + 3, row, column, m[k][2]);
            }
        }
    });
}

// dg = G' m G of matrices m whose rows are input channels and columns output channels.
template <typename T>
void transform_weight_gradient(int64_t inputs, int64_t outputs, const Matrices<T>& from, T* weights) {
    for_blocks(inputs, outputs, weights, [&](int64_t o, int64_t i, auto at) {
        Block<T> g[9];
        for (int64_t r = 0; r < WIDTH; ++r) {
            Vec<T> m[3][4];
            for (int j = 0; j < 4; ++j) {
                const auto q = [&](int k) { return load(from.at(4 * k + j, i + r, o)); };
                const Vec<T> half = (q(1) + q(2)) / 2;
                m[0][j] = q(0) + half, m[1][j] = (q(1) - q(2)) / 2, m[2][j] = half + q(3);
            }
            for (int k = 0; k < 3; ++k) {
                const Vec<T> half = (m[k][1] + m[k][2]) / 2;
                g[3 * k].rows[r] = m[k][0] + half;
                g[3 * k + 1].rows[r] = (m[k][1] - m[k][2]) / 2;
                g[3 * k + 2].rows[r] = half + m[k][3];
            }
        }
        for (int n = 0; n < 9; ++n) {
            transpose(g[n]);
            for (int64_t r = 0; r < WIDTH; ++r) Plain<T>::store(at(r, n), g[n].rows[r]);
        }
    });
}

// to (rows x columns) = left (rows x terms) right (terms x columns), or with ADDED to += left' right, of a left
// (terms x rows): ROWS rows and VECS * WIDTH columns of it.
template <int VECS, bool ADDED, typename T>
void multiply_part(int64_t rows, int64_t terms, int64_t columns, const T* left, const T* right, T* to) {
    Vec<T> sums[ROWS][VECS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; ++v) sums[r][v] = Vec<T>{};
    for (int64_t n = 0; n < terms; ++n) {
        Vec<T> factors[VECS];
#pragma GCC unroll 2
        for (int v = 0; v < VECS; ++v) factors[v] = load(right + n * columns + v * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const T factor = ADDED ? left[n * rows + r] : left[r * terms + n];
#pragma GCC unroll 2
            for (int v = 0; v < VECS; ++v) sums[r][v] += factor * factors[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; ++v) {
            T* const at = to + r * columns + v * WIDTH;
            Plain<T>::store(at, ADDED ? load(at) + sums[r][v] : sums[r][v]);  // last: it rounds less than on the way
        }
}

template <bool ADDED, typename T>
void multiply(int64_t rows, int64_t terms, int64_t columns, const T* left, const T* right, T* to) {
    int64_t c = 0;
    const auto take = [&](auto part, int64_t width) {
        for (; c + width <= columns; c += width)
            for (int64_t r = 0; r < rows; r += ROWS)
                part(rows, terms, columns, left + r * (ADDED ? 1 : terms), right + c, to + r * columns + c);
    };
    take(multiply_part<2, ADDED, T>, 2 * WIDTH);
    take(multiply_part<1, ADDED, T>, WIDTH);
}

// From x (with `inputs` channels) y (with `outputs`), or with TURNED from the gradient of y that of x.
template <bool TURNED, typename T>
void convolve(const Shape& s, const T* from, const T* weights, T* to) {
    const int64_t terms = TURNED ? s.outputs : s.inputs, columns = TURNED ? s.inputs : s.outputs;
    const Matrices<T> factors(terms, columns), patches(TILES, terms), products(TILES, columns);
    patches.clear();  // rows that are no tile's, after the last, are multiplied too
    for (int64_t lane = 0; lane < s.lanes; ++lane) {
        const Map<const T> in(from, s, lane, terms);
        const Map<T> out(to, s, lane, columns);
        transform_weights<TURNED>(s.inputs, s.outputs, weights + lane * s.outputs * 9 * s.inputs, factors);
        for (int64_t first = 0; first < s.tiles(); first += TILES) {
            const int64_t count = std::min(TILES, s.tiles() - first);
            transform_input(s, in, first, count, patches);
            for (int p = 0; p < PLACES; ++p)
                multiply<false>(TILES, terms, columns, patches.at(p), factors.at(p), products.at(p));
            transform_output(s, products, first, count, out);
        }
    }
}

template <typename T>
void weight_gradient(const Shape& s, const T* x, const T* dy, T* dweights) {
    const Matrices<T> patches(TILES, s.inputs), gradients(TILES, s.outputs), sums(s.inputs, s.outputs);
    for (int64_t lane = 0; lane < s.lanes; ++lane) {
        const Map<const T> in(x, s, lane, s.inputs), out(dy, s, lane, s.outputs);
        sums.clear();
        for (int64_t first = 0; first < s.tiles(); first += TILES) {
            const int64_t count = std::min(TILES, s.tiles() - first);
            transform_input(s, in, first, count, patches);
            transform_gradient(s, out, first, count, gradients);
            for (int p = 0; p < PLACES; ++p)
                multiply<true>(s.inputs, count, s.outputs, patches.at(p), gradients.at(p), sums.at(p));
        }
        transform_weight_gradient(s.inputs, s.outputs, sums, dweights + lane * s.outputs * 9 * s.inputs);
    }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                                \
    extern "C" void convolve_##NAME(const Shape* s, const T* x, const T* weights, T* y) {                              \
        convolve<false>(*s, x, weights, y);                                                                            \
    }                                                                                                                  \
    extern "C" void input_gradient_##NAME(const Shape* s, const T* dy, const T* weights, T* dx) {                      \
        convolve<true>(*s, dy, weights, dx);                                                                           \
    }                                                                                                                  \
    extern "C" void weight_gradient_##NAME(const Shape* s, const T* x, const T* dy, T* dweights) {                     \
        weight_gradient(*s, x, dy, dweights);                                                                          \
    }

EXPORT(float32, float)
EXPORT(float64, double)
