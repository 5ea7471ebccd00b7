// NEON of 64-bit Arm.
#pragma once

#include "common.h"

#if defined(__aarch64__)

namespace {

struct Neon {
    using Operands = InPlace<Neon>;
    static constexpr int rows = 4;
    static constexpr bool native = false;

    template <int R, int P>
    static void tile(const uint32_t* a, int64_t stride, const uint32_t* b, int64_t words, int32_t* out) {
        for (int p = 0; p < 2 * P; ++p) half<R>(a, stride, b + (p / 2 * words) * LANES + p % 2 * 8, words, out + p * 8);
    }

    template <int R>
    static void half(const uint32_t* a, int64_t stride, const uint32_t* b, int64_t words, int32_t* out) {
        uint32x4_t sum[R][2];
        for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = vdupq_n_u32(0);
        for (int64_t begin = 0; begin < words; begin += 31) {
            const int64_t end = std::min<int64_t>(words, begin + 31);
            uint8x16_t part[R][2];
            for (int r = 0; r < R; ++r) part[r][0] = part[r][1] = vdupq_n_u8(0);
            for (int64_t w = begin; w < end; ++w)
                for (int h = 0; h < 2; ++h) {
                    const uint32x4_t column = vld1q_u32(b + w * LANES + 4 * h);
                    for (int r = 0; r < R; ++r) {
                        const uint32x4_t x = veorq_u32(vdupq_n_u32(a[r * stride + w]), column);
                        part[r][h] = vaddq_u8(part[r][h], vcntq_u8(vreinterpretq_u8_u32(x)));
                    }
                }
            for (int r = 0; r < R; ++r)
                for (int h = 0; h < 2; ++h) sum[r][h] = vpadalq_u16(sum[r][h], vpaddlq_u8(part[r][h]));
        }
        for (int r = 0; r < R; ++r)
            for (int h = 0; h < 2; ++h) vst1q_s32(out + r * PAIR + 4 * h, vreinterpretq_s32_u32(sum[r][h]));
    }

    static inline uint32_t above(const float* x, float factor, const float* move, float limit) {
        uint32_t word = 0;
        for (int i = 0; i < PAIR; ++i) word |= static_cast<uint32_t>(x[i] * factor + (move ? move[i] : 0.0f) > limit) << i;
        return word;
    }

    static inline uint32_t at_most(const int32_t* x, const int32_t* limit) {
        uint32_t word = 0;
        for (int i = 0; i < PAIR; ++i) word |= static_cast<uint32_t>(x[i] <= limit[i]) << i;
        return word;
    }

    static inline uint64_t weigh(const uint8_t* d, int64_t n, uint8_t best, const uint8_t (*bytes)[256], int64_t count) {
        uint64_t sum[3] = {0, 0, 0};
        for (int64_t w = 0; w * LANES < count; ++w) {
            const uint8x16_t first = vdupq_n_u8(static_cast<uint8_t>(best + w * LANES));
            uint8x16_t table[3];
            for (int b = 0; b < 3; ++b) table[b] = vld1q_u8(bytes[b] + w * LANES);
            for (int64_t j = 0; j < n; j += 64) {
                uint16x8_t part[3] = {vdupq_n_u16(0), vdupq_n_u16(0), vdupq_n_u16(0)};
                for (int64_t i = j; i < j + 64; i += 16) {
                    const uint8x16_t place = vsubq_u8(vld1q_u8(d + i), first);  // a table returns 0 for what is not 0 ... 15
                    for (int b = 0; b < 3; ++b) part[b] = vpadalq_u8(part[b], vqtbl1q_u8(table[b], place));
                }
                for (int b = 0; b < 3; ++b) sum[b] += vaddlvq_u16(part[b]);
            }
        }
        return sum[0] + (sum[1] << 8) + (sum[2] << 16);
    }

    static inline uint32_t within(const uint8_t* d, uint8_t furthest) {
        uint32_t word = 0;
        for (int i = 0; i < PAIR; ++i) word |= static_cast<uint32_t>(d[i] <= furthest) << i;
        return word;
    }

    static inline void collect(const Column& c, uint32_t* words) {
        uint32x4_t bits[4] = {}, one = vdupq_n_u32(1u << c.first);
        for (int i = 0; i < c.count; ++i, one = vshlq_n_u32(one, 1))
            for (int h = 0; h < 4; ++h) {
                float32x4_t x = vld1q_f32(c.x + i * c.stride + 4 * h);
                if (c.move) x = vaddq_f32(x, vld1q_f32(c.move + i * c.move_stride + 4 * h));
                bits[h] = vorrq_u32(bits[h], vandq_u32(vcgtq_f32(x, vdupq_n_f32(c.limit)), one));
            }
        for (int h = 0; h < 4; ++h) vst1q_u32(words + 4 * h, bits[h]);
    }
};

}  // namespace

#endif
