// AMX of Intel's server processors: products of bytes in tiles, made from the bits while they are in cache.
#pragma once

#include <memory>

#include "avx512.h"
#include "product.h"

#if defined(HUBERT_EFF_TILES)  // a header that stands in for the tile instructions where there are none: tests
#include HUBERT_EFF_TILES
#define AMX AVX512POPCNT
#elif defined(__x86_64__) && defined(__linux__) && (__has_include(<amxint8intrin.h>) || __has_include(<amxintrin.h>))
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define AMX __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx512vbmi")))
#define TILES_BEGIN(config) _tile_loadconfig(config)
#define TILES_END() _tile_release()
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, from) _tile_loadd(t, from, 64)
#define TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define TILE_MULTIPLY(sum, a, b) _tile_dpbssd(sum, a, b)
#endif

#if defined(AMX)

namespace {

#if !defined(HUBERT_EFF_TILES)
// Whether this processor has tiles of bytes and the system lets this process use them: Linux must be asked, once per process.
bool has_tiles() {
    static const bool granted = [] {
        constexpr unsigned saved = 1u << 27, tile_and_int8 = 3u << 24, tile_state = 3u << 17;
        unsigned a, b, c, d, low, high;
        if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & saved)) return false;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tile_and_int8) != tile_and_int8) return false;
        __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        if ((low & tile_state) != tile_state) return false;
        constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
        return syscall(SYS_arch_prctl, request, tile_data) == 0;
    }();
    return granted;
}
#endif

// Sixteen rows of 64 bytes: of a left operand sixteen rows with 64 inputs each; of a right one sixteen times four inputs of sixteen outputs,
// which lie side by side; or sixteen sums each of sixteen rows.
struct alignas(64) Tile {
    int8_t byte[16][64];
};

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig tile_config;

// Bytes of four weights' bits. A bit of 1 stands for -1 here, the other way round than in the product: so sums grow as popcounts do.
struct Fours {
    alignas(64) int8_t value[16][4];
    constexpr Fours() : value() {
        for (int n = 0; n < 16; ++n)
            for (int i = 0; i < 4; ++i) value[n][i] = n >> i & 1 ? -1 : 1;
    }
};
constexpr Fours fours;

struct Bytes512 {
    AVX512BW static inline void of_inputs(uint64_t bits, int8_t zero, int8_t* out) {
        _mm512_store_si512(out, _mm512_mask_blend_epi8(bits, _mm512_set1_epi8(zero), _mm512_set1_epi8(1)));
    }

    AVX512BW static inline void of_weights(const uint32_t* word, int8_t (*out)[64]) {  // one word of each of sixteen outputs
        const __m512i table = _mm512_load_si512(fours.value), bits = _mm512_loadu_si512(word);
        for (unsigned i = 0; i < 8; ++i) _mm512_store_si512(out[i], _mm512_permutexvar_epi32(_mm512_srli_epi32(bits, 4 * i), table));
    }
};

// The compiler must not keep back what tiles read: it does not know that their loads read memory.
INLINE void finish_writing() { __asm__ volatile("" ::: "memory"); }

// Operands as bytes: some rows, as many as stay in the second-level cache, and a pair of panels.
template <class Bytes>
class InTiles {
  public:
    static constexpr int rows = 2 * LANES, panels = 2;
    static constexpr bool sums = true;

    static int64_t blocks(int64_t words) { return std::max<int64_t>(1, CACHED / (32 * words) / BLOCK); }

    InTiles(int64_t words, int64_t most_rows, bool is_signed)
        : words(words), steps((words + 1) / 2), zero(is_signed ? -1 : 0), left(new Tile[(most_rows + LANES - 1) / LANES * steps]),
          right(new Tile[2 * steps]) {
        configure();
    }
    AMX ~InTiles() { TILES_END(); }
    InTiles(const InTiles&) = delete;

    int64_t inputs() const { return 64 * steps; }

    AMX void set_rows(const uint32_t* a, int64_t count) {
        for (int64_t row = 0; row < (count + LANES - 1) / LANES * LANES; ++row) {
            Tile* tile = &left[row / LANES * steps];
            for (int64_t w = 0; w < words; w += 2) {
                uint64_t bits = 0;
                if (row < count) std::memcpy(&bits, a + row * words + w, w + 1 < words ? 8 : 4);
                Bytes::of_inputs(bits, zero, tile[w / 2].byte[row % LANES]);
            }
        }
        finish_writing();
    }

    AMX void set_columns(const uint32_t* b, int count) {  // without a second panel, what was there is multiplied for nothing
        const uint32_t nothing[LANES] = {};
        for (int p = 0; p < count; ++p)
            for (int64_t w = 0; w < 2 * steps; ++w)
                Bytes::of_weights(w < words ? b + (p * words + w) * LANES : nothing, right[w / 2 * 2 + p].byte + w % 2 * 8);
        finish_writing();
    }

    void zero_row(int32_t* out) const { std::fill(out, out + PAIR, 0); }

    AMX void tile(int64_t row, int count, int32_t* out) const {
        constexpr int64_t stride = PAIR * sizeof(int32_t);
        const Tile *a = &left[row / LANES * steps], *next = a + steps, *b = right.get();
        TILE_ZERO(0);
        TILE_ZERO(1);
        if (count > LANES) {
            TILE_ZERO(2);
            TILE_ZERO(3);
            for (int64_t s = 0; s < steps; ++s, b += 2) {
                TILE_LOAD(4, a + s);
                TILE_LOAD(6, b);
                TILE_LOAD(7, b + 1);
                TILE_MULTIPLY(0, 4, 6);
                TILE_MULTIPLY(1, 4, 7);
                TILE_LOAD(5, next + s);
                TILE_MULTIPLY(2, 5, 6);
                TILE_MULTIPLY(3, 5, 7);
            }
            TILE_STORE(2, out + LANES * PAIR, stride);
            TILE_STORE(3, out + LANES * PAIR + LANES, stride);
        } else {
            for (int64_t s = 0; s < steps; ++s, b += 2) {
                TILE_LOAD(4, a + s);
                TILE_LOAD(6, b);
                TILE_LOAD(7, b + 1);
                TILE_MULTIPLY(0, 4, 6);
                TILE_MULTIPLY(1, 4, 7);
            }
        }
        TILE_STORE(0, out, stride);
        TILE_STORE(1, out + LANES, stride);
    }

  private:
    static constexpr int64_t CACHED = 1 << 20;  // bytes of rows: half of the second-level cache of such a processor
    const int64_t words, steps;
    const int8_t zero;
    const std::unique_ptr<Tile[]> left, right;  // [rows / 16][steps], [steps][2]

    AMX static void configure() { TILES_BEGIN(&tile_config); }
};

}  // namespace

#endif
