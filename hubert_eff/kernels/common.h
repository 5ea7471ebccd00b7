// What every instruction set and every operation share: sizes, strided operands, reading and rounding.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#define AVX512BW __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define AVX512POPCNT __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx512vbmi")))
#elif defined(__aarch64__)
#include <arm_neon.h>
#define NEON
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int LANES = 16, PAIR = 2 * LANES;
constexpr int64_t BLOCK = 64;  // rows whose words stay in cache

// An instruction set is a class: its `Operands` hold some rows, at most `blocks` times BLOCK, and some panels, and write popcounts of tiles
// of them, or `sums` that stand for them, to out[panels / 2][rows][32]; `above` compares 32 numbers x * factor + move with a limit,
// `at_most` 32 integers; `collect` packs a column of frames, 16 words side by side; `weigh` sums the weights of bytes, whole
// vectors of 64, by how far beyond `best` they are, and `within` compares 32 bytes with one; `native` says whether it counts bits in one
// instruction.

// Up to 32 frames of sixteen channels, x + move > limit; frame i is bit `first` + i of a channel's word.
struct Column {
    const float *x, *move;  // move may be null: 0
    int64_t stride, move_stride;
    int first, count;
    float limit;
};

// Operands of a product as they lie in memory, for an instruction set whose `tile` reads them so: popcounts of R rows and P panels,
// out[R][32].
template <class Isa>
class InPlace {
  public:
    static constexpr int rows = Isa::rows, panels = 2;
    static constexpr bool sums = false;

    static int64_t blocks(int64_t) { return 1; }
    InPlace(int64_t words, int64_t, bool) : words(words), zeros(words) {}
    INLINE void set_rows(const uint32_t* first, int64_t) { a = first; }
    INLINE void set_columns(const uint32_t* first, int count) { b = first, two = count > 1; }
    INLINE void zero_row(int32_t* out) const { run<1>(zeros.data(), out); }

    INLINE void tile(int64_t row, int count, int32_t* out) const {
        if (count == rows) return run<rows>(a + row * words, out);
        for (int r = 0; r < count; ++r) run<1>(a + (row + r) * words, out + r * PAIR);
    }

  private:
    const int64_t words;
    const std::vector<uint32_t> zeros;
    const uint32_t *a = nullptr, *b = nullptr;
    bool two = false;

    template <int R>
    INLINE void run(const uint32_t* from, int32_t* out) const {
        if (two)
            Isa::template tile<R, 2>(from, words, b, words, out);
        else
            Isa::template tile<R, 1>(from, words, b, words, out);
    }
};

INLINE float read(const void* x, int64_t i, bool half) {
    if (!half) return static_cast<const float*>(x)[i];
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(x)[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

constexpr int DIMS = 3;  // leading dimensions of a strided operand

INLINE int64_t offset(const int64_t* index, const int64_t* stride) {
    return index[0] * stride[0] + index[1] * stride[1] + index[2] * stride[2];
}

}  // namespace
