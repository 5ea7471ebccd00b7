// Random shapes through every kernel, compared with scalar code; to be built with sanitizers (test_runtime.py).

#include <cstdio>
#include <cstdlib>
#include <random>

#include "kernels.cpp"

namespace {

std::mt19937 draw(0);

int64_t number(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(draw); }

template <class T>
struct Exact {  // an allocation of exactly so many elements
    T* data;
    int64_t size;
    explicit Exact(int64_t n) : data(static_cast<T*>(std::malloc(n * sizeof(T) + (n == 0)))), size(n) {}
    ~Exact() { std::free(data); }
    Exact(const Exact&) = delete;
};

void fill(Exact<float>& x) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < x.size; ++i) x.data[i] = normal(draw);
}

void expect(bool holds, const char* kernel, const char* what) {
    if (holds) return;
    std::printf("%s: %s differs\n", kernel, what);
    std::exit(1);
}

bool bit(const uint32_t* words, int64_t i) { return words[i / 32] >> (i % 32) & 1; }

void one(const char* name, const void* kernel) {
    const int64_t batch = number(1, 3), m = number(1, 80), n = number(1, 70), k = number(1, number(0, 9) ? 150 : 1500);
    const int64_t words = (k + 31) / 32, panels = (n + 15) / 16, threads = number(1, 3);
    Exact<float> x(batch * m * k), move(k), limit(1), scale(1), size(n), bias(n);
    for (Exact<float>* values : {&x, &move, &limit, &scale, &size, &bias}) fill(*values);
    const int64_t before = number(0, 1) ? number(0, 40) : 0, all = before + m + (before ? number(0, 40) : 0), column_words = (all + 31) / 32;
    Exact<uint32_t> a(batch * m * words), b(batch * panels * words * 16), columns(batch * ((k + 15) / 16) * column_words * 16);

    Pack pack = {};
    pack.x = x.data, pack.move = move.data, pack.limit = limit.data, pack.columns = k;
    pack.size[0] = 1, pack.size[1] = batch, pack.size[2] = m, pack.x_stride[1] = m * k, pack.x_stride[2] = k;
    pack.out = a.data;
    hubert_eff_pack(kernel, &pack, 0, threads);
    pack.out = columns.data, pack.before = before, pack.words = column_words;
    hubert_eff_pack(kernel, &pack, 1, threads);
    for (int64_t i = 0; i < batch; ++i)
        for (int64_t place = 0; place < 32 * column_words; ++place)
            for (int64_t c = 0; c < (k + 15) / 16 * 16; ++c) {
                const int64_t t = place - before, panel = i * ((k + 15) / 16) + c / 16;
                const bool real = t >= 0 && t < m && c < k, above = real && x.data[(i * m + t) * k + c] + move.data[c] > *limit.data;
                if (real) expect(bit(a.data + (i * m + t) * words, c) == above, name, "packing of rows");
                const uint32_t word = columns.data[(panel * column_words + place / 32) * 16 + c % 16];
                expect((word >> (place % 32) & 1) == above, name, "packing of columns");
            }

    for (int64_t i = 0; i < b.size; ++i) b.data[i] = 0;
    for (int64_t i = 0; i < batch * n * k; ++i) {
        const int64_t batch_of = i / (n * k), output = i / k % n, input = i % k;
        const uint32_t value = static_cast<uint32_t>(number(0, 1)) << (input % 32);
        b.data[((batch_of * panels + output / 16) * words + input / 32) * 16 + output % 16] |= value;
    }
    Exact<int32_t> limits(n);
    for (int64_t i = 0; i < n; ++i) limits.data[i] = static_cast<int32_t>(number(0, k));
    Exact<float> y(batch * m * n);
    Exact<uint32_t> bits(batch * m * ((n + 31) / 32));
    Product product = {};
    product.a = a.data, product.b = b.data, product.scale = scale.data, product.size = size.data, product.bias = bias.data;
    product.out = y.data, product.batch = batch, product.m = m, product.n = n, product.k = k, product.words = words, product.sizes = n;
    product.is_signed = number(0, 1);
    hubert_eff_product(kernel, &product, threads);
    Product to_bits = product;
    to_bits.limit = limits.data, to_bits.out = bits.data;
    hubert_eff_product(kernel, &to_bits, threads);
    for (int64_t i = 0; i < batch * m; ++i)
        for (int64_t o = 0; o < n; ++o) {
            int64_t sum = 0, differ = 0;
            for (int64_t c = 0; c < k; ++c) {
                const bool left = bit(a.data + i * words, c);
                const bool right = b.data[((i / m * panels + o / 16) * words + c / 32) * 16 + o % 16] >> (c % 32) & 1;
                sum += (left ? 1 : product.is_signed ? -1 : 0) * (right ? 1 : -1);
                differ += left != right;
            }
            const float factor = *scale.data * size.data[o];
            const float scaled = static_cast<float>(sum) * factor;
            expect(y.data[i * n + o] == scaled + bias.data[o], name, "product");
            expect(bit(bits.data + i * ((n + 31) / 32), o) == (differ <= limits.data[o]), name, "product of bits");
        }

    const int64_t width = number(1, 70), stride = number(1, 3), taps = (width + 31) / 32, frames = (m + stride - 1) / stride;
    Exact<uint32_t> valid(batch * column_words), filter((k + 15) / 16 * taps * 16);
    for (int64_t i = 0; i < valid.size; ++i) valid.data[i] = draw();
    for (int64_t i = 0; i < filter.size; ++i) filter.data[i] = draw();
    Exact<float> z(batch * frames * k);
    Depthwise depthwise = {};
    depthwise.x = columns.data, depthwise.valid = number(0, 1) ? valid.data : nullptr, depthwise.weight = filter.data, depthwise.out = z.data;
    depthwise.batch = batch, depthwise.frames = frames, depthwise.channels = k, depthwise.words = column_words;
    depthwise.kernel = width, depthwise.stride = stride, depthwise.sizes = 1, depthwise.is_signed = product.is_signed;
    depthwise.begin = number(0, 32 * column_words), depthwise.end = number(depthwise.begin, 32 * column_words);
    hubert_eff_depthwise(kernel, &depthwise, threads);
    for (int64_t i = 0; i < batch * frames * k; ++i) {
        const int64_t c = i % k, t = i / k % frames, of = i / (k * frames);
        int64_t sum = 0;
        for (int64_t j = 0; j < width && t * stride + j < depthwise.words * 32; ++j) {
            const int64_t at = t * stride + j, panel = of * ((k + 15) / 16) + c / 16;
            const bool counts = at >= depthwise.begin && at < depthwise.end;
            if (depthwise.valid ? !bit(valid.data + of * depthwise.words, at) : !counts) continue;
            const bool left = columns.data[(panel * depthwise.words + at / 32) * 16 + c % 16] >> (at % 32) & 1;
            const bool right = filter.data[(c / 16 * taps + j / 32) * 16 + c % 16] >> (j % 32) & 1;
            sum += (left ? 1 : depthwise.is_signed ? -1 : 0) * (right ? 1 : -1);
        }
        expect(z.data[i] == static_cast<float>(sum), name, "depthwise convolution");
    }
}

