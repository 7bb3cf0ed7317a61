// What the machine can do at most: bytes read from memory per second, and multiply-adds of integers per second.
// Compiled for this very processor (bench/limits.py). Each function returns a rate over all threads.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

double seconds_of(int threads, const std::function<void(int)>& work) {
    auto start = Clock::now();
    std::vector<std::thread> team;
    for (int n = 1; n < threads; ++n) team.emplace_back(work, n);
    work(0);
    for (auto& member : team) member.join();
    return std::chrono::duration<double>(Clock::now() - start).count();
}

// The sum keeps the compiler from dropping the loads.
volatile uint64_t sink;

uint64_t sum(const uint64_t* data, size_t count) {
    uint64_t total[8] = {};
    for (size_t n = 0; n + 64 <= count; n += 64) {
        __builtin_prefetch(data + n + 512);
        for (size_t k = 0; k < 64; ++k) total[k % 8] += data[n + k];
    }
    uint64_t all = 0;
    for (uint64_t part : total) all += part;
    return all;
}

constexpr long kRounds = 4000000;
constexpr int kChains = 12;  // independent sums, more than the latency of a multiply-add needs

#if defined(__AVX512VNNI__)
using Vector = __m512i;
Vector ones() { return _mm512_set1_epi32(0x01010101); }
Vector words(Vector sum, Vector a, Vector b) { return _mm512_dpwssd_epi32(sum, a, b); }
Vector bytes(Vector sum, Vector a, Vector b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVX2__)
using Vector = __m256i;
Vector ones() { return _mm256_set1_epi32(0x01010101); }
Vector words(Vector sum, Vector a, Vector b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
Vector bytes(Vector sum, Vector a, Vector b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
#else
struct Vector { int32_t lane[4]; };
Vector ones() { return {{1, 1, 1, 1}}; }
Vector words(Vector sum, Vector a, Vector b) {
    for (int n = 0; n < 4; ++n) sum.lane[n] += a.lane[n] * b.lane[n];
    return sum;
}
Vector bytes(Vector sum, Vector a, Vector b) { return words(sum, a, b); }
#endif

#if defined(__AVX2__)
constexpr int kWords = sizeof(Vector) / 2, kBytes = sizeof(Vector);
// May have changed, for all the compiler knows: equal chains are not merged, nor products moved out of the loop.
void opaque(Vector& value) { asm volatile("" : "+v"(value)); }
#else
constexpr int kWords = 4, kBytes = 4;
void opaque(Vector& value) { asm volatile("" : "+m"(value)); }
#endif

template <Vector (*Multiply)(Vector, Vector, Vector)>
void chains() {
    Vector a = ones(), b = ones(), sums[kChains];
    for (auto& sum : sums) {
        sum = ones();
        opaque(sum);
    }
    for (long n = 0; n < kRounds; ++n) {
        opaque(a);
        opaque(b);
        for (auto& sum : sums) sum = Multiply(sum, a, b);
    }
    for (auto& sum : sums) opaque(sum);
}

template <Vector (*Multiply)(Vector, Vector, Vector)>
double rate(int threads, int per_call) {
    double seconds = seconds_of(threads, [](int) { chains<Multiply>(); });
    return double(kRounds) * kChains * per_call * threads / seconds;
}

}  // namespace

extern "C" {

// Reads `size` bytes, split over the threads, `passes` times; the fastest pass. 0 without memory.
double limit_read_bytes_per_second(int threads, size_t size, int passes) {
    size_t count = size / 8 / threads;
    auto* data = static_cast<uint64_t*>(aligned_alloc(4096, count * threads * 8));
    if (!data) return 0;
    seconds_of(threads, [&](int n) { for (size_t k = 0; k < count; ++k) data[n * count + k] = k; });
    double best = 1e9;
    for (int pass = 0; pass < passes; ++pass) {
        double seconds = seconds_of(threads, [&](int n) { sink = sum(data + n * count, count); });
        if (seconds < best) best = seconds;
    }
    free(data);
    return double(count) * threads * 8 / best;
}

double limit_int16_multiply_adds_per_second(int threads) { return rate<words>(threads, kWords); }

double limit_int8_multiply_adds_per_second(int threads) { return rate<bytes>(threads, kBytes); }

}
