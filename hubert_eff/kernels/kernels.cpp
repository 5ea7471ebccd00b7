// Products of packed bits, one set of functions per instruction set in one library; ops.py calls them through ctypes and states their
// meaning in plain torch.
//
// Bits lie in 32-bit words, the first element in the lowest bit; bits past the end are 0. A left operand is rows of words, a right
// operand [N/16][words][16]: sixteen outputs side by side in a vector, so that no sum runs across its lanes. With p = popcount(a ^ b)
// the product of signs is K - 2p, and of {0, 1} times signs popcount(b) - p: an integer, exact in float32 below 2^24.
// Float arithmetic follows that of separate torch calls: no fused multiply-add (compile with -ffp-contract=off), NaN is above nothing.

// M rows, K inputs, N outputs, W words of a row

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#define AVX512BW __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define AVX512POPCNT __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq")))
#elif defined(__aarch64__)
#include <arm_neon.h>
#define NEON
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int LANES = 16, PAIR = 2 * LANES;

// Operands of a product as they lie in memory, for an instruction set whose `tile` reads them so: popcounts of R rows and P panels,
// out[R][32].
template <class Isa>
class InPlace {
  public:
    static constexpr int rows = Isa::rows, panels = 2;

    InPlace(int64_t words, int64_t) : words(words), zeros(words) {}
    INLINE void set_rows(const uint32_t* first, int64_t) { a = first; }
    INLINE void set_columns(const uint32_t* first, int count) { b = first, two = count > 1; }
    INLINE void zero_row(int32_t* out) const { run<1>(zeros.data(), out); }

    template <int R>
    INLINE void tile(int64_t row, int32_t* out) const {
        run<R>(a + row * words, out);
    }

  private:
    const int64_t words;
    const std::vector<uint32_t> zeros;
    const uint32_t *a = nullptr, *b = nullptr;
    bool two = false;

    template <int R>
    INLINE void run(const uint32_t* from, int32_t* out) const {
        if (two)
            Isa::template tile<R, 2>(from, words, b, words, out);
        else
            Isa::template tile<R, 1>(from, words, b, words, out);
    }
};

// -- instruction sets: `Operands` hold some rows and some panels, and write popcounts of tiles of them to out[panels / 2][rows][32];
// `above` compares 32 numbers x * factor + move with a limit, `at_most` 32 integers; `collect` sets bit i of each of 16 words whose number
// is above a limit ------------------------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)

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

    AVX512POPCNT static inline uint32_t above(const float* x, float factor, const float* move, float limit) {
        const __m512 f = _mm512_set1_ps(factor), t = _mm512_set1_ps(limit);
        __m512 low = _mm512_mul_ps(_mm512_loadu_ps(x), f), high = _mm512_mul_ps(_mm512_loadu_ps(x + LANES), f);
        if (move) low = _mm512_add_ps(low, _mm512_loadu_ps(move)), high = _mm512_add_ps(high, _mm512_loadu_ps(move + LANES));
        return static_cast<uint32_t>(_mm512_cmp_ps_mask(low, t, _CMP_GT_OQ)) |
               static_cast<uint32_t>(_mm512_cmp_ps_mask(high, t, _CMP_GT_OQ)) << 16;
    }

    AVX512POPCNT static inline uint32_t at_most(const int32_t* x, const int32_t* limit) {
        const uint32_t low = _mm512_cmple_epi32_mask(_mm512_loadu_si512(x), _mm512_loadu_si512(limit));
        const uint32_t high = _mm512_cmple_epi32_mask(_mm512_loadu_si512(x + LANES), _mm512_loadu_si512(limit + LANES));
        return low | high << 16;
    }

    AVX512POPCNT static inline void collect(const float* x, float limit, int64_t i, uint32_t* words) {
        const __mmask16 set = _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_set1_ps(limit), _CMP_GT_OQ);
        const __m512i old = _mm512_loadu_si512(words);
        _mm512_storeu_si512(words, _mm512_mask_or_epi32(old, set, old, _mm512_set1_epi32(static_cast<int32_t>(1u << i))));
    }
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

    AVX512BW static inline uint32_t above(const float* x, float factor, const float* move, float limit) {
        const __m512 f = _mm512_set1_ps(factor), t = _mm512_set1_ps(limit);
        __m512 low = _mm512_mul_ps(_mm512_loadu_ps(x), f), high = _mm512_mul_ps(_mm512_loadu_ps(x + LANES), f);
        if (move) low = _mm512_add_ps(low, _mm512_loadu_ps(move)), high = _mm512_add_ps(high, _mm512_loadu_ps(move + LANES));
        return static_cast<uint32_t>(_mm512_cmp_ps_mask(low, t, _CMP_GT_OQ)) |
               static_cast<uint32_t>(_mm512_cmp_ps_mask(high, t, _CMP_GT_OQ)) << 16;
    }

    AVX512BW static inline uint32_t at_most(const int32_t* x, const int32_t* limit) {
        const uint32_t low = _mm512_cmple_epi32_mask(_mm512_loadu_si512(x), _mm512_loadu_si512(limit));
        const uint32_t high = _mm512_cmple_epi32_mask(_mm512_loadu_si512(x + LANES), _mm512_loadu_si512(limit + LANES));
        return low | high << 16;
    }

    AVX512BW static inline void collect(const float* x, float limit, int64_t i, uint32_t* words) {
        const __mmask16 set = _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_set1_ps(limit), _CMP_GT_OQ);
        const __m512i old = _mm512_loadu_si512(words);
        _mm512_storeu_si512(words, _mm512_mask_or_epi32(old, set, old, _mm512_set1_epi32(static_cast<int32_t>(1u << i))));
    }
};

