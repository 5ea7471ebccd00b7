// Floats to bits: along rows, or along time into panels.
#pragma once

#include "common.h"

namespace {

struct Pack {  // rows of x * factor + move > limit
    const void* x;
    const float *move, *factor, *limit;  // each may be null: 0, 1, 0
    int64_t size[DIMS], x_stride[DIMS], move_stride[DIMS], factor_stride[DIMS], columns;
    uint32_t* out;  // rows: [size...][words]; columns: [size 0][size 1][columns/16][words][16]
    int64_t half, before, words;  // of columns: bits of 0 in front of those of size 2, and words in all
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
    const bool in_place = !HALF && n == LANES;
    float values[32 * LANES] = {}, moves[32 * LANES] = {};  // of frames that are not floats side by side
    for (int64_t word = 0; word < p.words; ++word, out += LANES) {
        const int64_t from = std::max<int64_t>(32 * word, p.before), until = std::min<int64_t>(32 * (word + 1), p.before + frames);
        if (from >= until) {
            std::fill_n(out, LANES, 0u);
            continue;
        }
        const int64_t t = from - p.before, x = x_begin + t * p.x_stride[2];
        const float* move = move_begin ? move_begin + t * p.move_stride[2] : nullptr;
        Column column = {static_cast<const float*>(p.x) + x, move, p.x_stride[2], p.move_stride[2], static_cast<int>(from % 32),
                         static_cast<int>(until - from), p.limit ? *p.limit : 0.0f};
        if (!in_place) {
            for (int i = 0; i < column.count; ++i)
                for (int64_t j = 0; j < n; ++j) {
                    values[i * LANES + j] = read(p.x, x + i * p.x_stride[2] + j, HALF);
                    if (move) moves[i * LANES + j] = move[i * p.move_stride[2] + j];
                }
            column.x = values, column.move = move ? moves : nullptr, column.stride = column.move_stride = LANES;
        }
        Isa::collect(column, out);
        for (int64_t j = n; j < LANES; ++j) out[j] = 0;
    }
}

template <class Isa>
INLINE void pack_panels(const Pack& p, int64_t begin, int64_t end) {
    const int64_t length = p.words * LANES;
    for (int64_t panel = begin; panel < end; ++panel) {
        if (p.half)
            pack_panel<true, Isa>(p, panel, p.out + panel * length);
        else
            pack_panel<false, Isa>(p, panel, p.out + panel * length);
    }
}

}  // namespace
