// Products in float32, whatever type the weights have.

#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

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

inline std::vector<const float*> row_pointers(const float* base, long rows, long width) {
    std::vector<const float*> pointers(rows);
    for (long r = 0; r < rows; ++r) pointers[r] = base + r * width;
    return pointers;
}

inline std::vector<float*> row_pointers(float* base, long rows, long width) {
    std::vector<float*> pointers(rows);
    for (long r = 0; r < rows; ++r) pointers[r] = base + r * width;
    return pointers;
}

}  // namespace
