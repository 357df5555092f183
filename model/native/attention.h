// Attention of single queries over their own paged keys and values.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "team.h"
#include "vectors.h"

namespace {

// Two vectors of consecutive numbers. Of bfloat16 one holds the even ones and the other the odd ones, which takes no
// shuffling; queries and sums are kept in the same order.
constexpr long TWO = 2 * LANES;

inline void load_two(const float* p, vec& first, vec& second) { first = load(p), second = load(p + LANES); }

inline void load_two(const bf16* p, vec& first, vec& second) {
    full_bits words;
    std::memcpy(&words, p, sizeof words);
    const full_bits even = words << 16, odd = words & 0xffff0000u;
    std::memcpy(&first, &even, sizeof first);
    std::memcpy(&second, &odd, sizeof second);
}

// Rounded to the nearest, ties to even.
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, bf16* to) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to->bits = x == x ? rounded : 0x7fc0;
}

// Keys and values of rows [rows, 3 * width], behind the queries, to their slots.
template <class W>
void keep(const float* qkv, const int64_t* slots, W* keys, W* values, long rows, long width) {
    for_each(rows * width > SERIAL, rows, 0, [&](long r) {
        const float* from = qkv + (3 * r + 1) * width;
        for (long i = 0; i < width; ++i) narrow(from[i], keys + slots[r] * width + i);
        for (long i = 0; i < width; ++i) narrow(from[width + i], values + slots[r] * width + i);
    });
}

// Whole numbers of TWO into that order, or back.
inline void reorder(const float* from, float* to, long count, const float*, bool) { std::copy(from, from + count, to); }
inline void reorder(const float* from, float* to, long count, const bf16*, bool back) {
    for (long begin = 0; begin < count; begin += TWO, from += TWO, to += TWO) {
        if (back)
            for (long i = 0; i < LANES; ++i) to[2 * i] = from[i], to[2 * i + 1] = from[i + LANES];
        else
            for (long i = 0; i < LANES; ++i) to[i] = from[2 * i], to[i + LANES] = from[2 * i + 1];
    }
}

// The sums of LANES vectors.
inline vec sums_of(vec* v) {
#if defined(__AVX512F__) && MOTSERVE_LANES == 16
    // Neighbours are added up, of two vectors at once: after the n-th round a vector holds sums of 2^n, of 2^n vectors.
    const auto add_pairs = [v](long count, __m512i low, __m512i high) {
        for (long i = 0; i < count; ++i) {
            const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
            v[i] = (vec)_mm512_permutex2var_ps(a, low, b) + (vec)_mm512_permutex2var_ps(a, high, b);
        }
    };
    const auto places = [](int a, int b, int c, int d, int e, int f, int g, int h) {
        return _mm512_setr_epi32(a, b, c, d, e, f, g, h, a + 8, b + 8, c + 8, d + 8, e + 8, f + 8, g + 8, h + 8);
    };
    add_pairs(8, places(0, 16, 2, 18, 4, 20, 6, 22), places(1, 17, 3, 19, 5, 21, 7, 23));
    add_pairs(4, places(0, 1, 16, 17, 4, 5, 20, 21), places(2, 3, 18, 19, 6, 7, 22, 23));
    add_pairs(2, places(0, 1, 2, 3, 16, 17, 18, 19), places(4, 5, 6, 7, 20, 21, 22, 23));
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    add_pairs(1, low, _mm512_add_epi32(low, _mm512_set1_epi32(8)));
    return v[0];
#else
    vec sums;
    for (long i = 0; i < LANES; ++i) sums[i] = sum(v[i]);
    return sums;
#endif
}

// One task's share of a row: some heads over all places. V: a head is so many times TWO, 0: it is of any size.
template <class W, int V>
struct Heads {
    const W *keys, *values;  // of the first of these heads
    const int64_t* table;
    long count, any_size, length, stride, block_size;

    long size() const { return V ? V * TWO : any_size; }
    long whole() const { return size() / TWO * TWO; }

    const W* at(const W* side, long place) const {
        return side + (table[place / block_size] * block_size + place % block_size) * stride;
    }

    // Places in order, at most so many at once and of one block: use(keys or values, first place, how many, those that
    // come next). then: what is read after the last.
    template <class Use>
    void each_part(const W* side, long most, const W* then, const Use& use) const {
        for (long begin = 0, some; begin < length; begin += some) {
            some = std::min({most, length - begin, block_size - begin % block_size});
            use(at(side, begin), begin, some, begin + some < length ? at(side, begin + some) : then);
        }
    }

    // One head's part of a place.
    void fetch(const W* place) const {
        for (long i = 0; i < size(); i += 64 / long(sizeof(W))) __builtin_prefetch(place + i, 0, 3);
    }

    // One head's scores of LANES places at most, to LANES numbers; next: where its places are that come after them.
    void scores(const float* query, const W* block, long places, const W* next, float* to) const {
        vec totals[LANES];
#pragma GCC unroll 16
        for (long t = 0; t < LANES; ++t) {
            fetch(next + t * stride);
            const W* key = block + std::min(t, places - 1) * stride;  // nobody looks at what is too much
            vec first = {}, second = {}, a, b;
            for (long i = 0; i < whole(); i += TWO) {
                load_two(key + i, a, b);
                first = fused(load(query + i), a, first), second = fused(load(query + i + LANES), b, second);
            }
            totals[t] = first + second;
        }
        store(to, sums_of(totals));
        for (long i = whole(); i < size(); ++i)
            for (long t = 0; t < places; ++t) to[t] = fused(query[i], value(block + t * stride + i), to[t]);
    }

