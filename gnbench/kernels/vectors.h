// Registers of numbers, and how they are read from maps and written to them.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

// Numbers taken at a time: a register of float32. The number of channels is a multiple of the largest WIDTH.
#if defined(__AVX512F__)
constexpr int64_t WIDTH = 16;
#elif defined(__AVX__)
constexpr int64_t WIDTH = 8;
#else
constexpr int64_t WIDTH = 4;
#endif

template <typename T>
using Vec __attribute__((vector_size(WIDTH * sizeof(T)))) = T;

// How numbers are kept in a map, and in which precision they are computed with.
template <typename T>
struct Plain {
    using Stored = T;
    using Wide = T;
    static Vec<T> load(const T* from) {
        Vec<T> v;
        std::memcpy(&v, from, sizeof v);
        return v;
    }
    static void store(T* to, Vec<T> v) { std::memcpy(to, &v, sizeof v); }
};

struct BFloat16 {
    using Stored = uint16_t;
    using Wide = float;
    using Bits = Vec<uint32_t>;
    static Vec<float> load(const uint16_t* from) {
        const Bits bits = __builtin_convertvector(Plain<uint16_t>::load(from), Bits) << 16;
        Vec<float> v;
        std::memcpy(&v, &bits, sizeof v);
        return v;
    }
    static void store(uint16_t* to, Vec<float> v) {  // to the nearest, ties to even
        Bits bits;
        std::memcpy(&bits, &v, sizeof bits);
        bits = v == v ? bits + 0x7fff + ((bits >> 16) & 1) : Bits{} + 0x7fc00000;  // the second: not a number
        Plain<uint16_t>::store(to, __builtin_convertvector(bits >> 16, Vec<uint16_t>));
    }
};

}  // namespace