// Popcounts of n ^ w for four bits n of two rows and four bits w of an output, side by side in a byte: one table of sixteen w for each
// pair of n. So one shuffle gives 4 products each of two rows with 32 outputs, and nothing is left to be summed across lanes.
struct Tables {
    alignas(64) uint8_t value[256 * 16];
    constexpr Tables() : value() {
        constexpr int count[16] = {0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4};
        for (int n = 0; n < 256; ++n)
            for (int w = 0; w < 16; ++w) value[n * 16 + w] = static_cast<uint8_t>(count[(n & 15) ^ w] | count[n >> 4 ^ w] << 4);
    }
};
constexpr Tables tables;

struct Nibbles256 {
    static constexpr bool native = false;

    // Both operands by nibbles: for each pair of rows the places of their tables, for each nibble 32 or 64 outputs' bytes.
    class Operands {
      public:
        static constexpr int rows = 2, panels = 4;

        Operands(int64_t words, int64_t most_rows)
            : words(words), nibbles((8 * words + GROUP - 1) / GROUP * GROUP), places(((most_rows + 1) / 2 + 1) * nibbles),
              memory(2 * PAIR * nibbles + ALIGNED),
              bytes(reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.data()) + ALIGNED - 1) / ALIGNED * ALIGNED)) {}

        void set_rows(const uint32_t* a, int64_t count) {  // the first pair stays zero; a last single row is paired with zeros
            const std::vector<uint32_t> zeros(count % 2 ? words : 0);
            uint16_t* out = places.data();
            for (int64_t row = 0; row < count; row += 2)
                pair_up(a + row * words, row + 1 < count ? a + (row + 1) * words : zeros.data(), words, out += nibbles);
        }

        void set_columns(const uint32_t* b, int count) {
            wide = count > 2;
            const int64_t panel = words * LANES, stride = wide ? 2 * PAIR : PAIR;
            split(b, count > 1 ? b + panel : nullptr, words, bytes, stride);
            if (wide) split(b + 2 * panel, count > 3 ? b + 3 * panel : nullptr, words, bytes + PAIR, stride);
            std::memset(bytes + 8 * words * stride, 0, (nibbles - 8 * words) * stride);
        }

        void zero_row(int32_t* out) const { tile<1>(-2, out); }

        template <int R>
        void tile(int64_t row, int32_t* out) const {
            const uint16_t* place = places.data() + (row / 2 + 1) * nibbles;
            if (wide)
                counts<2>(place, bytes, nibbles, out);
            else
                counts<1>(place, bytes, nibbles, out);
        }

      private:
        static constexpr int64_t GROUP = 3, ALIGNED = 64;  // four bits hold three popcounts of four bits
        const int64_t words, nibbles;
        std::vector<uint16_t> places;
        std::vector<uint8_t> memory;
        uint8_t* const bytes;
        bool wide = false;

        AVX2 static void pair_up(const uint32_t* first, const uint32_t* second, int64_t words, uint16_t* out) {
            const __m128i low = _mm_set1_epi8(15);
            for (int64_t w = 0; w < words; w += 2) {
                const bool two = w + 1 < words;
                const __m128i a = some(first + w, two), b = some(second + w, two);
                const __m128i even = _mm_or_si128(_mm_and_si128(a, low), _mm_slli_epi16(_mm_and_si128(b, low), 4));
                const __m128i odd = _mm_or_si128(_mm_and_si128(_mm_srli_epi16(a, 4), low), _mm_andnot_si128(low, b));
                const __m256i place = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(even, odd)), 4);
                if (two)
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8 * w), place);
                else
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8 * w), _mm256_castsi256_si128(place));
            }
        }

        AVX2 static inline __m128i some(const uint32_t* words, bool two) {
            return two ? _mm_loadl_epi64(reinterpret_cast<const __m128i*>(words)) : _mm_cvtsi32_si128(static_cast<int>(*words));
        }

        // Nibbles of two panels (or of one), 32 bytes each: byte i of double word d is output 8 i + d.
        AVX2 static void split(const uint32_t* b, const uint32_t* second, int64_t words, uint8_t* out, int64_t stride) {
            const __m256i alternate = _mm256_set1_epi16(255), low = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
            for (int64_t w = 0; w < words; ++w) {
                const __m256i* left = reinterpret_cast<const __m256i*>(b + w * LANES);
                const __m256i* right = reinterpret_cast<const __m256i*>(second ? second + w * LANES : b);
                const __m256i v0 = _mm256_loadu_si256(left), v1 = _mm256_loadu_si256(left + 1);
                const __m256i v2 = second ? _mm256_loadu_si256(right) : zero, v3 = second ? _mm256_loadu_si256(right + 1) : zero;
                const __m256i even0 = _mm256_or_si256(_mm256_and_si256(v0, alternate), _mm256_slli_epi16(v1, 8));
                const __m256i even1 = _mm256_or_si256(_mm256_and_si256(v2, alternate), _mm256_slli_epi16(v3, 8));
                const __m256i odd0 = _mm256_or_si256(_mm256_srli_epi16(v0, 8), _mm256_andnot_si256(alternate, v1));
                const __m256i odd1 = _mm256_or_si256(_mm256_srli_epi16(v2, 8), _mm256_andnot_si256(alternate, v3));
                const __m256i of_byte[4] = {
                    _mm256_blend_epi16(even0, _mm256_slli_epi32(even1, 16), 0xaa),
                    _mm256_blend_epi16(odd0, _mm256_slli_epi32(odd1, 16), 0xaa),
                    _mm256_blend_epi16(_mm256_srli_epi32(even0, 16), even1, 0xaa),
                    _mm256_blend_epi16(_mm256_srli_epi32(odd0, 16), odd1, 0xaa)};
                for (int i = 0; i < 4; ++i, out += 2 * stride) {
                    _mm256_store_si256(reinterpret_cast<__m256i*>(out), _mm256_and_si256(of_byte[i], low));
                    _mm256_store_si256(reinterpret_cast<__m256i*>(out + stride), _mm256_and_si256(_mm256_srli_epi16(of_byte[i], 4), low));
                }
            }
        }

        // Sums of a pair of rows with P times 32 outputs, out[P][2][32].
        template <int P>
        AVX2 static void counts(const uint16_t* place, const uint8_t* bytes, int64_t nibbles, int32_t* out) {
            const __m256i low = _mm256_set1_epi8(15);
            for (int64_t begin = 0; begin < nibbles; begin += 63) {  // a byte holds 63 popcounts of up to 4
                const int64_t end = std::min<int64_t>(nibbles, begin + 63);
                __m256i both[P], second[P];  // modulo 256: 16 times the second row's sum, plus the first one's; the second one's
                for (int p = 0; p < P; ++p) both[p] = second[p] = _mm256_setzero_si256();
                for (int64_t i = begin; i < end; i += GROUP) {
                    __m256i group[P];
                    for (int k = 0; k < GROUP; ++k) {
                        const __m128i* table = reinterpret_cast<const __m128i*>(tables.value + place[i + k]);
                        const __m256i counted = _mm256_broadcastsi128_si256(_mm_load_si128(table));
                        for (int p = 0; p < P; ++p) {
                            const __m256i w = _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes + ((i + k) * P + p) * PAIR));
                            const __m256i count = _mm256_shuffle_epi8(counted, w);
                            group[p] = k ? _mm256_add_epi8(group[p], count) : count;
                        }
                    }
                    for (int p = 0; p < P; ++p) {
                        both[p] = _mm256_add_epi8(both[p], group[p]);
                        second[p] = _mm256_add_epi8(second[p], _mm256_and_si256(_mm256_srli_epi16(group[p], 4), low));
                    }
                }
                for (int p = 0; p < P; ++p) {
                    const __m256i sixteen = _mm256_slli_epi16(_mm256_and_si256(second[p], low), 4);
                    widen(_mm256_sub_epi8(both[p], sixteen), out + p * 2 * PAIR, begin > 0);
                    widen(second[p], out + p * 2 * PAIR + PAIR, begin > 0);
                }
            }
        }

        AVX2 static inline void widen(__m256i bytes, int32_t* out, bool add) {
            const __m256i lowest = _mm256_set1_epi32(255);
            const __m256i part[4] = {
                _mm256_and_si256(bytes, lowest), _mm256_and_si256(_mm256_srli_epi32(bytes, 8), lowest),
                _mm256_and_si256(_mm256_srli_epi32(bytes, 16), lowest), _mm256_srli_epi32(bytes, 24)};
            for (int i = 0; i < 4; ++i) {
                __m256i* place = reinterpret_cast<__m256i*>(out + 8 * i);
                _mm256_storeu_si256(place, add ? _mm256_add_epi32(_mm256_loadu_si256(place), part[i]) : part[i]);
            }
        }
    };

    AVX2 static inline uint32_t above(const float* x, float factor, const float* move, float limit) {
        const __m256 f = _mm256_set1_ps(factor), t = _mm256_set1_ps(limit);
        uint32_t word = 0;
        for (int i = 0; i < 4; ++i) {
            __m256 y = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), f);
            if (move) y = _mm256_add_ps(y, _mm256_loadu_ps(move + 8 * i));
            word |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(y, t, _CMP_GT_OQ))) << (8 * i);
        }
        return word;
    }

    AVX2 static inline uint32_t at_most(const int32_t* x, const int32_t* limit) {
        uint32_t word = 0;
        for (int i = 0; i < 4; ++i) {
            const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8 * i));
            const __m256i most = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(limit + 8 * i));
            word |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(value, most)))) << (8 * i);
        }
        return ~word;
    }

    AVX2 static inline void collect(const float* x, float limit, int64_t i, uint32_t* words) {
        const __m256i one = _mm256_set1_epi32(static_cast<int32_t>(1u << i));
        for (int h = 0; h < 2; ++h) {
            const __m256 set = _mm256_cmp_ps(_mm256_loadu_ps(x + 8 * h), _mm256_set1_ps(limit), _CMP_GT_OQ);
            __m256i* word = reinterpret_cast<__m256i*>(words + 8 * h);
            _mm256_storeu_si256(word, _mm256_or_si256(_mm256_loadu_si256(word), _mm256_and_si256(_mm256_castps_si256(set), one)));
        }
    }
};

