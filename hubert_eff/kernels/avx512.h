// AVX-512, with and without an instruction that counts bits.
#pragma once

#include "common.h"

#if defined(__x86_64__)

namespace {

AVX512BW inline uint32_t within512(const uint8_t* d, uint8_t furthest) {
    return _mm256_cmple_epu8_mask(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(d)), _mm256_set1_epi8(static_cast<char>(furthest)));
}

AVX512BW inline uint32_t above512(const float* x, float factor, const float* move, float limit) {
    const __m512 f = _mm512_set1_ps(factor), t = _mm512_set1_ps(limit);
    __m512 low = _mm512_mul_ps(_mm512_loadu_ps(x), f), high = _mm512_mul_ps(_mm512_loadu_ps(x + LANES), f);
    if (move) low = _mm512_add_ps(low, _mm512_loadu_ps(move)), high = _mm512_add_ps(high, _mm512_loadu_ps(move + LANES));
    return _mm512_kunpackw(_mm512_cmp_ps_mask(high, t, _CMP_GT_OQ), _mm512_cmp_ps_mask(low, t, _CMP_GT_OQ));
}

AVX512BW inline uint32_t at_most512(const int32_t* x, const int32_t* limit) {
    const __mmask16 low = _mm512_cmple_epi32_mask(_mm512_loadu_si512(x), _mm512_loadu_si512(limit));
    const __mmask16 high = _mm512_cmple_epi32_mask(_mm512_loadu_si512(x + LANES), _mm512_loadu_si512(limit + LANES));
    return _mm512_kunpackw(high, low);
}

AVX512BW inline void collect512(const Column& c, uint32_t* words) {
    const __m512 limit = _mm512_set1_ps(c.limit);
    __m512i bits = _mm512_setzero_si512(), one = _mm512_set1_epi32(static_cast<int32_t>(1u << c.first));
    for (int i = 0; i < c.count; ++i, one = _mm512_slli_epi32(one, 1)) {
        __m512 x = _mm512_loadu_ps(c.x + i * c.stride);
        if (c.move) x = _mm512_add_ps(x, _mm512_loadu_ps(c.move + i * c.move_stride));
        bits = _mm512_mask_or_epi32(bits, _mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ), bits, one);
    }
    _mm512_storeu_si512(words, bits);
}

struct Popcnt512 {
    using Operands = InPlace<Popcnt512>;
    static constexpr int rows = 8;
    static constexpr bool native = true;  // popcounts

    template <int R, int P>
    AVX512POPCNT static void tile(const uint32_t* a, int64_t stride, const uint32_t* b, int64_t words, int32_t* out) {
        __m512i sum[R][P];
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p) sum[r][p] = _mm512_setzero_si512();
        for (int64_t w = 0; w < words; ++w) {
            __m512i column[P];
            for (int p = 0; p < P; ++p) column[p] = _mm512_loadu_si512(b + (p * words + w) * LANES);
            for (int r = 0; r < R; ++r) {
                const __m512i row = _mm512_set1_epi32(static_cast<int32_t>(a[r * stride + w]));
                for (int p = 0; p < P; ++p)
                    sum[r][p] = _mm512_add_epi32(sum[r][p], _mm512_popcnt_epi32(_mm512_xor_si512(row, column[p])));
            }
        }
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p) _mm512_storeu_si512(out + r * PAIR + p * LANES, sum[r][p]);
    }

    AVX512POPCNT static inline uint32_t above(const float* x, float factor, const float* move, float limit) { return above512(x, factor, move, limit); }

    AVX512POPCNT static inline uint32_t at_most(const int32_t* x, const int32_t* limit) { return at_most512(x, limit); }

    // The sum of the weights of n distances (whole vectors), of those less than `count` beyond `best`: by tables of 64 bytes.
    AVX512POPCNT static inline uint64_t weigh(const uint8_t* d, int64_t n, uint8_t best, const uint8_t (*bytes)[256], int64_t count) {
        const __m512i zero = _mm512_setzero_si512();
        __m512i sum[3] = {zero, zero, zero};
        for (int64_t w = 0; w < count; w += 64) {
            const __m512i first = _mm512_set1_epi8(static_cast<char>(best + w));
            const __m512i end = _mm512_set1_epi8(static_cast<char>(std::min<int64_t>(64, count - w)));
            __m512i table[3];
            for (int b = 0; b < 3; ++b) table[b] = _mm512_load_si512(bytes[b] + w);
            for (int64_t j = 0; j < n; j += 64) {
                const __m512i place = _mm512_sub_epi8(_mm512_loadu_si512(d + j), first);
                const __mmask64 within = _mm512_cmplt_epu8_mask(place, end);
                for (int b = 0; b < 3; ++b) {
                    const __m512i part = _mm512_maskz_permutexvar_epi8(within, place, table[b]);
                    sum[b] = _mm512_add_epi64(sum[b], _mm512_sad_epu8(part, zero));
                }
            }
        }
        uint64_t total = 0;
        for (int b = 0; b < 3; ++b) total += static_cast<uint64_t>(_mm512_reduce_add_epi64(sum[b])) << 8 * b;
        return total;
    }

    AVX512POPCNT static inline uint32_t within(const uint8_t* d, uint8_t furthest) { return within512(d, furthest); }

    AVX512POPCNT static inline void collect(const Column& c, uint32_t* words) { collect512(c, words); }
};

