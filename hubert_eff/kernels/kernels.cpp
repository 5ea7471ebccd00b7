// Products of packed bits, one set of functions per instruction set in one library; ops.py calls them through ctypes and states their
// meaning in plain torch.
//
// Bits lie in 32-bit words, the first element in the lowest bit; bits past the end are 0. A left operand is rows of words, a right
// operand [N/16][words][16]: sixteen outputs side by side in a vector, so that no sum runs across its lanes. With p = popcount(a ^ b)
// the product of signs is K - 2p, and of {0, 1} times signs popcount(b) - p: an integer, exact in float32 below 2^24.
// Float arithmetic follows that of separate torch calls: no fused multiply-add (compile with -ffp-contract=off), NaN is above nothing.

// M rows, K inputs, N outputs, W words of a row

#include <functional>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "amx.h"
#include "attention.h"
#include "avx2.h"
#include "avx512.h"
#include "columns.h"
#include "common.h"
#include "depthwise.h"
#include "neon.h"
#include "pack.h"
#include "product.h"

namespace {

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
    void (*attention)(const Attention&, int64_t, int64_t);
};

#define FUNCTIONS(NAME, ISA, TARGET)                                                                                       \
    TARGET void NAME##_rows(const Pack& p, int64_t begin, int64_t end) { pack_rows<ISA>(p, begin, end); }                   \
    TARGET void NAME##_panels(const Pack& p, int64_t begin, int64_t end) { pack_panels<ISA>(p, begin, end); }               \
    TARGET void NAME##_product(const Product& p, int64_t begin, int64_t end) { product<ISA>(p, begin, end); }               \
    TARGET void NAME##_depthwise(const Depthwise& p, int64_t begin, int64_t end) { depthwise<ISA>(p, begin, end); }         \
    TARGET void NAME##_attention(const Attention& p, int64_t begin, int64_t end) { attention<ISA>(p, begin, end); }         \
    constexpr Functions NAME = {NAME##_rows, NAME##_panels, NAME##_product, NAME##_depthwise, NAME##_attention};

#if defined(__x86_64__)
FUNCTIONS(avx512vpopcntdq, Popcnt512, AVX512POPCNT)
FUNCTIONS(avx512bw, Shuffle512, AVX512BW)
FUNCTIONS(avx2, Nibbles256, AVX2)
#elif defined(__aarch64__)
FUNCTIONS(neon, Neon, NEON)
#endif

#if defined(AMX)
constexpr Functions with_product(Functions functions, decltype(Functions::product) product) {
    functions.product = product;
    return functions;
}

AMX void amx_product(const Product& p, int64_t begin, int64_t end) { product<Popcnt512, InTiles<Bytes512>>(p, begin, end); }
constexpr Functions amx = with_product(avx512vpopcntdq, amx_product);  // all such processors have its instructions
#endif
#if defined(HUBERT_EFF_TILES)
AVX2 void amx_plain_product(const Product& p, int64_t begin, int64_t end) { product<Nibbles256, InTiles<PlainBytes>>(p, begin, end); }
constexpr Functions amx_plain = with_product(avx2, amx_plain_product);
#endif

const Functions* find(const char* kernel) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
    const bool counts = wide && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512vbmi");
#if defined(AMX)
    if (!std::strcmp(kernel, "amx") && counts && has_tiles()) return &amx;
#endif
#if defined(HUBERT_EFF_TILES)
    if (!std::strcmp(kernel, "amx") && __builtin_cpu_supports("avx2")) return &amx_plain;
#endif
    if (!std::strcmp(kernel, "avx512vpopcntdq") && counts) return &avx512vpopcntdq;
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

void hubert_eff_join_columns(const Join* p) { join_columns(*p); }

void hubert_eff_attention(const void* functions, const Attention* p, int64_t threads) {
    const int64_t keys = p->key_count + p->shared_count, words = p->words + (p->p ? p->position_words + 8 : 0);
    const double work = static_cast<double>(p->batch) * p->blocks * p->n * keys * (3 * words + 8) / LANES;
    spread(static_cast<const Functions*>(functions)->attention, *p, p->batch * p->blocks * attention_groups(*p), work, threads);
}
}