#elif defined(__aarch64__)

struct Neon {
    using Operands = InPlace<Neon>;
    static constexpr int rows = 4;
    static constexpr bool native = false;

    template <int R, int P>
    static void tile(const uint32_t* a, int64_t stride, const uint32_t* b, int64_t words, int32_t* out) {
        for (int p = 0; p < 2 * P; ++p) half<R>(a, stride, b + (p / 2 * words) * LANES + p % 2 * 8, words, out + p * 8);
    }

    template <int R>
    static void half(const uint32_t* a, int64_t stride, const uint32_t* b, int64_t words, int32_t* out) {
        uint32x4_t sum[R][2];
        for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = vdupq_n_u32(0);
        for (int64_t begin = 0; begin < words; begin += 31) {
            const int64_t end = std::min<int64_t>(words, begin + 31);
            uint8x16_t part[R][2];
            for (int r = 0; r < R; ++r) part[r][0] = part[r][1] = vdupq_n_u8(0);
            for (int64_t w = begin; w < end; ++w)
                for (int h = 0; h < 2; ++h) {
                    const uint32x4_t column = vld1q_u32(b + w * LANES + 4 * h);
                    for (int r = 0; r < R; ++r) {
                        const uint32x4_t x = veorq_u32(vdupq_n_u32(a[r * stride + w]), column);
                        part[r][h] = vaddq_u8(part[r][h], vcntq_u8(vreinterpretq_u8_u32(x)));
                    }
                }
            for (int r = 0; r < R; ++r)
                for (int h = 0; h < 2; ++h) sum[r][h] = vpadalq_u16(sum[r][h], vpaddlq_u8(part[r][h]));
        }
        for (int r = 0; r < R; ++r)
            for (int h = 0; h < 2; ++h) vst1q_s32(out + r * PAIR + 4 * h, vreinterpretq_s32_u32(sum[r][h]));
    }