// A row of bits from random words, the rest of the last word 0.
void words(Exact<uint32_t>& x, int64_t rows, int64_t inputs) {
    const int64_t count = (inputs + 31) / 32;
    const uint32_t last = inputs % 32 == 0 ? ~0u : (1u << inputs % 32) - 1;
    for (int64_t i = 0; i < rows * count; ++i) x.data[i] = static_cast<uint32_t>(draw()) & (i % count < count - 1 ? ~0u : last);
}

// The same as panels of sixteen rows.
void panels(const Exact<uint32_t>& rows, Exact<uint32_t>& out, int64_t lead, int64_t n, int64_t count) {
    for (int64_t i = 0; i < out.size; ++i) out.data[i] = 0;
    for (int64_t l = 0; l < lead; ++l)
        for (int64_t i = 0; i < n; ++i)
            for (int64_t w = 0; w < count; ++w)
                out.data[((l * ((n + 15) / 16) + i / 16) * count + w) * 16 + i % 16] = rows.data[(l * n + i) * count + w];
}

int64_t apart(const uint32_t* a, const uint32_t* b, int64_t count) {
    int64_t sum = 0;
    for (int64_t w = 0; w < count; ++w) sum += __builtin_popcount(a[w] ^ b[w]);
    return sum;
}

int64_t integer_weight(int64_t gap) {
    const int64_t x = gap / 2 % 32768, y = 45286 - ((15069 - 2551 * x / 32768) * x / 32768), places = gap / 65536;
    return places > 31 ? 0 : (65535 - y * x / 32768) * 256 / (int64_t{1} << places);
}

