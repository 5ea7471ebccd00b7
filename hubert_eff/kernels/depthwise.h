// Depthwise convolution of bits along time.
#pragma once

#include "common.h"

namespace {

struct Depthwise {  // each channel's bits along time, against its own filter
    const uint32_t *x, *valid, *weight;  // [B][C/16][time words][16], [B][time words], [C/16][tap words][16]
    const float *scale, *size, *bias;  // as in Product
    void* out;  // [B][frames][C]
    int64_t batch, frames, channels, words, kernel, stride, sizes, is_signed, half;
};

template <bool NATIVE>
INLINE uint32_t bit_count(uint32_t x) {  // without a library call, and in a form that vectorizes
    if (NATIVE) return static_cast<uint32_t>(__builtin_popcount(x));
    x -= x >> 1 & 0x55555555u;
    x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
    return ((x + (x >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24;
}

// The popcounts of sixteen words, in their place.
#if defined(__x86_64__)
AVX2 inline void count_nibbles(uint32_t* words) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi8(1), pairs = _mm256_set1_epi16(1);
    for (int half = 0; half < 2; ++half) {
        __m256i* at = reinterpret_cast<__m256i*>(words) + half;
        const __m256i x = _mm256_loadu_si256(at);
        const __m256i first = _mm256_shuffle_epi8(table, _mm256_and_si256(x, low));
        const __m256i second = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), low));
        const __m256i bytes = _mm256_add_epi8(first, second);
        _mm256_storeu_si256(at, _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, ones), pairs));
    }
}
#endif

// y[j] = (all[j] - each * popcount(((low, high) from `shift` on ^ weight)[j] & mask)) * factor[j]: a window of sixteen channels.
template <bool NATIVE>
INLINE void whole_sums(
    const uint32_t* low, const uint32_t* high, uint32_t shift, const uint32_t* weight, uint32_t mask, const int32_t* all, int32_t each,
    const float* factor, float* y) {
#if defined(__x86_64__)
    if (!NATIVE) {
        uint32_t differ[LANES];
        for (int j = 0; j < LANES; ++j) differ[j] = ((low[j] >> shift | high[j] << 1 << (31 - shift)) ^ weight[j]) & mask;
        count_nibbles(differ);
        for (int j = 0; j < LANES; ++j) y[j] = static_cast<float>(all[j] - each * static_cast<int32_t>(differ[j])) * factor[j];
        return;
    }
#endif
    for (int j = 0; j < LANES; ++j) {
        const uint32_t window = low[j] >> shift | high[j] << 1 << (31 - shift);
        y[j] = static_cast<float>(all[j] - each * static_cast<int32_t>(bit_count<NATIVE>((window ^ weight[j]) & mask))) * factor[j];
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
    for (int64_t task = begin; task < end; ++task) {
        const int64_t batch = task / panels, first = task % panels * LANES, n = std::min<int64_t>(LANES, p.channels - first);
        const uint32_t *x = p.x + task * p.words * LANES, *valid = p.valid + batch * p.words;
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
        const int32_t each = p.is_signed ? 2 : 1;  // differing bit takes so much away
        for (int64_t t = 0; t < p.frames; ++t) {
            const int64_t at = t * p.stride, word = at / 32;
            const uint32_t shift = static_cast<uint32_t>(at % 32);
            float y[LANES];
            if (taps == 1 && word + 1 < p.words && ((valid[word] >> shift | valid[word + 1] << 1 << (31 - shift)) & whole) == whole) {
                whole_sums<Isa::native>(x + word * LANES, x + (word + 1) * LANES, shift, weight, whole, all, each, factor, y);
            } else {
                int32_t sum[LANES];
                window_sums<Isa>(p, x, valid, weight, at, sum);
                for (int j = 0; j < LANES; ++j) y[j] = static_cast<float>(sum[j]) * factor[j];
            }
            if (p.bias)
                for (int j = 0; j < LANES; ++j) y[j] += bias[j];
            const int64_t place = (batch * p.frames + t) * p.channels + first;
            float* out = static_cast<float*>(p.out) + place;
            if (p.half)
                for (int64_t j = 0; j < n; ++j) static_cast<uint16_t*>(p.out)[place + j] = to_bfloat16(y[j]);
            else if (n == LANES)
                for (int j = 0; j < LANES; ++j) out[j] = y[j];
            else
                for (int64_t j = 0; j < n; ++j) out[j] = y[j];
        }
    }
}

}  // namespace
