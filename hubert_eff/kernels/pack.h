// Floats to bits: along rows, or along time into panels.
#pragma once

#include "common.h"

namespace {

struct Pack {  // rows of x * factor + move > limit
    const void* x;
    const float *move, *factor, *limit;  // each may be null: 0, 1, 0
    int64_t size[DIMS], x_stride[DIMS], move_stride[DIMS], factor_stride[DIMS], columns;
    uint32_t* out;  // rows: [size...][words]; columns: [size 0][size 1][columns/16][words of size 2][16]
    int64_t half;
};

template <bool HALF, class Isa>
INLINE void pack_row(const Pack& p, const int64_t* index, uint32_t* out) {
    const int64_t x = offset(index, p.x_stride);
    const float* move = p.move ? p.move + offset(index, p.move_stride) : nullptr;
    const float factor = p.factor ? p.factor[offset(index, p.factor_stride)] : 1.0f, limit = p.limit ? *p.limit : 0.0f;
    for (int64_t c = 0; c < p.columns; c += PAIR) {
        const int64_t n = std::min<int64_t>(PAIR, p.columns - c);
        if (n == PAIR && !HALF) {
            out[c / PAIR] = Isa::above(static_cast<const float*>(p.x) + x + c, factor, move ? move + c : nullptr, limit);
            continue;
        }
        float values[PAIR] = {}, moves[PAIR] = {};
        if (n == PAIR)
            for (int j = 0; j < PAIR; ++j) values[j] = read(p.x, x + c + j, HALF);
        else
            for (int64_t j = 0; j < n; ++j) values[j] = read(p.x, x + c + j, HALF);
        if (move) std::memcpy(moves, move + c, n * sizeof(float));
        out[c / PAIR] = Isa::above(values, factor, move ? moves : nullptr, limit) & (n == PAIR ? ~0u : (1u << n) - 1);
    }
}

template <class Isa>
INLINE void pack_rows(const Pack& p, int64_t begin, int64_t end) {
    const int64_t words = (p.columns + 31) / 32;
    int64_t index[DIMS] = {begin / (p.size[1] * p.size[2]), begin / p.size[2] % p.size[1], begin % p.size[2]};
    for (int64_t row = begin; row < end; ++row) {
        if (p.half)
            pack_row<true, Isa>(p, index, p.out + row * words);
        else
            pack_row<false, Isa>(p, index, p.out + row * words);
        for (int d = DIMS - 1; d >= 0 && ++index[d] == p.size[d]; --d) index[d] = 0;
    }
}

template <bool HALF, class Isa>
INLINE void pack_panel(const Pack& p, int64_t panel, uint32_t* out) {  // `panel` counts [size 0][size 1][columns/16]
    const int64_t panels = (p.columns + LANES - 1) / LANES, first = panel % panels * LANES, lead = panel / panels;
    const int64_t n = std::min<int64_t>(LANES, p.columns - first), frames = p.size[2];
    const int64_t begin[DIMS] = {lead / p.size[1], lead % p.size[1], 0};
    const int64_t x_begin = offset(begin, p.x_stride) + first;
    const float* move_begin = p.move ? p.move + offset(begin, p.move_stride) + first : nullptr;
    const float limit = p.limit ? *p.limit : 0.0f;
    for (int64_t t = 0; t < frames; t += 32, out += LANES) {
        uint32_t word[LANES] = {};
        const int64_t until = std::min<int64_t>(32, frames - t);
        for (int64_t i = 0; i < until; ++i) {
            const int64_t x = x_begin + (t + i) * p.x_stride[2];
            const float* move = move_begin ? move_begin + (t + i) * p.move_stride[2] : nullptr;
            float values[LANES] = {};
            if (n == LANES) {
                for (int j = 0; j < LANES; ++j) values[j] = read(p.x, x + j, HALF);
                if (move)
                    for (int j = 0; j < LANES; ++j) values[j] += move[j];
                Isa::collect(values, limit, i, word);
            } else {
                for (int64_t j = 0; j < n; ++j)
                    word[j] |= static_cast<uint32_t>(read(p.x, x + j, HALF) + (move ? move[j] : 0.0f) > limit) << i;
            }
        }
        std::memcpy(out, word, sizeof word);
    }
}

template <class Isa>
INLINE void pack_panels(const Pack& p, int64_t begin, int64_t end) {
    const int64_t length = (p.size[2] + 31) / 32 * LANES;
    for (int64_t panel = begin; panel < end; ++panel) {
        if (p.half)
            pack_panel<true, Isa>(p, panel, p.out + panel * length);
        else
            pack_panel<false, Isa>(p, panel, p.out + panel * length);
    }
}

}  // namespace
