// Which keys each query attends to, as quant/integer_softmax.py states it: no exp and no float per key.
#pragma once

#include "common.h"

namespace {

// The keys of a query are its block's, and those that all blocks share. With positions there is one block, and no shared keys.
struct Attention {
    const uint32_t *q, *keys, *shared;  // [batch][blocks][n][W], [batch][blocks][keys/16][W][16], [batch][shared/16][W][16]
    const uint32_t *seen, *shared_seen;  // visible keys, [batch/heads][blocks][keys/32], [batch/heads][shared/32]; null: all
    const uint32_t *p, *offsets;  // positions [batch][n][E], [heads][(2 keys - 1)/16][E][16]; null: none
    const int32_t* cost;  // of a differing bit, and of one of a position
    const float* threshold;
    uint32_t* out;  // [batch][blocks][n][keys/32 + shared/32]
    int64_t batch, heads, blocks, n, key_count, shared_count, words, inputs, position_words;
    int64_t start, window;  // the key that stands where the first query does; how far a query sees to each side, or -1
    int64_t by_query;  // whether each query has its own visible keys, [batch/heads][n][keys/32]; then there is one block
};

constexpr int64_t VECTOR = 64, GROUP = 64;  // bytes of the widest vector; queries that are worked on at a time
constexpr int64_t IN_CACHE = 1 << 18;  // bytes of their distances
constexpr uint8_t FAR = 255;  // the distance of a key that is not visible; others are at most MOST
constexpr int64_t MOST = 239;
constexpr int32_t HIDDEN = 0x7fffffff;

INLINE int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

INLINE int32_t weight(uint32_t gap) {
    uint32_t places = gap >> 16, x = gap >> 1 & 0x7fff;
    places = places < 31 ? places : 31;
    uint32_t y = 15069 - (2551 * x >> 15);
    y = 45286 - (y * x >> 15);
    y = 65535 - (y * x >> 15);
    return static_cast<int32_t>(y << 8 >> places);
}

// Weights of keys by how much further than the nearest one they are; and the same as bytes, the lowest first.
struct Weights {
    int32_t whole[256];
    alignas(64) uint8_t bytes[3][256];
    int64_t some = 0;  // those that are not zero

