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
INLINE uint32_t bit_count(uint32_t x) {  // without a library call, and in a form that vectorises
    if (NATIVE) return static_cast<uint32_t>(__builtin_popcount(x));
    x -= x >> 1 & 0x55555555u;
    x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
    return ((x + (x >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24;
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
        for (int64_t t = 0; t < p.frames; ++t) {
            int32_t whole[LANES] = {}, sum[LANES] = {};
            for (int64_t tap = 0; tap < taps; ++tap) {
                const int64_t at = t * p.stride + tap * 32, word = at / 32;
                const uint32_t shift = static_cast<uint32_t>(at % 32);
                if (word >= p.words) break;
                const bool more = word + 1 < p.words;
                const uint32_t rest = static_cast<uint32_t>(std::min<int64_t>(32, p.kernel - tap * 32));
                const uint32_t mask = rest == 32 ? ~0u : (1u << rest) - 1;
                const uint32_t real = (valid[word] >> shift | (more ? valid[word + 1] : 0u) << 1 << (31 - shift)) & mask;
                const uint32_t *low = x + word * LANES, *high = more ? low + LANES : low, *filter = weight + tap * LANES;
                const uint32_t counted = bit_count<Isa::native>(real);
                for (int j = 0; j < LANES; ++j) {
                    const uint32_t window = low[j] >> shift | high[j] << 1 << (31 - shift);
                    sum[j] += static_cast<int32_t>(bit_count<Isa::native>((window ^ filter[j]) & real));
                    whole[j] += static_cast<int32_t>(p.is_signed ? counted : bit_count<Isa::native>(filter[j] & real));
                }
            }
            float y[LANES];
            for (int j = 0; j < LANES; ++j) y[j] = static_cast<float>(whole[j] - (p.is_signed ? 2 * sum[j] : sum[j])) * factor[j];
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
