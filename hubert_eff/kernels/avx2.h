// AVX2: popcounts of four bits from tables.
#pragma once

#include "common.h"

#if defined(__x86_64__)

namespace {

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
        static constexpr bool sums = false;

        static int64_t blocks(int64_t) { return 1; }
        Operands(int64_t words, int64_t most_rows, bool)
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

        void zero_row(int32_t* out) const { tile(-2, rows, out); }

        void tile(int64_t row, int, int32_t* out) const {
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

    AVX2 static inline uint64_t weigh(const uint8_t* d, int64_t n, uint8_t best, const uint8_t (*bytes)[256], int64_t count) {
        const __m256i zero = _mm256_setzero_si256(), past = _mm256_set1_epi8(0x70);  // as in avx512.h
        __m256i sum[3] = {zero, zero, zero};
        for (int64_t w = 0; w * LANES < count; ++w) {
            const __m256i first = _mm256_set1_epi8(static_cast<char>(best + w * LANES));
            __m256i table[3];
            for (int b = 0; b < 3; ++b)
                table[b] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[b] + w * LANES)));
            for (int64_t j = 0; j < n; j += 32) {
                const __m256i distance = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(d + j));
                const __m256i place = _mm256_adds_epu8(_mm256_sub_epi8(distance, first), past);
                for (int b = 0; b < 3; ++b)
                    sum[b] = _mm256_add_epi64(sum[b], _mm256_sad_epu8(_mm256_shuffle_epi8(table[b], place), zero));
            }
        }
        uint64_t total = 0;
        for (int b = 0; b < 3; ++b) {
            alignas(32) uint64_t parts[4];
            _mm256_store_si256(reinterpret_cast<__m256i*>(parts), sum[b]);
            total += (parts[0] + parts[1] + parts[2] + parts[3]) << 8 * b;
        }
        return total;
    }

    AVX2 static inline uint32_t within(const uint8_t* d, uint8_t furthest) {
        const __m256i distance = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(d));
        const __m256i nearer = _mm256_min_epu8(distance, _mm256_set1_epi8(static_cast<char>(furthest)));
        return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(nearer, distance)));
    }

    AVX2 static inline void collect(const Column& c, uint32_t* words) {
        const __m256 limit = _mm256_set1_ps(c.limit);
        __m256i bits[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, one = _mm256_set1_epi32(static_cast<int32_t>(1u << c.first));
        for (int i = 0; i < c.count; ++i, one = _mm256_slli_epi32(one, 1))
            for (int h = 0; h < 2; ++h) {
                __m256 x = _mm256_loadu_ps(c.x + i * c.stride + 8 * h);
                if (c.move) x = _mm256_add_ps(x, _mm256_loadu_ps(c.move + i * c.move_stride + 8 * h));
                bits[h] = _mm256_or_si256(bits[h], _mm256_and_si256(_mm256_castps_si256(_mm256_cmp_ps(x, limit, _CMP_GT_OQ)), one));
            }
        for (int h = 0; h < 2; ++h) _mm256_storeu_si256(reinterpret_cast<__m256i*>(words) + h, bits[h]);
    }
};

}  // namespace

#endif
