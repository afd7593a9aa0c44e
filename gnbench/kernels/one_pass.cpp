// y = relu(gamma * (x - mean) / sqrt(var + eps) + beta + shortcut) and its gradients, on maps stored as (N, H, W, C).
//
// The N images are `sets` times `images` of a set, image i of set s being the (i * sets + s)-th. mean and var (biased)
// are those of each of `groups` groups of neighbouring channels, over the positions of a set's images: BN is one set of
// all images and as many groups as channels, GN a set an image. Whatever a set's maps are needed for is done before the
// next set is begun, so that they are read from the cache and not from memory.

#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace {

// Sums are over rows of so many numbers where a map falls into them: several positions of a map with few channels, or
// a part of one with many.
constexpr int64_t ROW = 64;

struct Shape {
    int64_t sets, images, positions, channels, groups;

    int64_t size() const { return positions * channels; }
    int64_t start(int64_t image, int64_t set) const { return (image * sets + set) * size(); }
    int64_t per_group() const { return channels / groups; }
    int64_t row() const { return ROW % channels == 0 && size() % ROW == 0 ? ROW : channels; }
};

// The numbers of each channel, one after the other as often as a row has them.
template <typename W>
struct PerChannel : std::vector<W> {
    explicit PerChannel(const Shape& s) : std::vector<W>(s.row()) {}
    Vec<W> at(int64_t c) const { return Plain<W>::load(this->data() + c); }
    void spread(const Shape& s) {
        for (int64_t c = s.channels; c < s.row(); ++c) (*this)[c] = (*this)[c - s.channels];
    }
};

// Over the positions of a set's images: out[m][c] = sum of the m-th of the NUM numbers that `term` adds to its sums.
template <int NUM, int VECS, typename W, typename Term>
inline void add_columns(const Shape& s, int64_t set, int64_t first, PerChannel<W>* const (&out)[NUM], Term term) {
    Vec<W> total[NUM][VECS] = {};
    for (int64_t image = 0; image < s.images; ++image) {
        Vec<W> sums[NUM][VECS] = {};
        const int64_t start = s.start(image, set), end = start + s.size(), row = s.row();
        for (int64_t at = start + first; at < end; at += row)
            for (int v = 0; v < VECS; ++v) {
                Vec<W> terms[NUM];
                term(at + v * WIDTH, first + v * WIDTH, terms);
                for (int m = 0; m < NUM; ++m) sums[m][v] += terms[m];
            }
        for (int m = 0; m < NUM; ++m)
            for (int v = 0; v < VECS; ++v) total[m][v] += sums[m][v];
    }
    for (int m = 0; m < NUM; ++m)
        for (int v = 0; v < VECS; ++v) Plain<W>::store(out[m]->data() + first + v * WIDTH, total[m][v]);
}

template <int NUM, typename W, typename Term>
inline void add_up(const Shape& s, int64_t set, PerChannel<W>* const (&out)[NUM], Term term) {
    int64_t c = 0;
    for (; c + ROW <= s.row(); c += ROW) add_columns<NUM, ROW / WIDTH>(s, set, c, out, term);
    for (; c < s.row(); c += WIDTH) add_columns<NUM, 1>(s, set, c, out, term);
    for (auto sums : out)
        for (int64_t c = s.channels; c < s.row(); ++c) (*sums)[c % s.channels] += (*sums)[c];
}

template <typename Change>
inline void for_each(const Shape& s, int64_t set, Change change) {
    for (int64_t image = 0; image < s.images; ++image) {
        const int64_t start = s.start(image, set), end = start + s.size(), row = s.row();
        for (int64_t at = start; at < end; at += row)
            for (int64_t c = 0; c < row; c += WIDTH) change(at + c, c);
    }
}

template <typename Kind, bool RELU, bool SHORTCUT, typename S = typename Kind::Stored, typename W = typename Kind::Wide>
void forward(const Shape& s, W eps, const S* x, const S* shortcut, const W* gamma, const W* beta, S* y, W* mean,
             W* var) {
    PerChannel<W> origin(s), sum(s), square(s), shift(s), scale(s), bias(s);
    for (int64_t c = 0; c < s.channels; ++c) bias[c] = beta[c];
    bias.spread(s);
    for (int64_t set = 0; set < s.sets; ++set, mean += s.groups, var += s.groups) {
        // from each channel's first number on: the squares of numbers that all lie far from zero would lose digits
        for (int64_t c = 0; c < s.channels; c += WIDTH)
            Plain<W>::store(&origin[c], Kind::load(x + s.start(0, set) + c));
        const W per_channel = s.positions * s.images, per_group = s.per_group() * per_channel;
        for (bool first = true, again = true; again; first = false) {
            origin.spread(s);
            add_up<2>(s, set, {&sum, &square}, [&](int64_t at, int64_t c, Vec<W>* terms) {
                terms[0] = Kind::load(x + at) - origin.at(c);
                terms[1] = terms[0] * terms[0];
            });
            again = false;  // but for a channel whose first number is an outlier: from its mean on
            for (int64_t c = 0; first && c < s.channels; ++c)
                again |= sum[c] / per_channel * sum[c] > W(0.99) * square[c];
            for (int64_t c = 0; again && c < s.channels; ++c) origin[c] += sum[c] / per_channel;
        }
        for (int64_t g = 0, c = 0; g < s.groups; ++g, c += s.per_group()) {
            W total = 0, centred = 0;
            for (int64_t d = c; d < c + s.per_group(); ++d) total += origin[d] + sum[d] / per_channel;
            mean[g] = total / s.per_group();
            for (int64_t d = c; d < c + s.per_group(); ++d) {
                const W off = mean[g] - origin[d];
                centred += square[d] - off * (2 * sum[d] - off * per_channel);
            }
            var[g] = centred < 0 ? 0 : centred / per_group;  // below zero by rounding
            for (int64_t d = c; d < c + s.per_group(); ++d) {
                shift[d] = mean[g];
                scale[d] = gamma[d] / std::sqrt(var[g] + eps);
            }
        }
        shift.spread(s), scale.spread(s);
        for_each(s, set, [&](int64_t at, int64_t c) {
            Vec<W> v = (Kind::load(x + at) - shift.at(c)) * scale.at(c) + bias.at(c);
            if (SHORTCUT) v += Kind::load(shortcut + at);
            if (RELU) v = v < 0 ? Vec<W>{} : v;  // which lets through what is not a number
            Kind::store(y + at, v);
        });
    }
}

