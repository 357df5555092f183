// Row-wise kernels of the decoder for CPUs: every row of a result is computed by the same sequence of operations,
// whatever rows stand beside it and however many there are. Sums run in float32; weights are float32 or bfloat16,
// experts also int8 with a scale an output.
// Multiply-adds that are fused are written so (`fused`), and the compiler is told to fuse no others: it would choose
// anew for each number of rows.
//
// Plain C interface, called through ctypes by model/native; shapes are checked there.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

struct bf16 {
    uint16_t bits;
};

#ifndef MOTSERVE_LANES
#ifdef __AVX512F__
#define MOTSERVE_LANES 16
#else
#define MOTSERVE_LANES 8
#endif
#endif
constexpr long LANES = MOTSERVE_LANES;
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int8_t byte_bits __attribute__((vector_size(LANES)));
typedef int32_t wide_bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t half_bits __attribute__((vector_size(LANES * 2)));
typedef uint32_t full_bits __attribute__((vector_size(LANES * 4)));
constexpr long SERIAL = 1 << 15;  // multiplications below which threads cost more than they bring

inline vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Compilers make these conversions of vectors number by number; x86 has instructions.
inline vec load(const bf16* p) {
#if defined(__AVX512F__) && MOTSERVE_LANES == 16
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__) && MOTSERVE_LANES == 8
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    half_bits h;
    std::memcpy(&h, p, sizeof h);
    full_bits wide = __builtin_convertvector(h, full_bits) << 16;
    vec v;
    std::memcpy(&v, &wide, sizeof v);
    return v;
#endif
}

inline vec load(const int8_t* p) {
#if defined(__AVX512F__) && MOTSERVE_LANES == 16
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__) && MOTSERVE_LANES == 8
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    byte_bits b;
    std::memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, wide_bits), vec);
#endif
}

inline float value(const float* p) { return *p; }

inline float value(const int8_t* p) { return *p; }

inline float value(const bf16* p) {
    uint32_t wide = uint32_t(p->bits) << 16;
    float v;
    std::memcpy(&v, &wide, sizeof v);
    return v;
}

inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

inline vec broadcast(float x) { return x - vec{}; }  // minus zero would turn -0 to +0 the other way round

inline float sum(vec v) {
    float parts[LANES];
    std::memcpy(parts, &v, sizeof v);
    for (long half = LANES / 2; half > 0; half /= 2)
        for (long i = 0; i < half; ++i) parts[i] += parts[i + half];
    return parts[0];
}

// a * b + c in one rounding, where the processor has it; the same for vectors and single numbers.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

inline vec fused(vec a, vec b, vec c) {
#if defined(__AVX512F__) && MOTSERVE_LANES == 16
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && MOTSERVE_LANES == 8
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    vec result;
    for (long i = 0; i < LANES; ++i) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return result;
#endif
}
#else
inline float fused(float a, float b, float c) { return a * b + c; }
inline vec fused(vec a, vec b, vec c) { return a * b + c; }
#endif

// Stay in a register: compilers like to read memory anew for every use, more often than processors can.
inline void keep(vec& v) {
#if defined(__AVX512F__) && MOTSERVE_LANES == 16
    asm("" : "+v"(v));
#elif defined(__AVX2__) && MOTSERVE_LANES == 8
    asm("" : "+x"(v));
#else
    (void)v;
#endif
}

inline vec maximum(vec a, vec b) { return a > b ? a : b; }

// e^x, relative error below 3e-7, 0 and infinity at the ends: 2^n times a polynomial on [-ln2/2, ln2/2] (Taylor).
inline vec exponential(vec x) {
    const vec low = broadcast(-87.0f), high = broadcast(88.7f), magic = broadcast(12582912.0f);  // 1.5 * 2^23
    const vec clamped = x < low ? low : x > high ? high : x;
    const vec n = fused(clamped, broadcast(1.44269504088896341f), magic) - magic;
    const vec r = fused(n, broadcast(2.12194440e-4f), fused(n, broadcast(-0.693359375f), clamped));
    vec p = broadcast(1.0f / 720);
    p = fused(p, r, broadcast(1.0f / 120));
    p = fused(p, r, broadcast(1.0f / 24));
    p = fused(p, r, broadcast(1.0f / 6));
    p = fused(p, r, broadcast(0.5f));
    p = fused(p, r, broadcast(1.0f));
    p = fused(p, r, broadcast(1.0f));
    const wide_bits scale = (__builtin_convertvector(n, wide_bits) + 127) << 23;
    vec factor;
    std::memcpy(&factor, &scale, sizeof factor);
    const vec value = p * factor;
    return x < low ? vec{} : value;
}