struct Shuffle512 {
    using Operands = InPlace<Shuffle512>;
    static constexpr int rows = 4;
    static constexpr bool native = false;

    template <int R, int P>
    AVX512BW static void tile(const uint32_t* a, int64_t stride, const uint32_t* b, int64_t words, int32_t* out) {
        const __m512i counts = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
        const __m512i nibble = _mm512_set1_epi8(15), ones8 = _mm512_set1_epi8(1), ones16 = _mm512_set1_epi16(1);
        __m512i sum[R][P];
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p) sum[r][p] = _mm512_setzero_si512();
        for (int64_t begin = 0; begin < words; begin += 31) {  // bytes of `part` grow by up to 8 per word
            const int64_t end = std::min<int64_t>(words, begin + 31);
            __m512i part[R][P];
            for (int r = 0; r < R; ++r)
                for (int p = 0; p < P; ++p) part[r][p] = _mm512_setzero_si512();
            for (int64_t w = begin; w < end; ++w) {
                __m512i column[P];
                for (int p = 0; p < P; ++p) column[p] = _mm512_loadu_si512(b + (p * words + w) * LANES);
                for (int r = 0; r < R; ++r) {
                    const __m512i row = _mm512_set1_epi32(static_cast<int32_t>(a[r * stride + w]));
                    for (int p = 0; p < P; ++p) {
                        const __m512i x = _mm512_xor_si512(row, column[p]);
                        const __m512i low = _mm512_shuffle_epi8(counts, _mm512_and_si512(x, nibble));
                        const __m512i high = _mm512_shuffle_epi8(counts, _mm512_and_si512(_mm512_srli_epi16(x, 4), nibble));
                        part[r][p] = _mm512_add_epi8(part[r][p], _mm512_add_epi8(low, high));
                    }
                }
            }
            for (int r = 0; r < R; ++r)
                for (int p = 0; p < P; ++p) {
                    const __m512i in_words = _mm512_madd_epi16(_mm512_maddubs_epi16(part[r][p], ones8), ones16);
                    sum[r][p] = _mm512_add_epi32(sum[r][p], in_words);
                }
        }
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p) _mm512_storeu_si512(out + r * PAIR + p * LANES, sum[r][p]);
    }

    AVX512BW static inline uint32_t above(const float* x, float factor, const float* move, float limit) { return above512(x, factor, move, limit); }

    AVX512BW static inline uint32_t at_most(const int32_t* x, const int32_t* limit) { return at_most512(x, limit); }

    // The same by tables of sixteen bytes.
    AVX512BW static inline uint64_t weigh(const uint8_t* d, int64_t n, uint8_t best, const uint8_t (*bytes)[256], int64_t count) {
        const __m512i zero = _mm512_setzero_si512(), past = _mm512_set1_epi8(0x70);  // with it, what is not 0 ... 15 has its highest bit set
        __m512i sum[3] = {zero, zero, zero};
        for (int64_t w = 0; w * LANES < count; ++w) {
            const __m512i first = _mm512_set1_epi8(static_cast<char>(best + w * LANES));
            __m512i table[3];
            for (int b = 0; b < 3; ++b)
                table[b] = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[b] + w * LANES)));
            for (int64_t j = 0; j < n; j += 64) {
                const __m512i place = _mm512_adds_epu8(_mm512_sub_epi8(_mm512_loadu_si512(d + j), first), past);
                for (int b = 0; b < 3; ++b)
                    sum[b] = _mm512_add_epi64(sum[b], _mm512_sad_epu8(_mm512_shuffle_epi8(table[b], place), zero));
            }
        }
        uint64_t total = 0;
        for (int b = 0; b < 3; ++b) total += static_cast<uint64_t>(_mm512_reduce_add_epi64(sum[b])) << 8 * b;
        return total;
    }

    AVX512BW static inline uint32_t within(const uint8_t* d, uint8_t furthest) { return within512(d, furthest); }

    AVX512BW static inline void collect(const Column& c, uint32_t* words) { collect512(c, words); }
};

}  // namespace

#endif
