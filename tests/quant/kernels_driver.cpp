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
    Exact<uint32_t> a(batch * m * words), b(batch * panels * words * 16), columns(batch * ((k + 15) / 16) * ((m + 31) / 32) * 16);

    Pack pack = {};
    pack.x = x.data, pack.move = move.data, pack.limit = limit.data, pack.columns = k;
    pack.size[0] = 1, pack.size[1] = batch, pack.size[2] = m, pack.x_stride[1] = m * k, pack.x_stride[2] = k;
    pack.out = a.data;
    hubert_eff_pack(kernel, &pack, 0, threads);
    pack.out = columns.data;
    hubert_eff_pack(kernel, &pack, 1, threads);
    for (int64_t i = 0; i < batch; ++i)
        for (int64_t t = 0; t < m; ++t)
            for (int64_t c = 0; c < k; ++c) {
                const bool above = x.data[(i * m + t) * k + c] + move.data[c] > *limit.data;
                expect(bit(a.data + (i * m + t) * words, c) == above, name, "packing of rows");
                const int64_t panel = i * ((k + 15) / 16) + c / 16;
                const uint32_t word = columns.data[(panel * ((m + 31) / 32) + t / 32) * 16 + c % 16];
                expect((word >> (t % 32) & 1) == above, name, "packing of columns");
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
    Exact<uint32_t> valid(batch * ((m + 31) / 32)), filter((k + 15) / 16 * taps * 16);
    for (int64_t i = 0; i < valid.size; ++i) valid.data[i] = draw();
    for (int64_t i = 0; i < filter.size; ++i) filter.data[i] = draw();
    Exact<float> z(batch * frames * k);
    Depthwise depthwise = {};
    depthwise.x = columns.data, depthwise.valid = valid.data, depthwise.weight = filter.data, depthwise.out = z.data;
    depthwise.batch = batch, depthwise.frames = frames, depthwise.channels = k, depthwise.words = (m + 31) / 32;
    depthwise.kernel = width, depthwise.stride = stride, depthwise.sizes = 1, depthwise.is_signed = product.is_signed;
    hubert_eff_depthwise(kernel, &depthwise, threads);
    for (int64_t i = 0; i < batch * frames * k; ++i) {
        const int64_t c = i % k, t = i / k % frames, of = i / (k * frames);
        int64_t sum = 0;
        for (int64_t j = 0; j < width && t * stride + j < depthwise.words * 32; ++j) {
            const int64_t at = t * stride + j, panel = of * ((k + 15) / 16) + c / 16;
            if (!bit(valid.data + of * depthwise.words, at)) continue;
            const bool left = columns.data[(panel * depthwise.words + at / 32) * 16 + c % 16] >> (at % 32) & 1;
            const bool right = filter.data[(c / 16 * taps + j / 32) * 16 + c % 16] >> (j % 32) & 1;
            sum += (left ? 1 : depthwise.is_signed ? -1 : 0) * (right ? 1 : -1);
        }
        expect(z.data[i] == static_cast<float>(sum), name, "depthwise convolution");
    }
}

}  // namespace

int main(int, char** arguments) {
    for (const char* name : {"amx", "avx512vpopcntdq", "avx512bw", "avx2", "neon"}) {
        const void* kernel = hubert_eff_find(name);
        if (!kernel) continue;
        const int count = std::atoi(arguments[1]);
        for (int i = 0; i < count; ++i) one(name, kernel);
        std::printf("%s: %d shapes\n", name, count);
    }
    return 0;
}