void attend(const char* name, const void* kernel) {
    const bool relative = number(0, 1), shared = !relative && number(0, 1);
    const int64_t heads = number(1, 2), batch = heads * number(1, 2), blocks = shared ? number(1, 3) : 1;
    const int64_t keys = number(shared ? 0 : 1, number(0, 9) ? 90 : 700), others = shared ? number(0, 90) : 0;
    const int64_t n = number(1, relative ? std::min<int64_t>(keys, 80) : 80);
    const int64_t inputs = number(1, number(0, 3) ? 70 : 239), places = number(1, 40);
    const int64_t count = (inputs + 31) / 32, position_count = (places + 31) / 32;
    const int64_t key_words = (keys + 31) / 32, other_words = (others + 31) / 32;
    Exact<uint32_t> q(batch * blocks * n * count), k(batch * blocks * keys * count), far(batch * others * count);
    Exact<uint32_t> p(batch * n * position_count), r(heads * std::max<int64_t>(0, 2 * keys - 1) * position_count);
    words(q, batch * blocks * n, inputs), words(k, batch * blocks * keys, inputs), words(far, batch * others, inputs);
    words(p, batch * n, places);
    if (keys) words(r, heads * (2 * keys - 1), places);
    Exact<uint32_t> key_panels(batch * blocks * ((keys + 15) / 16) * count * 16), far_panels(batch * ((others + 15) / 16) * count * 16);
    Exact<uint32_t> offset_panels(relative ? heads * ((2 * keys + 14) / 16) * position_count * 16 : 0);
    panels(k, key_panels, batch * blocks, keys, count), panels(far, far_panels, batch, others, count);
    if (relative) panels(r, offset_panels, heads, 2 * keys - 1, position_count);
    const bool masked = number(0, 1), by_query = masked && !shared && number(0, 1);
    Exact<uint32_t> seen(batch / heads * (by_query ? n : blocks) * key_words), far_seen(batch / heads * other_words);
    const uint32_t none = number(0, 5) ? ~0u : 0u;
    for (int64_t i = 0; i < seen.size; ++i) seen.data[i] = draw() & none;
    for (int64_t i = 0; i < far_seen.size; ++i) far_seen.data[i] = draw() & none;
    Exact<int32_t> cost(2);
    for (int i = 0; i < 2; ++i) cost.data[i] = static_cast<int32_t>(number(0, number(0, 3) ? 40000 : 30 << 16));
    Exact<float> threshold(1);
    *threshold.data = static_cast<float>(number(1, 300)) / 100;
    Exact<uint32_t> out(batch * blocks * n * (key_words + other_words));
    Attention task = {};
    task.by_query = by_query;
    task.q = q.data, task.keys = key_panels.data, task.shared = shared ? far_panels.data : nullptr;
    task.seen = masked ? seen.data : nullptr, task.shared_seen = masked ? far_seen.data : nullptr;
    task.p = relative ? p.data : nullptr, task.offsets = relative ? offset_panels.data : nullptr;
    task.cost = cost.data, task.threshold = threshold.data, task.out = out.data;
    task.batch = batch, task.heads = heads, task.blocks = blocks;
    task.n = n, task.key_count = keys, task.shared_count = others, task.words = count, task.inputs = inputs;
    task.position_words = position_count, task.start = relative ? number(0, keys - n) : number(0, 20);
    task.window = relative || shared || number(0, 1) ? -1 : number(0, 30);
    hubert_eff_attention(kernel, &task, number(1, 3));
    std::vector<int64_t> costs(keys + others);
    for (int64_t row = 0; row < batch * blocks * n; ++row) {
        const int64_t block = row / n, b = block / blocks, place = task.start + row % n;
        int64_t best = -1, visible = 0, total = 0;
        for (int64_t j = 0; j < keys + others; ++j) {
            const bool own = j < keys;
            const int64_t of = b / heads, of_mask = by_query ? of * n + row % n : of * blocks + block % blocks;
            const uint32_t* mask = own ? seen.data + of_mask * key_words : far_seen.data + of * other_words;
            const uint32_t* key = own ? k.data + (block * keys + j) * count : far.data + (b * others + j - keys) * count;
            costs[j] = -1;
            if ((masked && !bit(mask, own ? j : j - keys)) || (task.window >= 0 && std::abs(place - j) > task.window)) continue;
            costs[j] = cost.data[0] * apart(q.data + row * count, key, count);
            if (relative) {
                const uint32_t* offset = r.data + (b % heads * (2 * keys - 1) + keys - 1 - place + j) * position_count;
                costs[j] += cost.data[1] * apart(p.data + row * position_count, offset, position_count);
            }
            best = best < 0 ? costs[j] : std::min(best, costs[j]), ++visible;
        }
        for (const int64_t c : costs) total += c < 0 ? 0 : integer_weight(c - best);
        const double above_mean = static_cast<double>(total) * static_cast<double>(*threshold.data);
        const double share = visible ? above_mean / static_cast<double>(visible) : 0;
        for (int64_t j = 0; j < keys + others; ++j) {
            const bool above = costs[j] >= 0 && integer_weight(costs[j] - best) > static_cast<int64_t>(share);
            const uint32_t* found = out.data + row * (key_words + other_words);
            expect(bit(j < keys ? found : found + key_words, j < keys ? j : j - keys) == above, name, "attention");
        }
        const uint32_t* end = out.data + row * (key_words + other_words);
        for (int64_t j = keys; j < key_words * 32; ++j) expect(!bit(end, j), name, "end of attention");
    }
}

