// Depthwise convolution of bits along time.
#pragma once

#include "common.h"

namespace {

struct Depthwise {  // each channel's bits along time, against its own filter
    const uint32_t *x, *valid, *weight;  // [B][C/16][time words][16], [B][time words] or null, [C/16][tap words][16]
    const float *scale, *size, *bias;  // as in Product
    void* out;  // [B][frames][C]
    int64_t batch, frames, channels, words, kernel, stride, begin, end, sizes, is_signed, half;  // begin, end: what counts without valid
};

INLINE std::vector<uint32_t> between(int64_t begin, int64_t end, int64_t words) {  // bits begin ... end - 1 of so many words
    std::vector<uint32_t> bits(static_cast<size_t>(words));
    for (int64_t i = begin; i < end; i = (i / 32 + 1) * 32) {
        const int64_t count = std::min<int64_t>(end, (i / 32 + 1) * 32) - i;
        bits[static_cast<size_t>(i / 32)] = (count == 32 ? ~0u : (1u << count) - 1) << i % 32;
    }
    return bits;
}

template <bool NATIVE>
INLINE uint32_t bit_count(uint32_t x) {  // without a library call, and in a form that vectorizes
    if (NATIVE) return static_cast<uint32_t>(__builtin_popcount(x));
    x -= x >> 1 & 0x55555555u;
    x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
    return ((x + (x >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24;
}

// y[j] = (all[j] - each * popcount(((low, high) from `shift` on ^ weight)[j] & mask)) * factor[j]: and + bias where there is
// one; a window of sixteen channels, each is 2 (`twice`) or 1.
#if defined(__x86_64__)
AVX2 inline __m256i eight(const void* from, int64_t at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + at / 8); }

AVX2 inline void whole_sums_by_nibbles(
    const uint32_t* low, const uint32_t* high, uint32_t shift, const uint32_t* weight, uint32_t mask, const int32_t* all, bool twice,
    const float* factor, const float* bias, float* y) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi8(1), each = _mm256_set1_epi16(twice ? 2 : 1);
    const __m128i right = _mm_cvtsi32_si128(static_cast<int>(shift)), left = _mm_cvtsi32_si128(static_cast<int>(32 - shift));
    for (int h = 0; h < LANES; h += 8) {
        const __m256i window = _mm256_or_si256(_mm256_srl_epi32(eight(low, h), right), _mm256_sll_epi32(eight(high, h), left));  // by 32: zero
        const __m256i differ = _mm256_and_si256(_mm256_xor_si256(window, eight(weight, h)), _mm256_set1_epi32(static_cast<int>(mask)));
        const __m256i first = _mm256_shuffle_epi8(table, _mm256_and_si256(differ, nibble));
        const __m256i second = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(differ, 4), nibble));
        const __m256i count = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_add_epi8(first, second), ones), each);
        const __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(eight(all, h), count));
        const __m256 scaled = _mm256_mul_ps(sum, _mm256_loadu_ps(factor + h));
        _mm256_storeu_ps(y + h, bias ? _mm256_add_ps(scaled, _mm256_loadu_ps(bias + h)) : scaled);
    }
}
#endif

template <bool NATIVE>
INLINE void whole_sums(
    const uint32_t* low, const uint32_t* high, uint32_t shift, const uint32_t* weight, uint32_t mask, const int32_t* all, bool twice,
    const float* factor, const float* bias, float* y) {
#if defined(__x86_64__)
    if (!NATIVE) return whole_sums_by_nibbles(low, high, shift, weight, mask, all, twice, factor, bias, y);
#endif
    const int32_t each = twice ? 2 : 1;
    for (int j = 0; j < LANES; ++j) {
        const uint32_t window = low[j] >> shift | high[j] << 1 << (31 - shift);
        y[j] = static_cast<float>(all[j] - each * static_cast<int32_t>(bit_count<NATIVE>((window ^ weight[j]) & mask))) * factor[j];
        if (bias) y[j] += bias[j];
    }
}