// With dz the gradient before the ReLU, which is also the shortcut's, and sums over a set's positions:
//   dbeta = sum(dz), dgamma = sum(dz * (x - mean)) / std, dx = gamma / std * dz + b * (x - mean) + k,
// where over the n numbers of a group
//   b = -sum(gamma * dz * (x - mean)) / (std^3 * n), k = -sum(gamma * dz) / (std * n).
template <typename Kind, bool RELU, bool SHORTCUT, typename S = typename Kind::Stored, typename W = typename Kind::Wide>
void backward(const Shape& s, W eps, const S* dy, const S* y, const S* x, const W* gamma, const W* beta, const W* mean,
              const W* var, S* dx, S* dshortcut, W* dgamma, W* dbeta) {
    PerChannel<W> shift(s), scale(s), bias(s), sum_dz(s), sum_dzx(s), b(s), k(s);
    for (int64_t c = 0; c < s.channels; ++c) bias[c] = beta[c];
    bias.spread(s);
    const auto dz = [&](int64_t at, int64_t c, Vec<W> centred) {
        const Vec<W> upstream = Kind::load(dy + at);
        if (!RELU) return upstream;
        const Vec<W> output = SHORTCUT ? Kind::load(y + at) : centred * scale.at(c) + bias.at(c);
        return output <= 0 ? Vec<W>{} : upstream;
    };
    for (int64_t set = 0; set < s.sets; ++set, mean += s.groups, var += s.groups) {
        for (int64_t c = 0; c < s.channels; ++c) {
            shift[c] = mean[c / s.per_group()];
            scale[c] = gamma[c] / std::sqrt(var[c / s.per_group()] + eps);
        }
        shift.spread(s), scale.spread(s);
        add_up<2>(s, set, {&sum_dz, &sum_dzx}, [&](int64_t at, int64_t c, Vec<W>* terms) {
            const Vec<W> centred = Kind::load(x + at) - shift.at(c);
            terms[0] = dz(at, c, centred);
            terms[1] = terms[0] * centred;
        });
        const W count = s.per_group() * s.positions * s.images;
        for (int64_t g = 0, c = 0; g < s.groups; ++g, c += s.per_group()) {
            const W rstd = 1 / std::sqrt(var[g] + eps);
            W first = 0, second = 0;
            for (int64_t d = c; d < c + s.per_group(); ++d) {
                first += gamma[d] * sum_dz[d];
                second += gamma[d] * sum_dzx[d];
                dbeta[d] += sum_dz[d];
                dgamma[d] += sum_dzx[d] * rstd;
            }
            for (int64_t d = c; d < c + s.per_group(); ++d) {
                b[d] = -second * rstd * rstd * rstd / count;
                k[d] = -first * rstd / count;
            }
        }
        b.spread(s), k.spread(s);
        for_each(s, set, [&](int64_t at, int64_t c) {
            const Vec<W> centred = Kind::load(x + at) - shift.at(c);
            const Vec<W> before = dz(at, c, centred);
            Kind::store(dx + at, before * scale.at(c) + centred * b.at(c) + k.at(c));
            if (SHORTCUT) Kind::store(dshortcut + at, before);
        });
    }
}

}  // namespace

#define EXPORT(NAME, KIND)                                                                                             \
    extern "C" void forward_##NAME(const Shape* s, double eps, bool relu, const KIND::Stored* x,                       \
                                   const KIND::Stored* shortcut, const KIND::Wide* gamma, const KIND::Wide* beta,      \
                                   KIND::Stored* y, KIND::Wide* mean, KIND::Wide* var) {                               \
        const auto f = shortcut ? forward<KIND, true, true>                                                            \
                       : relu   ? forward<KIND, true, false>                                                           \
                                : forward<KIND, false, false>;                                                         \
        f(*s, eps, x, shortcut, gamma, beta, y, mean, var);                                                            \
    }                                                                                                                  \
    extern "C" void backward_##NAME(const Shape* s, double eps, bool relu, const KIND::Stored* dy,                     \
                                    const KIND::Stored* y, const KIND::Stored* x, const KIND::Wide* gamma,             \
                                    const KIND::Wide* beta, const KIND::Wide* mean, const KIND::Wide* var,             \
                                    KIND::Stored* dx, KIND::Stored* dshortcut, KIND::Wide* dgamma,                     \
                                    KIND::Wide* dbeta) {                                                               \
        const auto f = dshortcut ? backward<KIND, true, true>                                                          \
                       : relu    ? backward<KIND, true, false>                                                         \
                                 : backward<KIND, false, false>;                                                       \
        f(*s, eps, dy, y, x, gamma, beta, mean, var, dx, dshortcut, dgamma, dbeta);                                    \
    }

EXPORT(float32, Plain<float>)
EXPORT(float64, Plain<double>)
EXPORT(bfloat16, BFloat16)