void join(const char* name) {
    const int64_t count = number(1, 3), frames = number(0, 100), surplus = number(0, frames), more = number(0, 70);
    const int64_t all = frames - surplus + more, words = (frames + 31) / 32, more_words = (more + 31) / 32, out_words = (all + 31) / 32;
    Exact<uint32_t> kept(count * words * 16), behind(count * more_words * 16), out(count * out_words * 16);
    const auto draw_columns = [&](Exact<uint32_t>& x, int64_t length, int64_t of) {  // zeros past the last frame
        for (int64_t i = 0; i < x.size; ++i) {
            const int64_t left = length - i / 16 % of * 32;
            x.data[i] = draw() & (left >= 32 ? ~0u : (1u << left) - 1);
        }
    };
    if (words) draw_columns(kept, frames, words);
    if (more_words) draw_columns(behind, more, more_words);
    const Join task = {kept.data, behind.data, out.data, count, frames, surplus, words, more_words, out_words};
    hubert_eff_join_columns(&task);
    const auto at = [](const Exact<uint32_t>& x, int64_t panel, int64_t of, int64_t t, int64_t lane) {
        return x.data[(panel * of + t / 32) * 16 + lane] >> (t % 32) & 1;
    };
    for (int64_t panel = 0; panel < count; ++panel)
        for (int64_t t = 0; t < out_words * 32; ++t)
            for (int64_t lane = 0; lane < 16; ++lane) {
                const int64_t place = t - (frames - surplus);
                const uint32_t expected = t >= all ? 0 : place < 0 ? at(kept, panel, words, t + surplus, lane) : at(behind, panel, more_words, place, lane);
                expect(at(out, panel, out_words, t, lane) == expected, name, "joined columns");
            }
}

}  // namespace

int main(int, char** arguments) {
    for (const char* name : {"amx", "avx512vpopcntdq", "avx512bw", "avx2", "neon"}) {
        const void* kernel = hubert_eff_find(name);
        if (!kernel) continue;
        const int count = std::atoi(arguments[1]);
        for (int i = 0; i < count; ++i) one(name, kernel), attend(name, kernel), join(name);
        std::printf("%s: %d shapes\n", name, count);
    }
    return 0;
}