    INLINE void set(uint32_t cost, int64_t most) {
        for (int64_t i = 0; i < 256; ++i) {
            whole[i] = i <= most ? weight(cost * static_cast<uint32_t>(i)) : 0;
            for (int b = 0; b < 3; ++b) bytes[b][i] = static_cast<uint8_t>(whole[i] >> 8 * b);
            if (whole[i]) some = i + 1;
        }
    }
};

// What a weight must exceed.
INLINE int32_t least(uint64_t total, float threshold, int64_t visible) {
    const double share = static_cast<double>(total) * static_cast<double>(threshold) / static_cast<double>(visible);
    return share < HIDDEN ? static_cast<int32_t>(share) : HIDDEN;
}

// Distances of rows to `count` keys or offsets, out[rows][stride] bytes, with `hidden` set where it is given.
template <class Operands>
INLINE void distances(Operands& operands, const uint32_t* panels, int64_t count, int64_t words, int64_t rows, const uint8_t* hidden,
                      uint8_t* out, int64_t stride) {
    constexpr int R = Operands::rows, PAIRS = Operands::panels / 2;
    int32_t sums[PAIRS][R * PAIR] = {};
    const int64_t all = (count + LANES - 1) / LANES;
    for (int64_t panel = 0; panel < all; panel += Operands::panels) {
        const int some = static_cast<int>(std::min<int64_t>(Operands::panels, all - panel)), pairs = (some + 1) / 2;
        operands.set_columns(panels + panel * words * LANES, some);
        for (int64_t row = 0; row < rows; row += R) {
            const int last = static_cast<int>(std::min<int64_t>(R, rows - row));
            operands.tile(row, last, sums[0]);
            for (int r = 0; r < last; ++r)
                for (int i = 0; i < pairs; ++i) {
                    const int32_t* sum = sums[i] + r * PAIR;
                    const int64_t first = panel * LANES + i * PAIR;
                    uint8_t* place = out + (row + r) * stride + first;
                    if (hidden)
                        for (int j = 0; j < PAIR; ++j) place[j] = static_cast<uint8_t>(sum[j] | hidden[first + j]);
                    else
                        for (int j = 0; j < PAIR; ++j) place[j] = static_cast<uint8_t>(sum[j]);
                }
        }
    }
}

// FAR for keys that are not visible, and past the last one; returned is how many are.
INLINE int64_t hide(const uint32_t* seen, int64_t keys, uint8_t* hidden) {
    int64_t visible = 0;
    for (int64_t j = 0; j < keys; ++j) {
        const bool is_seen = !seen || (seen[j / 32] >> (j % 32) & 1);
        hidden[j] = is_seen ? 0 : FAR;
        visible += is_seen;
    }
    std::memset(hidden + keys, FAR, up(keys, VECTOR) - keys);
    return visible;
}

// Bits of a row of distances: those of the keys, then those of the shared ones.
template <class Isa>
INLINE void near_bits(const uint8_t* d, int64_t length, const Weights& weights, float threshold, int64_t most, int64_t visible,
                      int64_t split, int64_t keys_words, int64_t words, uint32_t* out) {
    uint8_t best = FAR;
    for (int64_t j = 0; j < length; ++j) best = std::min(best, d[j]);
    int64_t passing = 0;
    if (best < FAR) {
        const int64_t count = std::min<int64_t>(weights.some, most + 1 - best);
        const int32_t limit = least(Isa::weigh(d, length, best, weights.bytes, count), threshold, visible);
        int32_t above = 0;
        for (int64_t i = 0; i <= most; ++i) above += weights.whole[i] > limit;  // weights fall
        passing = above;
    }
    if (!passing) {
        std::memset(out, 0, words * sizeof *out);
        return;
    }
    const uint8_t furthest = static_cast<uint8_t>(std::min<int64_t>(best + passing - 1, most));
    for (int64_t w = 0; w < words; ++w) out[w] = Isa::within(d + (w < keys_words ? w * PAIR : split + (w - keys_words) * PAIR), furthest);
}

// The same with positions, whose distances are `r`.
template <class Isa>
INLINE void cheap_bits(const uint8_t* __restrict d, const uint8_t* __restrict r, int64_t length, const int32_t* cost, float threshold,
                       int64_t visible, int64_t words, int32_t* __restrict costs, uint32_t* out) {
    const uint32_t of_key = static_cast<uint32_t>(cost[0]), of_place = static_cast<uint32_t>(cost[1]);
    for (int64_t j = 0; j < length; ++j) {
        const uint32_t sum = of_key * d[j] + of_place * r[j];
        costs[j] = d[j] == FAR ? HIDDEN : static_cast<int32_t>(sum);
    }
    int32_t best = HIDDEN;
    for (int64_t j = 0; j < length; ++j) best = costs[j] < best ? costs[j] : best;
    for (int64_t j = 0; j < length; ++j) costs[j] = weight(static_cast<uint32_t>(costs[j]) - static_cast<uint32_t>(best));
    uint64_t total = 0;
    for (int64_t j = 0; j < length; j += VECTOR) {  // 64 weights fit into 32 bits
        uint32_t part = 0;
        for (int64_t i = 0; i < VECTOR; ++i) part += static_cast<uint32_t>(costs[j + i]);
        total += part;
    }
    int32_t limit[PAIR];
    std::fill_n(limit, PAIR, best == HIDDEN ? HIDDEN : least(total, threshold, visible));
    for (int64_t w = 0; w < words; ++w) out[w] = ~Isa::at_most(costs + w * PAIR, limit);
}

// Queries that are worked on at a time, and how many such groups a block has.
INLINE int64_t attention_group(const Attention& p) {
    const int64_t length = up(p.key_count, VECTOR) + up(p.shared_count, VECTOR);
    return std::min(p.n, std::max<int64_t>(8, std::min(GROUP, IN_CACHE / std::max(length, VECTOR))));
}

INLINE int64_t attention_groups(const Attention& p) { return (p.n + attention_group(p) - 1) / attention_group(p); }

// FAR for the keys of one query that are not visible; returned is how many are.
INLINE int64_t hide_row(const uint32_t* seen, int64_t keys, uint8_t* row) {
    int64_t visible = 0;
    for (int64_t j = 0; j < keys; ++j) {
        const uint32_t is_seen = seen[j / 32] >> (j % 32) & 1;
        row[j] |= static_cast<uint8_t>(is_seen - 1);
        visible += is_seen;
    }
    return visible;
}

template <class Isa>
INLINE void attention(const Attention& p, int64_t begin, int64_t end) {  // of [batch][blocks][groups of queries]
    using Operands = typename Isa::Operands;
    const int64_t split = up(p.key_count, VECTOR), length = split + up(p.shared_count, VECTOR);
    const int64_t key_panels = (p.key_count + LANES - 1) / LANES, shared_panels = (p.shared_count + LANES - 1) / LANES;
    const int64_t key_words = (p.key_count + 31) / 32, shared_words = (p.shared_count + 31) / 32, words = key_words + shared_words;
    const int64_t group = attention_group(p), groups = attention_groups(p);
    const int64_t offset_panels = (2 * p.key_count - 1 + LANES - 1) / LANES, span = p.p ? up(length + group + LANES, VECTOR) : 0;
    Operands operands(p.words, group, true), positions(p.p ? p.position_words : 1, p.p ? group : 1, true);
    std::vector<uint8_t> hidden(length), d(group * length, FAR), r(group * span);
    std::vector<int32_t> costs(p.p ? length : 0);
    Weights weights;
    if (!p.p) weights.set(static_cast<uint32_t>(*p.cost), p.inputs);
    int64_t visible = 0, hidden_of = -1;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task / groups, batch = block / p.blocks, row = batch / p.heads;  // `block` counts [batch][blocks]
        const int64_t from = task % groups * group, rows = std::min<int64_t>(p.n, from + group) - from;
        if (hidden_of != row * p.blocks + block % p.blocks) {
            hidden_of = row * p.blocks + block % p.blocks;
            visible = hide(p.seen && !p.by_query ? p.seen + hidden_of * key_words : nullptr, p.key_count, hidden.data());
            visible += hide(p.shared_seen ? p.shared_seen + row * shared_words : nullptr, p.shared_count, hidden.data() + split);
        }
        operands.set_rows(p.q + (block * p.n + from) * p.words, rows);
        distances(operands, p.keys + block * key_panels * p.words * LANES, p.key_count, p.words, rows, hidden.data(), d.data(), length);
        if (p.shared_count)
            distances(operands, p.shared + batch * shared_panels * p.words * LANES, p.shared_count, p.words, rows, hidden.data() + split,
                      d.data() + split, length);
        int64_t first = 0;  // offset that r begins with
        if (p.p) {
            const int64_t furthest = p.key_count - 1 - (p.start + from + rows - 1), panel = furthest / LANES;
            first = panel * LANES;
            const int64_t count = std::min<int64_t>(p.key_count + furthest - first + rows - 1, 2 * p.key_count - 1 - first);
            positions.set_rows(p.p + (block * p.n + from) * p.position_words, rows);
            const uint32_t* table = p.offsets + (batch % p.heads * offset_panels + panel) * p.position_words * LANES;
            distances(positions, table, count, p.position_words, rows, nullptr, r.data(), span);
        }
        for (int64_t i = 0; i < rows; ++i) {
            uint8_t* of_row = d.data() + i * length;
            uint32_t* out = p.out + (block * p.n + from + i) * words;
            const int64_t place = p.start + from + i;
            int64_t row_visible = visible;
            if (p.by_query) row_visible = hide_row(p.seen + (row * p.n + from + i) * key_words, p.key_count, of_row);
            if (p.window >= 0) {
                const int64_t left = std::min(std::max<int64_t>(0, place - p.window), split), right = std::min(place + p.window + 1, split);
                std::memset(of_row, FAR, left);
                if (right < split) std::memset(of_row + std::max<int64_t>(0, right), FAR, split - std::max<int64_t>(0, right));
                row_visible = 0;
                for (int64_t j = 0; j < length; ++j) row_visible += of_row[j] != FAR;
            }
            const uint8_t* of_places = p.p ? r.data() + i * span + (p.key_count - 1 - place - first) : nullptr;
            if (p.p)
                cheap_bits<Isa>(of_row, of_places, length, p.cost, *p.threshold, row_visible, words, costs.data(), out);
            else
                near_bits<Isa>(of_row, length, weights, *p.threshold, p.inputs, row_visible, split, key_words, words, out);
        }
    }
}

}  // namespace