    // Adds one head's values by their weights to sums, N times TWO numbers in order.
    template <int N>
    void add_vectors(const float* weights, const W* block, long places, float* sums) const {
        vec total[2 * N], a, b;
        for (int v = 0; v < 2 * N; ++v) total[v] = load(sums + v * LANES);
        for (long t = 0; t < places; ++t) {
            const vec w = broadcast(weights[t]);
            for (int v = 0; v < N; ++v) {
                load_two(block + t * stride + v * TWO, a, b);
                total[2 * v] = fused(w, a, total[2 * v]), total[2 * v + 1] = fused(w, b, total[2 * v + 1]);
            }
        }
        for (int v = 0; v < 2 * N; ++v) store(sums + v * LANES, total[v]);
    }
    void add_values(const float* weights, const W* block, long places, const W* next, float* sums) const {
        for (long t = 0; t < places; ++t) fetch(next + t * stride);
        long i = 0;
        for (; i + 2 * TWO <= size(); i += 2 * TWO) add_vectors<2>(weights, block + i, places, sums + i);
        for (; i + TWO <= size(); i += TWO) add_vectors<1>(weights, block + i, places, sums + i);
        for (; i < size(); ++i)
            for (long t = 0; t < places; ++t) sums[i] = fused(weights[t], value(block + t * stride + i), sums[i]);
    }

    // Numbers of one head in the order of vectors, or back; the rest stays in its place.
    void in_order(const float* from, float* to, bool back) const {
        reorder(from, to, whole(), keys, back);
        std::copy(from + whole(), from + size(), to + whole());
    }
};

// Scores to weights, which are yet to be divided by their sum: that is returned.
inline float exponentials(float* scores, long length, float scale) {
    vec most = broadcast(-std::numeric_limits<float>::infinity());
    long t = 0;
    for (; t + LANES <= length; t += LANES) most = maximum(load(scores + t), most);
    float top = most[0];
    for (long i = 1; i < LANES; ++i) top = std::max(top, most[i]);
    for (; t < length; ++t) top = std::max(top, scores[t]);
    const vec by = broadcast(scale), less = broadcast(top * scale);
    apply(scores, length, [&](vec v) { return exponential(fused(v, by, -less)); });
    vec totals = {};
    for (t = 0; t + LANES <= length; t += LANES) totals += load(scores + t);
    float total = sum(totals);
    for (; t < length; ++t) total += scores[t];
    return total;
}

template <class W, int V>
void attend_heads(const Heads<W, V>& heads, const float* queries, std::vector<float>& memory, float* out) {
    const long size = heads.size(), length = heads.length, span = length + LANES;  // scores come LANES at once
    memory.resize(std::max<size_t>(memory.size(), heads.count * (span + size)));
    float *weights = memory.data(), *ordered = weights + heads.count * span;
    for (long h = 0; h < heads.count; ++h) heads.in_order(queries + h * size, ordered + h * size, false);
    const W* first = heads.at(heads.values, 0);
    heads.each_part(heads.keys, LANES, first, [&](const W* keys, long begin, long places, const W* next) {
        for (long h = 0; h < heads.count; ++h)
            heads.scores(ordered + h * size, keys + h * size, places, next + h * size, weights + h * span + begin);
    });
    std::vector<float> totals(heads.count);
    for (long h = 0; h < heads.count; ++h)
        totals[h] = exponentials(weights + h * span, length, 1.0f / std::sqrt(float(size)));
    std::fill(ordered, ordered + heads.count * size, 0.0f);
    heads.each_part(heads.values, LANES, first, [&](const W* values, long begin, long places, const W* next) {
        for (long h = 0; h < heads.count; ++h)
            heads.add_values(weights + h * span + begin, values + h * size, places, next + h * size, ordered + h * size);
    });
    for (long h = 0; h < heads.count; ++h) {
        for (long i = 0; i < size; ++i) ordered[h * size + i] /= totals[h];
        heads.in_order(ordered + h * size, out + h * size, true);
    }
}

constexpr long ATTENTION_TASKS = 16;  // fewer rows share their heads out

// Queries lie apart floats from each other.
template <class W, int V>
void attend_sized(const float* queries, long apart, const W* keys, const W* values, const int64_t* tables,
                  const int64_t* lengths, float* out, long rows, long heads, long size, long table_width,
                  long block_size) {
    const long stride = heads * size, parts = std::max(1L, std::min(heads, ATTENTION_TASKS / std::max(1L, rows)));
    const long share = (heads + parts - 1) / parts;
    together(true, [&](Member& member) {
        std::vector<float> memory;
        member.each(rows * parts, 1, [&](long task) {
            const long row = task / parts, part = task % parts;
            const long first = std::min(heads, part * share), count = std::min(heads, first + share) - first;
            const long at = first * size;
            const Heads<W, V> some{keys + at, values + at, tables + row * table_width,
                                   count, size, lengths[row], stride, block_size};
            if (count > 0) attend_heads(some, queries + row * apart + at, memory, out + row * stride + at);
        });
    });
}

// Of common sizes by what is compiled for them.
template <class W, class... Rest>
void attend(const float* queries, long apart, const W* keys, const W* values, const int64_t* tables,
            const int64_t* lengths, float* out, long rows, long heads, long size, Rest... rest) {
    const auto run = size == TWO       ? attend_sized<W, 1>
                     : size == 2 * TWO ? attend_sized<W, 2>
                     : size == 4 * TWO ? attend_sized<W, 4>
                                       : attend_sized<W, 0>;
    run(queries, apart, keys, values, tables, lengths, out, rows, heads, size, rest...);
}

}  // namespace