// A vectorised function of count floats in place; the last few go through the same operations, padded.
template <class F>
inline void apply(float* x, long count, F function) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) store(x + i, function(load(x + i)));
    if (i < count) {
        float rest[LANES] = {};
        std::memcpy(rest, x + i, (count - i) * sizeof(float));
        store(rest, function(load(rest)));
        std::memcpy(x + i, rest, (count - i) * sizeof(float));
    }
}

// Products with weights [K, N]: one accumulator an output, over k in ascending order. Long sums are made in parts of
// PART terms, kept in the result between them: then few pages and cache lines of the weights are in use at a time, and
// all rows take their turn while these are at hand.

constexpr long PART = LANES == 16 ? 32 : 64;

// Columns of R rows: V vectors of sums over K terms, beginning anew or, with more, going on from what c holds.
template <int R, int V, class W>
inline void column_block(const float* const* a, const W* b, long K, long N, bool more, float* const* c) {
    vec total[R][V] = {};
    if (more)
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) total[r][v] = load(c[r] + v * LANES);
    for (long k = 0; k < K; ++k) {
        if constexpr (R == 1) {  // no register may wait
            const vec x = broadcast(a[0][k]);
            for (int v = 0; v < V; ++v) total[0][v] = fused(x, load(b + k * N + v * LANES), total[0][v]);
            continue;
        }
        vec w[V];
        for (int v = 0; v < V; ++v) w[v] = load(b + k * N + v * LANES), keep(w[v]);
        for (int r = 0; r < R; ++r) {
            const vec x = broadcast(a[r][k]);
            for (int v = 0; v < V; ++v) total[r][v] = fused(x, w[v], total[r][v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(c[r] + v * LANES, total[r][v]);
}

template <int R, class W>
inline void column_rest(const float* const* a, const W* b, long K, long N, long columns, bool more, float* const* c) {
    for (int r = 0; r < R; ++r)
        for (long j = 0; j < columns; ++j) {
            float total = more ? c[r][j] : 0;
            for (long k = 0; k < K; ++k) total = fused(a[r][k], value(b + k * N + j), total);
            c[r][j] = total;
        }
}

// The last few columns by a whole vector that begins among their neighbours, whose sums it leaves alone.
template <int R, class W>
inline void column_tail(const float* const* a, const W* b, long K, long N, long end, long columns, bool more,
                        float* const* c) {
    float sums[R][LANES];
    float* at[R];
    for (int r = 0; r < R; ++r) {
        at[r] = sums[r];
        std::memcpy(sums[r], c[r] + end - LANES, sizeof sums[r]);
    }
    column_block<R, 1>(a, b + end - LANES, K, N, more, at);
    for (int r = 0; r < R; ++r) std::memcpy(c[r] + end - columns, sums[r] + LANES - columns, columns * sizeof(float));
}

// A number of vectors, at most V, known at run time only.
template <int R, int V, class W>
inline void column_vectors(long vectors, const float* const* a, const W* b, long K, long N, bool more,
                           float* const* c) {
    if constexpr (V > 0) {
        if (vectors == V) column_block<R, V>(a, b, K, N, more, c);
        else column_vectors<R, V - 1>(vectors, a, b, K, N, more, c);
    }
}

// Columns [begin, end) of R rows, V vectors at once as long as there are so many.
template <int R, int V, class W>
void column_range(const float* const* rows, long first, const W* b, long K, long N, long begin, long end,
                  float* const* c) {
    const bool more = first > 0;
    const float* a[R];
    for (int r = 0; r < R; ++r) a[r] = rows[r] + first;
    long j = begin;
    float* at[R];
    for (; j + V * LANES <= end; j += V * LANES) {
        for (int r = 0; r < R; ++r) at[r] = c[r] + j;
        column_block<R, V>(a, b + j, K, N, more, at);
    }
    if (const long vectors = (end - j) / LANES; vectors > 0) {
        for (int r = 0; r < R; ++r) at[r] = c[r] + j;
        column_vectors<R, V - 1>(vectors, a, b + j, K, N, more, at);
        j += vectors * LANES;
    }
    if (j < end && end - begin >= LANES) {
        column_tail<R>(a, b, K, N, end, end - j, more, c);
    } else if (j < end) {
        for (int r = 0; r < R; ++r) at[r] = c[r] + j;
        column_rest<R>(a, b + j, K, N, end - j, more, at);
    }
}

// Columns [begin, end) of all rows, terms [first, first + K).
template <class W>
void column_part(const float* const* a, long rows, long first, const W* b, long K, long N, long begin, long end,
                 float* const* c) {
    constexpr int W4 = LANES == 16 ? 6 : 3, W2 = LANES == 16 ? 12 : 4, W1 = 12;  // by registers
    long r = 0;
    for (; r + 4 <= rows; r += 4) column_range<4, W4>(a + r, first, b, K, N, begin, end, c + r);
    if (rows - r == 3) column_range<3, W4>(a + r, first, b, K, N, begin, end, c + r);
    if (rows - r == 2) column_range<2, W2>(a + r, first, b, K, N, begin, end, c + r);
    if (rows - r == 1) column_range<1, W1>(a + r, first, b, K, N, begin, end, c + r);
}

constexpr long STRIPE = 12 * LANES;  // columns taken at once
constexpr long PACKED_ROWS = 5;      // from so many on, weights are copied together (and converted) before use

template <class W>
void row_products(const float* const* a, long rows, const W* b, long K, long N, long begin, long end, float* const* c) {
    float panel[PART * STRIPE];
    std::vector<float*> at(rows);
    for (long first = 0; first < K; first += PART) {
        const long terms = std::min(PART, K - first);
        for (long from = begin; from < end; from += STRIPE) {
            const long columns = std::min(STRIPE, end - from);
            const W* part = b + first * N + from;
            for (long r = 0; r < rows; ++r) at[r] = c[r] + from;
            if (rows < PACKED_ROWS) {
                column_part(a, rows, first, part, terms, N, 0, columns, at.data());
                continue;
            }
            for (long k = 0; k < terms; ++k) {
                float* to = panel + k * columns;
                const W* row = part + k * N;
                long j = 0;
                for (; j + LANES <= columns; j += LANES) store(to + j, load(row + j));
                for (; j < columns; ++j) to[j] = value(row + j);
            }
            column_part(a, rows, first, static_cast<const float*>(panel), terms, columns, 0, columns, at.data());
        }
    }
}

// Products with weights [N, K], their rows a stride apart: LANES accumulators an output, over k in ascending order.

template <int R, int C, class W>
inline void dot_block(const float* const* a, const W* b, long K, long stride, float* const* c) {
    vec total[R][C] = {};
    long k = 0;
    for (; k + LANES <= K; k += LANES) {
        vec x[R];
        for (int r = 0; r < R; ++r) x[r] = load(a[r] + k);
        if constexpr (R * C + R < 16)
            for (int r = 0; r < R; ++r) keep(x[r]);
        for (int j = 0; j < C; ++j) {
            const vec w = load(b + j * stride + k);
            for (int r = 0; r < R; ++r) total[r][j] = fused(x[r], w, total[r][j]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < C; ++j) {
            float rest = 0;
            for (long i = k; i < K; ++i) rest = fused(a[r][i], value(b + j * stride + i), rest);
            c[r][j] = sum(total[r][j]) + rest;
        }
}

template <int R, int C, class W>
void dot_range(const float* const* a, const W* b, long K, long begin, long end, float* const* c) {
    long j = begin;
    float* at[R];
    for (; j + C <= end; j += C) {
        for (int r = 0; r < R; ++r) at[r] = c[r] + j;
        dot_block<R, C>(a, b + j * K, K, K, at);
    }
    for (; j < end; ++j) {
        for (int r = 0; r < R; ++r) at[r] = c[r] + j;
        dot_block<R, 1>(a, b + j * K, K, K, at);
    }
}

template <class W>
void dot_products(const float* const* a, long rows, const W* b, long K, long begin, long end, float* const* c) {
    long r = 0;
    for (; r + 4 <= rows; r += 4) dot_range<4, 3>(a + r, b, K, begin, end, c + r);
    if (rows - r == 3) dot_range<3, 4>(a + r, b, K, begin, end, c + r);
    if (rows - r == 2) dot_range<2, 4>(a + r, b, K, begin, end, c + r);
    if (rows - r == 1) dot_range<1, 8>(a + r, b, K, begin, end, c + r);
}

std::vector<const float*> row_pointers(const float* base, long rows, long width) {
    std::vector<const float*> pointers(rows);
    for (long r = 0; r < rows; ++r) pointers[r] = base + r * width;
    return pointers;
}

std::vector<float*> row_pointers(float* base, long rows, long width) {
    std::vector<float*> pointers(rows);
    for (long r = 0; r < rows; ++r) pointers[r] = base + r * width;
    return pointers;
}

template <class W>
void linear(const float* x, const W* weight, const float* bias, float* out, long rows, long K, long N, bool by_output) {
    const auto from = row_pointers(x, rows, K);
    const auto to = row_pointers(out, rows, N);
    const long stripes = (N + STRIPE - 1) / STRIPE;
#pragma omp parallel for schedule(static) if (rows * K * N > SERIAL)
    for (long s = 0; s < stripes; ++s) {
        const long begin = s * STRIPE, end = std::min(N, begin + STRIPE);
        if (by_output)
            dot_products(from.data(), rows, weight, K, begin, end, to.data());
        else
            row_products(from.data(), rows, weight, K, N, begin, end, to.data());
        if (bias != nullptr)
            for (long r = 0; r < rows; ++r)
                for (long j = begin; j < end; ++j) to[r][j] += bias[j];
    }
}

// Activations, by number: the order of model/native's table.

void activate(float* x, long count, int kind) {
    switch (kind) {
        case 0:
            for (long i = 0; i < count; ++i) x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678118654752f));
            break;
        case 1:  // x (1 + tanh(z)) / 2 = x / (1 + e^(-2z))
            apply(x, count, [](vec v) {
                const vec z = 1.59576912160573072f * (v + 0.044715f * v * v * v);
                return v / (1.0f + exponential(-z));
            });
            break;
        case 2:
            for (long i = 0; i < count; ++i) x[i] = x[i] > 0 ? x[i] : 0;
            break;
        default:
            apply(x, count, [](vec v) { return v / (1.0f + exponential(-v)); });
    }
}

// The experts of one layer. Scales, by output, are for int8 weights; null otherwise.
template <class W>
struct Experts {
    const W* lin1;        // [E, D, S]
    const W* lin2;        // [E, S, D]
    const float* scale1;  // [E, S]
    const float* scale2;  // [E, D]
    long D, S;
    int activation;

    // Expert e on its rows: hidden [rows, S] is scratch.
    void run(long e, const float* const* in, float* const* out, long rows, float* hidden) const {
        const auto to = row_pointers(hidden, rows, S);
        row_products(in, rows, lin1 + e * D * S, D, S, 0, S, to.data());
        if (scale1 != nullptr) scale(to.data(), rows, S, scale1 + e * S);
        activate(hidden, rows * S, activation);
        const std::vector<const float*> from(to.begin(), to.end());
        row_products(from.data(), rows, lin2 + e * S * D, S, D, 0, D, out);
        if (scale2 != nullptr) scale(out, rows, D, scale2 + e * D);
    }

    static void scale(float* const* x, long rows, long columns, const float* by) {
        for (long r = 0; r < rows; ++r)
            for (long j = 0; j < columns; ++j) x[r][j] *= by[j];
    }
};

// Calls use with the experts of a type known at run time only: 0 float32, 1 bfloat16, 2 int8.
template <class F>
void with_experts(const void* lin1, const void* lin2, const float* scale1, const float* scale2, long D, long S,
                  int activation, int weights, F use) {
    const auto typed = [&](auto* first, auto* second) {
        typedef std::remove_const_t<std::remove_pointer_t<decltype(first)>> W;
        use(Experts<W>{first, second, scale1, scale2, D, S, activation});
    };
    if (weights == 2) typed(static_cast<const int8_t*>(lin1), static_cast<const int8_t*>(lin2));
    else if (weights == 1) typed(static_cast<const bf16*>(lin1), static_cast<const bf16*>(lin2));
    else typed(static_cast<const float*>(lin1), static_cast<const float*>(lin2));
}

template <class W>
void bank(const Experts<W>& experts, const float* mixes, float* out, long E, long n) {
    const long D = experts.D;
#pragma omp parallel for schedule(dynamic, 1)
    for (long e = 0; e < E; ++e) {
        std::vector<float> hidden(n * experts.S);
        const auto from = row_pointers(mixes + e * n * D, n, D);
        const auto to = row_pointers(out + e * n * D, n, D);
        experts.run(e, from.data(), to.data(), n, hidden.data());
    }
}

}  // namespace

extern "C" {

// What a private layer needs; mirrored in model/native.
struct PrivateLayer {
    int64_t n, D, E, S;
    int64_t places, members;  // of the crowd: positions it has, members of a group; 0 members: no crowd
    int64_t rivals;           // members, from the second on, that a row at temperature 0 must beat
    int32_t activation, over_experts, discrete, gated;
    int32_t weights, half;  // type of the experts; whether the crowd is bfloat16
    const float* x;            // [n, D]
    const float* own;          // [n, E] scores
    const void* crowd;         // [places, members, D], the first member gives way to the row
    const float* crowd_scores;  // [places, E, members]
    const int64_t* positions;  // [n]
    const float* temperatures;
    const float* skip_below;
    const uint8_t* live;
    const void* lin1;
    const void* lin2;
    const float* scale1;
    const float* scale2;
    float* out;       // [n, D]
    float* entropy;   // [n], added to
    int64_t* used;    // [n], added to
    // Shared groups that pass through the same experts, so that weights are read once for both.
    int64_t groups;      // may be 0
    const float* mixes;  // [E, groups, D]
    float* outputs;      // [E, groups, D]
};
}

namespace {

struct Pair {
    long row, expert;
    float emit;
};

// Answers by their weights, added up: experts in ascending order for every row; threads share columns out, never one
// sum. Zeros for a row without answers.
void add_up(const std::vector<Pair>& pairs, const std::vector<float>& answers, float* out, long n, long D) {
    std::fill(out, out + n * D, 0.0f);
#pragma omp parallel for schedule(static)
    for (long d = 0; d < D; d += 64) {
        const long end = std::min(D, d + 64);
        for (size_t p = 0; p < pairs.size(); ++p) {
            float* to = out + pairs[p].row * D;
            const float* answer = &answers[p * D];
            for (long i = d; i < end; ++i) to[i] = fused(pairs[p].emit, answer[i], to[i]);
        }
    }
}

// Weights of one row's group for every expert: merge [E, G] and emit [E]. Returns the row's mean normalised entropy.
float mixing_weights(const PrivateLayer& l, long row, const float* scores, float* merge, float* emit) {
    const long others = l.members > 0 ? l.members - 1 : 0, size = others + 1;
    const float T = l.temperatures[row];
    const float* own = l.own + row * l.E;
    const bool unmixed = T == 0;
    const long rivals = unmixed ? std::min<long>(l.rivals, others) : others;
    double spent = 0;
    for (long e = 0; e < l.E; ++e) {
        float* m = merge + e * size;
        const float* theirs = scores + e * l.members + 1;
        float best = -std::numeric_limits<float>::infinity();
        long holder = 0;
        for (long j = 0; j < rivals; ++j) {
            const float s = theirs[j];
            m[j + 1] = s;
            if (s > best) best = s, holder = j + 1;
        }
        if (unmixed || l.discrete) {
            const bool wins = rivals == 0 || (unmixed ? own[e] > best : own[e] >= best);
            std::fill(m, m + size, 0.0f);
            if (wins) m[0] = 1;
            else if (!unmixed) m[holder] = 1;
            emit[e] = m[0];
            continue;
        }
        const float top = std::max(best, own[e]) / T;
        m[0] = own[e];
        float total = 0, weighted = 0;
        for (long j = 0; j < size; ++j) {
            const float z = m[j] / T - top;
            m[j] = expf(z);
            total += m[j];
            weighted += m[j] * z;
        }
        for (long j = 0; j < size; ++j) m[j] /= total;
        emit[e] = m[0];
        if (size > 1) spent += logf(total) - weighted / total;
    }
    if (l.over_experts) {
        const long best = std::max_element(own, own + l.E) - own;
        if (unmixed || l.discrete) {
            for (long e = 0; e < l.E; ++e) emit[e] = e == best ? (unmixed ? emit[e] : 1.0f) : 0.0f;
        } else {
            float total = 0;
            for (long e = 0; e < l.E; ++e) emit[e] = expf((own[e] - own[best]) / T), total += emit[e];
            for (long e = 0; e < l.E; ++e) emit[e] /= total;
        }
    }
    if (l.gated) for (long e = 0; e < l.E; ++e) emit[e] *= own[e];
    return size > 1 ? float(spent / l.E / std::log(double(size))) : 0.0f;
}

// The mix that one expert sees: the row and its rivals by their weights, in order.
template <class C>
void mix(const PrivateLayer& l, long row, const C* crowd, const float* merge, float* out) {
    const float* x = l.x + row * l.D;
    if (l.temperatures[row] == 0) {
        std::copy(x, x + l.D, out);
        return;
    }
    for (long d = 0; d < l.D; ++d) out[d] = merge[0] * x[d];
    for (long j = 1; j < l.members; ++j) {
        const C* member = crowd + j * l.D;
        const float w = merge[j];
        for (long d = 0; d < l.D; ++d) out[d] = fused(w, value(member + d), out[d]);
    }
}

template <class W, class C>
void private_layer(const PrivateLayer& l) {
    const Experts<W> experts{static_cast<const W*>(l.lin1), static_cast<const W*>(l.lin2), l.scale1, l.scale2,
                             long(l.D), long(l.S), l.activation};
    const long size = l.members > 0 ? l.members : 1;
    std::vector<float> emit(l.n * l.E), merge(l.n * l.E * size);
    const C* crowd = static_cast<const C*>(l.crowd);
    const float* scores = l.crowd_scores;
    auto place = [&](long row) { return l.places > 1 ? l.positions[row] : 0; };
#pragma omp parallel for schedule(static)
    for (long row = 0; row < l.n; ++row) {
        if (!l.live[row]) continue;
        l.entropy[row] += mixing_weights(l, row, scores + place(row) * l.E * l.members, &merge[row * l.E * size],
                                         &emit[row * l.E]);
    }
    std::vector<Pair> pairs;
    std::vector<long> first(l.E + 1);
    for (long e = 0; e < l.E; ++e) {
        first[e] = pairs.size();
        for (long row = 0; row < l.n; ++row) {
            const float w = emit[row * l.E + e];
            if (!l.live[row] || !(w > 0) || !(w >= l.skip_below[row])) continue;
            pairs.push_back({row, e, w});
            ++l.used[row];
        }
    }
    first[l.E] = pairs.size();
    std::vector<float> answers(pairs.size() * l.D);  // mixes first, then, in their place, what the experts make of them
#pragma omp parallel for schedule(dynamic, 1)
    for (long e = 0; e < l.E; ++e) {
        const long count = first[e + 1] - first[e];
        std::vector<float> hidden(std::max(count, long(l.groups)) * l.S), mixes(count * l.D);
        if (l.groups > 0) {
            const auto from = row_pointers(l.mixes + e * l.groups * l.D, l.groups, l.D);
            const auto to = row_pointers(l.outputs + e * l.groups * l.D, l.groups, l.D);
            experts.run(e, from.data(), to.data(), l.groups, hidden.data());
        }
        if (count == 0) continue;
        for (long i = 0; i < count; ++i) {
            const Pair& pair = pairs[first[e] + i];
            mix(l, pair.row, crowd + place(pair.row) * l.members * l.D, &merge[(pair.row * l.E + e) * size],
                &mixes[i * l.D]);
        }
        const auto from = row_pointers(static_cast<const float*>(mixes.data()), count, l.D);
        const auto to = row_pointers(&answers[first[e] * l.D], count, l.D);
        experts.run(e, from.data(), to.data(), count, hidden.data());
    }
    add_up(pairs, answers, l.out, l.n, l.D);
}

// Token choice: each row through the experts whose gate is above zero.
template <class W>
void routed(const Experts<W>& experts, const float* x, const float* gates, float* out, long n, long E) {
    const long D = experts.D;
    std::vector<Pair> pairs;
    std::vector<long> first(E + 1);
    for (long e = 0; e < E; ++e) {
        first[e] = pairs.size();
        for (long row = 0; row < n; ++row)
            if (gates[row * E + e] > 0) pairs.push_back({row, e, gates[row * E + e]});
    }
    first[E] = pairs.size();
    std::vector<float> answers(pairs.size() * D);
#pragma omp parallel for schedule(dynamic, 1)
    for (long e = 0; e < E; ++e) {
        const long count = first[e + 1] - first[e];
        if (count == 0) continue;
        std::vector<const float*> from(count);
        for (long i = 0; i < count; ++i) from[i] = x + pairs[first[e] + i].row * D;
        const auto to = row_pointers(&answers[first[e] * D], count, D);
        std::vector<float> hidden(count * experts.S);
        experts.run(e, from.data(), to.data(), count, hidden.data());
    }
    add_up(pairs, answers, out, n, D);
}

// Attention of single queries over their own paged keys and values.

// Scores of count consecutive places whose keys lie a stride apart.
template <class W>
void key_scores(const float* query, const W* keys, long count, long size, long stride, float scale, float* scores) {
    long t = 0;
    for (; t + 4 <= count; t += 4) {
        float* to = scores + t;
        dot_block<1, 4>(&query, keys + t * stride, size, stride, &to);
    }
    for (; t < count; ++t) {
        float* to = scores + t;
        dot_block<1, 1>(&query, keys + t * stride, size, stride, &to);
    }
    for (t = 0; t < count; ++t) scores[t] *= scale;
}

// The values' sum by their weights: V vectors of columns from begin on.
template <int V, class W>
void value_sums(const float* weights, const W* values, const int64_t* table, long length, long block_size, long stride,
                float* out) {
    vec total[V] = {};
    for (long begin = 0; begin < length; begin += block_size) {
        const W* block = values + table[begin / block_size] * block_size * stride;
        const long count = std::min(block_size, length - begin);
        for (long t = 0; t < count; ++t) {
            const vec w = broadcast(weights[begin + t]);
            for (int v = 0; v < V; ++v) total[v] = fused(w, load(block + t * stride + v * LANES), total[v]);
        }
    }
    for (int v = 0; v < V; ++v) store(out + v * LANES, total[v]);
}

template <class W>
void attend_head(const float* query, const W* keys, const W* values, const int64_t* table, long length, long size,
                 long stride, long block_size, float* weights, float* out) {
    const float scale = 1.0f / std::sqrt(float(size));
    for (long begin = 0; begin < length; begin += block_size)
        key_scores(query, keys + table[begin / block_size] * block_size * stride, std::min(block_size, length - begin),
                   size, stride, scale, weights + begin);
    const float top = *std::max_element(weights, weights + length);
    apply(weights, length, [top](vec v) { return exponential(v - top); });
    float total = 0;
    for (long t = 0; t < length; ++t) total += weights[t];
    for (long t = 0; t < length; ++t) weights[t] /= total;
    long i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES)
        value_sums<4>(weights, values + i, table, length, block_size, stride, out + i);
    for (; i + LANES <= size; i += LANES)
        value_sums<1>(weights, values + i, table, length, block_size, stride, out + i);
    for (; i < size; ++i) {
        out[i] = 0;
        for (long t = 0; t < length; ++t) {
            const long place = table[t / block_size] * block_size + t % block_size;
            out[i] = fused(weights[t], value(values + place * stride + i), out[i]);
        }
    }
}

template <class W>
void attend(const float* queries, const W* keys, const W* values, const int64_t* tables, const int64_t* lengths,
            float* out, long rows, long heads, long size, long table_width, long block_size) {
    const long stride = heads * size;
#pragma omp parallel
    {
        std::vector<float> weights(table_width * block_size);
#pragma omp for collapse(2) schedule(dynamic, 4)
        for (long row = 0; row < rows; ++row)
            for (long head = 0; head < heads; ++head) {
                const long at = row * stride + head * size;
                attend_head(queries + at, keys + head * size, values + head * size, tables + row * table_width,
                            lengths[row], size, stride, block_size, weights.data(), out + at);
            }
    }
}

// Sampling. A row's token depends on its logits, its parameters and its random number alone.

struct Candidate {
    float weight;
    int32_t id;
    bool operator<(const Candidate& other) const {  // best first, ties to the lowest id
        return weight != other.weight ? weight > other.weight : id < other.id;
    }
};

inline float largest(const float* x, long count) {
    float top = -std::numeric_limits<float>::infinity();
    long i = 0;
    if (count >= LANES) {
        vec best = load(x);
        for (; i + LANES <= count; i += LANES) best = maximum(load(x + i), best);
        for (long lane = 0; lane < LANES; ++lane) top = std::max(top, best[lane]);
    }
    for (; i < count; ++i) top = std::max(top, x[i]);
    return top;
}

// The last candidate, in order of weight, that top_k, then min_p, then top_p leave. Weights are relative to the best
// one's, 1; total is the sum of all of them.
Candidate last_kept(const std::vector<float>& weights, double total, long top_k, float top_p, float min_p) {
    const long V = weights.size();
    // What cannot be within top_p: all weights below this one together weigh less than the rest that top_p leaves out.
    const bool alone = top_k <= 0 && min_p <= 0;
    const double negligible = alone && top_p < 1 ? (1 - double(top_p)) * total / V : 0;
    std::vector<Candidate> kept;
    for (long i = 0; i < V; ++i)
        if (weights[i] > 0 && weights[i] >= min_p && weights[i] >= negligible) kept.push_back({weights[i], int32_t(i)});
    if (top_k > 0 && top_k < long(kept.size())) {
        std::nth_element(kept.begin(), kept.begin() + top_k, kept.end());
        kept.resize(top_k);
    }
    if (!(top_p < 1)) return *std::max_element(kept.begin(), kept.end());
    double left = alone ? total : 0, before = 0;
    if (!alone) for (const Candidate& c : kept) left += c.weight;
    // A candidate stays while those before it do not make up top_p; the first one always does.
    size_t low = 0, high = kept.size();
    while (high - low > 1) {
        const size_t middle = (low + high) / 2;
        std::nth_element(kept.begin() + low, kept.begin() + middle, kept.begin() + high);
        double part = 0;
        for (size_t i = low; i < middle; ++i) part += kept[i].weight;
        if (before + part < double(top_p) * left) before += part, low = middle;
        else high = middle;
    }
    return kept[low];
}

int64_t draw(const float* logits, long V, float temperature, long top_k, float top_p, float min_p, double uniform) {
    const float top = largest(logits, V);
    if (!(temperature > 0)) return std::find(logits, logits + V, top) - logits;
    std::vector<float> weights(logits, logits + V);
    apply(weights.data(), V, [=](vec v) { return exponential((v - top) / temperature); });
    double total = 0;
    for (float w : weights) total += w;
    if ((top_k > 0 && top_k < V) || top_p < 1 || min_p > 0) {
        const Candidate last = last_kept(weights, total, top_k, top_p, min_p);
        total = 0;
        for (long i = 0; i < V; ++i) {
            if (last < Candidate{weights[i], int32_t(i)}) weights[i] = 0;
            total += weights[i];
        }
    }
    double passed = 0;
    long token = 0;
    for (long i = 0; i < V; ++i) {
        if (!(weights[i] > 0)) continue;
        passed += weights[i];
        token = i;
        if (passed > uniform * total) break;
    }
    return token;
}

// Log probabilities of one token and of the best k, best first.
void score(const float* logits, long V, int64_t token, long k, float* chosen, int64_t* ids, float* values) {
    const float top = largest(logits, V);
    std::vector<float> weights(logits, logits + V);
    apply(weights.data(), V, [=](vec v) { return exponential(v - top); });
    double total = 0;
    for (float w : weights) total += w;
    const float normaliser = top + float(std::log(total));
    *chosen = logits[token] - normaliser;
    if (k <= 0) return;
    std::vector<Candidate> best(V);
    for (long i = 0; i < V; ++i) best[i] = {logits[i], int32_t(i)};
    std::partial_sort(best.begin(), best.begin() + k, best.end());
    for (long i = 0; i < k; ++i) ids[i] = best[i].id, values[i] = best[i].weight - normaliser;
}

}  // namespace

extern "C" {

void motserve_draw(const float* logits, int64_t rows, int64_t V, const float* temperature, const int64_t* top_k,
                   const float* top_p, const float* min_p, const double* uniform, int64_t* tokens) {
#pragma omp parallel for schedule(dynamic, 1) if (rows > 1)
    for (long r = 0; r < rows; ++r)
        tokens[r] = draw(logits + r * V, V, temperature[r], top_k[r], top_p[r], min_p[r], uniform[r]);
}

void motserve_score(const float* logits, int64_t rows, int64_t V, const int64_t* tokens, int64_t k, float* chosen,
                    int64_t* ids, float* values) {
#pragma omp parallel for schedule(dynamic, 1) if (rows > 1)
    for (long r = 0; r < rows; ++r)
        score(logits + r * V, V, tokens[r], k, chosen + r, ids + r * k, values + r * k);
}

void motserve_linear(const float* x, const void* weight, const float* bias, float* out, int64_t rows, int64_t K,
                     int64_t N, int32_t by_output, int32_t half) {
    if (half) linear(x, static_cast<const bf16*>(weight), bias, out, rows, K, N, by_output);
    else linear(x, static_cast<const float*>(weight), bias, out, rows, K, N, by_output);
}

void motserve_bank(const float* mixes, const void* lin1, const void* lin2, const float* scale1, const float* scale2,
                   float* out, int64_t E, int64_t n, int64_t D, int64_t S, int32_t activation, int32_t weights) {
    with_experts(lin1, lin2, scale1, scale2, D, S, activation, weights,
                 [&](const auto& experts) { bank(experts, mixes, out, E, n); });
}

void motserve_private_layer(const PrivateLayer* layer) {
    const PrivateLayer& l = *layer;
    if (l.weights == 2) l.half ? private_layer<int8_t, bf16>(l) : private_layer<int8_t, float>(l);
    else if (l.weights == 1) l.half ? private_layer<bf16, bf16>(l) : private_layer<bf16, float>(l);
    else l.half ? private_layer<float, bf16>(l) : private_layer<float, float>(l);
}

void motserve_routed(const float* x, const float* gates, const void* lin1, const void* lin2, const float* scale1,
                     const float* scale2, float* out, int64_t n, int64_t E, int64_t D, int64_t S, int32_t activation,
                     int32_t weights) {
    with_experts(lin1, lin2, scale1, scale2, D, S, activation, weights,
                 [&](const auto& experts) { routed(experts, x, gates, out, n, E); });
}

void motserve_activate(float* x, int64_t count, int32_t kind) { activate(x, count, kind); }

void motserve_attend(const float* queries, const void* keys, const void* values, const int64_t* tables,
                     const int64_t* lengths, float* out, int64_t rows, int64_t heads, int64_t size,
                     int64_t table_width, int64_t block_size, int32_t half) {
    if (half)
        attend(queries, static_cast<const bf16*>(keys), static_cast<const bf16*>(values), tables, lengths, out, rows,
               heads, size, table_width, block_size);
    else
        attend(queries, static_cast<const float*>(keys), static_cast<const float*>(values), tables, lengths, out, rows,
               heads, size, table_width, block_size);
}
}
