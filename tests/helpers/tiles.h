// In the place of the tile instructions of AMX, where a processor has none: one thread's eight tiles in memory, and the same sums in scalar
// code. amx.h includes this where HUBERT_EFF_TILES names it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

struct TileUnit {
    int8_t tile[8][16][64];
    bool configured = false;

    void begin(const void* config) {  // eight whole tiles, as all products use them
        const uint8_t* byte = static_cast<const uint8_t*>(config);
        bool whole = byte[0] == 1;
        for (int t = 0; t < 8; ++t) whole = whole && byte[16 + 2 * t] == 64 && byte[17 + 2 * t] == 0 && byte[48 + t] == 16;
        for (int i = 1; i < 64; ++i) whole = whole && (byte[i] == 0 || (i >= 16 && i < 32) || (i >= 48 && i < 56));
        if (!whole || configured) std::abort();
        configured = true;
    }
    void end() {
        if (!configured) std::abort();
        configured = false;
    }
    int8_t (*use(int t))[64] {
        if (!configured) std::abort();
        return tile[t];
    }
    void zero(int t) { std::memset(use(t), 0, sizeof tile[t]); }
    void load(int t, const void* from, int64_t stride) {
        for (int row = 0; row < 16; ++row) std::memcpy(use(t)[row], static_cast<const char*>(from) + row * stride, 64);
    }
    void store(int t, void* to, int64_t stride) {
        for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(to) + row * stride, use(t)[row], 64);
    }
    void multiply(int sum, int a, int b) {  // of a, sixteen rows of four bytes each for every row of b, which has four of each output
        for (int row = 0; row < 16; ++row) {
            int32_t sums[16];
            std::memcpy(sums, use(sum)[row], sizeof sums);
            for (int k = 0; k < 16; ++k)
                for (int output = 0; output < 16; ++output)
                    for (int i = 0; i < 4; ++i) sums[output] += use(a)[row][4 * k + i] * use(b)[k][4 * output + i];
            std::memcpy(use(sum)[row], sums, sizeof sums);
        }
    }
};
thread_local TileUnit tile_unit;

inline bool has_tiles() { return true; }

struct PlainBytes {  // what Bytes512 does, for a processor without AVX-512
    static inline void of_inputs(uint64_t bits, int8_t zero, int8_t* out) {
        for (int i = 0; i < 64; ++i) out[i] = bits >> i & 1 ? 1 : zero;
    }
    static inline void of_weights(const uint32_t* word, int8_t (*out)[64]) {
        for (int i = 0; i < 32; ++i)
            for (int output = 0; output < 16; ++output) out[i / 4][4 * output + i % 4] = word[output] >> i & 1 ? -1 : 1;
    }
};

}  // namespace

#define TILES_BEGIN(config) tile_unit.begin(config)
#define TILES_END() tile_unit.end()
#define TILE_ZERO(t) tile_unit.zero(t)
#define TILE_LOAD(t, from) tile_unit.load(t, from, 64)
#define TILE_STORE(t, to, stride) tile_unit.store(t, to, stride)
#define TILE_MULTIPLY(sum, a, b) tile_unit.multiply(sum, a, b)