    static inline uint32_t above(const float* x, float factor, const float* move, float limit) {
        uint32_t word = 0;
        for (int i = 0; i < PAIR; ++i) word |= static_cast<uint32_t>(x[i] * factor + (move ? move[i] : 0.0f) > limit) << i;
        return word;
    }

    static inline uint32_t at_most(const int32_t* x, const int32_t* limit) {
        uint32_t word = 0;
        for (int i = 0; i < PAIR; ++i) word |= static_cast<uint32_t>(x[i] <= limit[i]) << i;
        return word;
    }

    static inline void collect(const float* x, float limit, int64_t i, uint32_t* words) {
        const uint32x4_t one = vdupq_n_u32(1u << i);
        for (int h = 0; h < 4; ++h) {
            const uint32x4_t set = vcgtq_f32(vld1q_f32(x + 4 * h), vdupq_n_f32(limit));
            vst1q_u32(words + 4 * h, vorrq_u32(vld1q_u32(words + 4 * h), vandq_u32(set, one)));
        }
    }
};

#endif

// -- what all instruction sets share; compiled once for each ----------------------------------------------------------------------------

INLINE float read(const void* x, int64_t i, bool half) {
    if (!half) return static_cast<const float*>(x)[i];
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(x)[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

constexpr int DIMS = 3;  // leading dimensions of a strided operand

struct Pack {  // rows of x * factor + move > limit
    const void* x;
    const float *move, *factor, *limit;  // each may be null: 0, 1, 0
    int64_t size[DIMS], x_stride[DIMS], move_stride[DIMS], factor_stride[DIMS], columns;
    uint32_t* out;  // rows: [size...][words]; columns: [size 0][size 1][columns/16][words of size 2][16]
    int64_t half;
};

INLINE int64_t offset(const int64_t* index, const int64_t* stride) {
    return index[0] * stride[0] + index[1] * stride[1] + index[2] * stride[2];
}

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

struct Product {
    const uint32_t *a, *b;  // [batch][M][W], [batch][N/16][W][16]
    const float *scale, *size, *bias;  // one number; N of them, or one (`sizes`); N. Each may be null: 1, 1, 0
    const int32_t* limit;  // N largest popcounts that give a bit of 1: the result is bits
    void* out;  // [batch][M][N] of float32 or bfloat16, or [batch][M][N/32] words
    int64_t batch, m, n, k, words, sizes, is_signed, half;
};

constexpr int64_t BLOCK = 64;  // rows whose words stay in cache

struct Outputs {  // of a pair of panels
    int32_t whole[PAIR], limit[PAIR];
    float factor[PAIR], bias[PAIR];

    INLINE void set(const Product& p, int64_t first, const int32_t* ones) {  // `ones`: popcounts of the right operand
        const int64_t n = std::min<int64_t>(PAIR, p.n - first);
        for (int64_t j = 0; j < n; ++j) {
            whole[j] = p.is_signed ? static_cast<int32_t>(p.k) : ones[j];
            const float size = p.size ? p.size[p.sizes == 1 ? 0 : first + j] : 1.0f;
            factor[j] = p.scale ? *p.scale * size : size;
            bias[j] = p.bias ? p.bias[first + j] : 0.0f;
            limit[j] = p.limit ? p.limit[first + j] : 0;
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
    const int32_t twice = p.is_signed ? 1 : 0;
    for (int r = 0; r < rows; ++r, count += PAIR) {
        const int64_t place = (row + r) * p.n + first;
        if (n == PAIR && !p.half) {  // straight to its place: what goes through memory first waits for it
            float* __restrict out = static_cast<float*>(p.out) + place;
            if (p.bias)
                for (int j = 0; j < PAIR; ++j) out[j] = static_cast<float>(o.whole[j] - (count[j] << twice)) * o.factor[j] + o.bias[j];
            else
                for (int j = 0; j < PAIR; ++j) out[j] = static_cast<float>(o.whole[j] - (count[j] << twice)) * o.factor[j];
            continue;
        }
        float y[PAIR];
        for (int j = 0; j < PAIR; ++j) y[j] = static_cast<float>(o.whole[j] - (count[j] << twice)) * o.factor[j];
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

template <class Isa>
INLINE void product(const Product& p, int64_t begin, int64_t end) {  // of blocks of rows, [batch][M/BLOCK]
    using Operands = typename Isa::Operands;
    constexpr int R = Operands::rows, PAIRS = Operands::panels / 2;
    const int64_t blocks = (p.m + BLOCK - 1) / BLOCK, panels = (p.n + LANES - 1) / LANES;
    Operands operands(p.words, std::min<int64_t>(p.m, BLOCK));
    int32_t count[PAIRS][R * PAIR] = {};
    for (int64_t task = begin; task < end; ++task) {
        const int64_t batch = task / blocks, from = task % blocks * BLOCK, to = std::min<int64_t>(p.m, from + BLOCK);
        operands.set_rows(p.a + (batch * p.m + from) * p.words, to - from);
        for (int64_t panel = 0; panel < panels; panel += Operands::panels) {
            const int some = static_cast<int>(std::min<int64_t>(Operands::panels, panels - panel)), pairs = (some + 1) / 2;
            operands.set_columns(p.b + (batch * panels + panel) * p.words * LANES, some);
            if (!p.is_signed && !p.limit) operands.zero_row(count[0]);
            const int64_t first = panel * LANES;
            Outputs outputs[PAIRS] = {};
            for (int i = 0; i < pairs; ++i) outputs[i].set(p, first + i * PAIR, count[i]);
            int64_t row = from;
            for (; row + R <= to; row += R) {
                operands.template tile<R>(row - from, count[0]);
                for (int i = 0; i < pairs; ++i) finish<Isa>(p, outputs[i], count[i], R, batch * p.m + row, first + i * PAIR);
            }
            for (; row < to; ++row) {
                operands.template tile<1>(row - from, count[0]);
                for (int i = 0; i < pairs; ++i) finish<Isa>(p, outputs[i], count[i], 1, batch * p.m + row, first + i * PAIR);
            }
        }
    }
}

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

// -- threads, dispatch ------------------------------------------------------------------------------------------------------------------

// Ask for large pages under a large result: on fresh memory page faults cost more than the product.
void large_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 2 << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
    if (end > begin + page) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

constexpr double WORTH = 2e5;  // work of one thread below which starting another takes longer than it saves, in vector operations

template <class Task>
void spread(void (*run)(const Task&, int64_t, int64_t), const Task& task, int64_t count, double work, int64_t threads) {
    const int64_t some = std::min<int64_t>({threads, count, static_cast<int64_t>(work / WORTH)});
    if (some <= 1) return run(task, 0, count);
    std::vector<std::thread> others;
    try {
        for (int64_t i = 1; i < some; ++i) others.emplace_back(run, std::cref(task), count * i / some, count * (i + 1) / some);
    } catch (...) {  // no more threads to be had: their shares are done here
        const int64_t started = static_cast<int64_t>(others.size());
        run(task, count * (started + 1) / some, count);
    }
    run(task, 0, count / some);
    for (std::thread& other : others) other.join();
}

struct Functions {
    void (*pack_rows)(const Pack&, int64_t, int64_t);
    void (*pack_panels)(const Pack&, int64_t, int64_t);
    void (*product)(const Product&, int64_t, int64_t);
    void (*depthwise)(const Depthwise&, int64_t, int64_t);
};

#define FUNCTIONS(NAME, ISA, TARGET)                                                                                       \
    TARGET void NAME##_rows(const Pack& p, int64_t begin, int64_t end) { pack_rows<ISA>(p, begin, end); }                   \
    TARGET void NAME##_panels(const Pack& p, int64_t begin, int64_t end) { pack_panels<ISA>(p, begin, end); }               \
    TARGET void NAME##_product(const Product& p, int64_t begin, int64_t end) { product<ISA>(p, begin, end); }               \
    TARGET void NAME##_depthwise(const Depthwise& p, int64_t begin, int64_t end) { depthwise<ISA>(p, begin, end); }         \
    constexpr Functions NAME = {NAME##_rows, NAME##_panels, NAME##_product, NAME##_depthwise};

#if defined(__x86_64__)
FUNCTIONS(avx512vpopcntdq, Popcnt512, AVX512POPCNT)
FUNCTIONS(avx512bw, Shuffle512, AVX512BW)
FUNCTIONS(avx2, Nibbles256, AVX2)
#elif defined(__aarch64__)
FUNCTIONS(neon, Neon, NEON)
#endif

const Functions* find(const char* kernel) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
    if (!std::strcmp(kernel, "avx512vpopcntdq") && wide && __builtin_cpu_supports("avx512vpopcntdq")) return &avx512vpopcntdq;
    if (!std::strcmp(kernel, "avx512bw") && wide) return &avx512bw;
    if (!std::strcmp(kernel, "avx2") && __builtin_cpu_supports("avx2")) return &avx2;
#elif defined(__aarch64__)
    if (!std::strcmp(kernel, "neon")) return &neon;
#endif
    return nullptr;
}

}  // namespace

extern "C" {

// The functions of a kernel by name; null if this processor cannot run it.
const void* hubert_eff_find(const char* kernel) { return find(kernel); }

void hubert_eff_pack(const void* functions, const Pack* p, int64_t to_panels, int64_t threads) {
    const Functions& f = *static_cast<const Functions*>(functions);
    const int64_t rows = p->size[0] * p->size[1];
    const double work = static_cast<double>(rows) * p->size[2] * p->columns / 4;
    if (to_panels)
        spread(f.pack_panels, *p, rows * ((p->columns + LANES - 1) / LANES), work, threads);
    else
        spread(f.pack_rows, *p, rows * p->size[2], work, threads);
}

void hubert_eff_product(const void* functions, const Product* p, int64_t threads) {
    if (!p->limit) large_pages(p->out, p->batch * p->m * p->n * (p->half ? 2 : 4));
    const double work = static_cast<double>(p->batch) * p->m * p->n * (3 * p->words + 4) / LANES;
    spread(static_cast<const Functions*>(functions)->product, *p, p->batch * ((p->m + BLOCK - 1) / BLOCK), work, threads);
}

void hubert_eff_depthwise(const void* functions, const Depthwise* p, int64_t threads) {
    const int64_t panels = (p->channels + LANES - 1) / LANES;
    const double work = static_cast<double>(p->batch) * p->frames * panels * 40 * ((p->kernel + 31) / 32);
    spread(static_cast<const Functions*>(functions)->depthwise, *p, p->batch * panels, work, threads);
}
}
