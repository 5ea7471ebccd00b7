// Products of rows with panels, and what follows the sums: scales, biases, bfloat16, or bits.
#pragma once

#include "common.h"

namespace {

struct Product {
    const uint32_t *a, *b;  // [batch][M][W], [batch][N/16][W][16]
    const float *scale, *size, *bias;  // one number; N of them, or one (`sizes`); N. Each may be null: 1, 1, 0
    const int32_t* limit;  // N largest popcounts that give a bit of 1: the result is bits
    void* out;  // [batch][M][N] of float32 or bfloat16, or [batch][M][N/32] words
    int64_t batch, m, n, k, words, sizes, is_signed, half;
};

struct Outputs {  // of a pair of panels: the integer is whole - (count << shift), its bit count <= limit
    int32_t whole[PAIR], limit[PAIR], shift;
    float factor[PAIR], bias[PAIR];

    INLINE void set(const Product& p, int64_t first, const int32_t* ones) {  // `ones`: popcounts of the right operand
        const int64_t n = std::min<int64_t>(PAIR, p.n - first);
        shift = p.is_signed ? 1 : 0;
        for (int64_t j = 0; j < n; ++j) {
            whole[j] = p.is_signed ? static_cast<int32_t>(p.k) : ones[j];
            const float size = p.size ? p.size[p.sizes == 1 ? 0 : first + j] : 1.0f;
            factor[j] = p.scale ? *p.scale * size : size;
            bias[j] = p.bias ? p.bias[first + j] : 0.0f;
            limit[j] = p.limit ? p.limit[first + j] : 0;
        }
    }

    INLINE float integer(int32_t count, int j) const {  // in unsigned numbers, which may be shifted whatever they are
        return static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(whole[j]) - (static_cast<uint32_t>(count) << shift)));
    }

    INLINE void restate(const Product& p, int32_t inputs) {  // for counts that are sums: 2 popcount - inputs, or of inputs of 0 and 1
        shift = 0;
        for (int j = 0; j < PAIR; ++j) {
            limit[j] = 2 * limit[j] - inputs;
            whole[j] = p.is_signed ? whole[j] - inputs : 0;
        }
    }
};

template <class Isa>
INLINE void finish(const Product& p, const Outputs& o, const int32_t* count, int rows, int64_t row, int64_t first) {
    const int64_t n = std::min<int64_t>(PAIR, p.n - first);
    if (p.limit) {
        uint32_t* out = static_cast<uint32_t*>(p.out);
        const uint32_t mask = n == PAIR ? ~0u : (1u << n) - 1;
        for (int r = 0; r < rows; ++r) out[(row + r) * ((p.n + 31) / 32) + first / 32] = Isa::at_most(count + r * PAIR, o.limit) & mask;
        return;
    }
    for (int r = 0; r < rows; ++r, count += PAIR) {
        const int64_t place = (row + r) * p.n + first;
        if (n == PAIR && !p.half) {  // straight to its place: what goes through memory first waits for it
            float* __restrict out = static_cast<float*>(p.out) + place;
            if (p.bias)
                for (int j = 0; j < PAIR; ++j) out[j] = o.integer(count[j], j) * o.factor[j] + o.bias[j];
            else
                for (int j = 0; j < PAIR; ++j) out[j] = o.integer(count[j], j) * o.factor[j];
            continue;
        }
        float y[PAIR];
        for (int j = 0; j < PAIR; ++j) y[j] = o.integer(count[j], j) * o.factor[j];
        if (p.bias)
            for (int j = 0; j < PAIR; ++j) y[j] += o.bias[j];
        if (p.half) {
            uint16_t* out = static_cast<uint16_t*>(p.out) + place;
            if (n == PAIR)
                for (int j = 0; j < PAIR; ++j) out[j] = to_bfloat16(y[j]);
            else
                for (int64_t j = 0; j < n; ++j) out[j] = to_bfloat16(y[j]);
        } else {
            float* out = static_cast<float*>(p.out) + place;
            for (int64_t j = 0; j < n; ++j) out[j] = y[j];
        }
    }
}

INLINE void prefetch(const Product& p, int rows, int pairs, int64_t row, int64_t first) {
    if (p.limit) return;
    const int64_t size = p.half ? 2 : 4, length = std::min<int64_t>(pairs * PAIR, p.n - first) * size;
    const char* place = static_cast<const char*>(p.out) + (row * p.n + first) * size;
    for (int r = 0; r < rows; ++r, place += p.n * size)
        for (int64_t i = 0; i < length; i += 64) __builtin_prefetch(place + i, 1);
}

template <class Isa, class Operands = typename Isa::Operands>
INLINE void product(const Product& p, int64_t begin, int64_t end) {  // of blocks of rows, [batch][M/BLOCK]
    constexpr int R = Operands::rows, PAIRS = Operands::panels / 2;
    const int64_t blocks = (p.m + BLOCK - 1) / BLOCK, panels = (p.n + LANES - 1) / LANES, most = Operands::blocks(p.words);
    Operands operands(p.words, std::min<int64_t>(p.m, most * BLOCK), p.is_signed || p.limit);
    alignas(64) int32_t count[PAIRS][R * PAIR] = {};
    for (int64_t task = begin, some = 0; task < end; task += some) {
        some = std::min<int64_t>({most, end - task, blocks - task % blocks});
        const int64_t batch = task / blocks, from = task % blocks * BLOCK, to = std::min<int64_t>(p.m, from + some * BLOCK);
        operands.set_rows(p.a + (batch * p.m + from) * p.words, to - from);
        for (int64_t panel = 0; panel < panels; panel += Operands::panels) {
            const int side = static_cast<int>(std::min<int64_t>(Operands::panels, panels - panel)), pairs = (side + 1) / 2;
            operands.set_columns(p.b + (batch * panels + panel) * p.words * LANES, side);
            if (!p.is_signed && !p.limit) operands.zero_row(count[0]);
            const int64_t first = panel * LANES;
            Outputs outputs[PAIRS] = {};
            for (int i = 0; i < pairs; ++i) {
                outputs[i].set(p, first + i * PAIR, count[i]);
                if constexpr (Operands::sums) outputs[i].restate(p, static_cast<int32_t>(operands.inputs()));
            }
            for (int64_t row = from; row < to; row += R) {
                const int rows = static_cast<int>(std::min<int64_t>(R, to - row));
                prefetch(p, rows, pairs, batch * p.m + row, first);
                operands.tile(row - from, rows, count[0]);
                for (int i = 0; i < pairs; ++i) finish<Isa>(p, outputs[i], count[i], rows, batch * p.m + row, first + i * PAIR);
            }
        }
    }
}

}  // namespace
