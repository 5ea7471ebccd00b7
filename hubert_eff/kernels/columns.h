// Bits along time, behind others along time: what a stream keeps of values, and of the inputs of convolutions.
#pragma once

#include "common.h"

namespace {

// Of `kept`, panels of `frames` frames, those from `surplus` on, then those of `more`. The same on every processor: words are moved.
struct Join {
    const uint32_t *kept, *more;  // [panels][words][16], [panels][more_words][16]; past their last frame zeros
    uint32_t* out;                // [panels][out_words][16]
    int64_t panels, frames, surplus, words, more_words, out_words;
};

// Adds 32 bits of a lane from bit `first` on, which may lie before or past them: zeros stand there.
INLINE void add_bits(const uint32_t* panel, int64_t words, int64_t first, uint32_t* out) {
    const int64_t word = first >= 0 ? first / 32 : -((31 - first) / 32), shift = first - 32 * word;
    if (word >= 0 && word < words)
        for (int i = 0; i < LANES; ++i) out[i] |= panel[word * LANES + i] >> shift;
    if (shift && word + 1 >= 0 && word + 1 < words)
        for (int i = 0; i < LANES; ++i) out[i] |= panel[(word + 1) * LANES + i] << (32 - shift);
}

inline void join_columns(const Join& p) {
    for (int64_t panel = 0; panel < p.panels; ++panel)
        for (int64_t w = 0; w < p.out_words; ++w) {
            uint32_t* out = p.out + (panel * p.out_words + w) * LANES;
            std::fill_n(out, LANES, 0u);
            add_bits(p.kept + panel * p.words * LANES, p.words, p.surplus + 32 * w, out);
            add_bits(p.more + panel * p.more_words * LANES, p.more_words, 32 * w - (p.frames - p.surplus), out);
        }
}

}  // namespace