// The sums of one window of 16 channels, from input `at` on, of which some may not count.
template <class Isa>
INLINE void window_sums(const Depthwise& p, const uint32_t* x, const uint32_t* valid, const uint32_t* weight, int64_t at, int32_t* sum) {
    for (int j = 0; j < LANES; ++j) sum[j] = 0;
    for (int64_t done = 0; done < p.kernel; done += 32, at += 32, weight += LANES) {
        const int64_t word = at / 32;
        if (word >= p.words) break;
        const uint32_t shift = static_cast<uint32_t>(at % 32), rest = static_cast<uint32_t>(std::min<int64_t>(32, p.kernel - done));
        const uint32_t mask = rest == 32 ? ~0u : (1u << rest) - 1;
        const bool more = word + 1 < p.words;
        const uint32_t real = (valid[word] >> shift | (more ? valid[word + 1] : 0u) << 1 << (31 - shift)) & mask;
        const uint32_t *low = x + word * LANES, *high = more ? low + LANES : low;
        const int32_t counted = static_cast<int32_t>(bit_count<Isa::native>(real));
        for (int j = 0; j < LANES; ++j) {
            const uint32_t window = low[j] >> shift | high[j] << 1 << (31 - shift);
            const int32_t differ = static_cast<int32_t>(bit_count<Isa::native>((window ^ weight[j]) & real));
            sum[j] += p.is_signed ? counted - 2 * differ : static_cast<int32_t>(bit_count<Isa::native>(weight[j] & real)) - differ;
        }
    }
}

template <class Isa>
INLINE void depthwise(const Depthwise& p, int64_t begin, int64_t end) {  // of [B][C/16]
    const int64_t panels = (p.channels + LANES - 1) / LANES, taps = (p.kernel + 31) / 32;
    const std::vector<uint32_t> counted = p.valid ? std::vector<uint32_t>() : between(p.begin, p.end, p.words);
    for (int64_t task = begin; task < end; ++task) {
        const int64_t batch = task / panels, first = task % panels * LANES, n = std::min<int64_t>(LANES, p.channels - first);
        const uint32_t *x = p.x + task * p.words * LANES, *valid = p.valid ? p.valid + batch * p.words : counted.data();
        const uint32_t* weight = p.weight + task % panels * taps * LANES;
        float factor[LANES] = {}, bias[LANES] = {};
        for (int64_t j = 0; j < n; ++j) {
            const float size = p.size ? p.size[p.sizes == 1 ? 0 : first + j] : 1.0f;
            factor[j] = p.scale ? *p.scale * size : size;
            bias[j] = p.bias ? p.bias[first + j] : 0.0f;
        }
        const uint32_t whole = p.kernel % 32 ? (1u << p.kernel % 32) - 1 : ~0u;
        int32_t all[LANES];  // of one word of taps: the sum of a window without a differing bit, each input of which counts
        for (int j = 0; j < LANES; ++j)
            all[j] = static_cast<int32_t>(p.is_signed ? p.kernel : bit_count<Isa::native>(weight[j] & whole));
        for (int64_t t = 0; t < p.frames; ++t) {
            const int64_t at = t * p.stride, word = at / 32, place = (batch * p.frames + t) * p.channels + first;
            const uint32_t shift = static_cast<uint32_t>(at % 32);
            float sums[LANES];
            float *out = static_cast<float*>(p.out) + place, *y = n == LANES && !p.half ? out : sums;
            if (taps == 1 && word + 1 < p.words && ((valid[word] >> shift | valid[word + 1] << 1 << (31 - shift)) & whole) == whole) {
                const uint32_t* low = x + word * LANES;
                whole_sums<Isa::native>(low, low + LANES, shift, weight, whole, all, p.is_signed, factor, p.bias ? bias : nullptr, y);
            } else {
                int32_t sum[LANES];
                window_sums<Isa>(p, x, valid, weight, at, sum);
                for (int j = 0; j < LANES; ++j) y[j] = static_cast<float>(sum[j]) * factor[j];
                if (p.bias)
                    for (int j = 0; j < LANES; ++j) y[j] += bias[j];
            }
            if (p.half)
                for (int64_t j = 0; j < n; ++j) static_cast<uint16_t*>(p.out)[place + j] = to_bfloat16(y[j]);
            else if (n < LANES)
                std::copy_n(y, n, out);
        }
    }
}

}  // namespace
