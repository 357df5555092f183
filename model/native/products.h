// Products in float32, whatever type the weights have.

#pragma once

#include <algorithm>
#include <vector>

#include "ahead.h"
#include "vectors.h"

namespace {

// Products with weights [K, N]: one accumulator an output, over k in ascending order. Long sums are made in parts, kept
// in the result between them: then few pages and cache lines of the weights are in use at a time, all rows take their
// turn while these are at hand, and the next part is fetched meanwhile.

constexpr long FEW_PART = 32;                 // terms of a part
constexpr long PART = LANES == 16 ? 32 : 64;  // the same where weights are copied together
constexpr long STRIPE = 12 * LANES;           // columns copied together, or taken by a thread at once
constexpr long PACKED_ROWS = 5;               // from so many on, weights are copied together (and converted) before use

// Columns of R rows: V vectors of sums over so many terms, beginning anew or, with more, going on from what c holds. b,
// its rows N apart, is of the weights or a copy of them in another type.
template <int R, int V, class B, class W>
inline void column_block(const float* const* a, const B* b, long terms, long N, bool more, const Ahead<W>& ahead,
                         float* const* c) {
    vec total[R][V] = {};
    if (more)
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) total[r][v] = load(c[r] + v * LANES);
    for (long k = 0; k < terms; ++k) {
        ahead.template fetch<V * LANES, 1>(k);
        if constexpr (R == 1) {  // no register may wait
            const vec x = broadcast(a[0][k]);
            for (int v = 0; v < V; ++v) total[0][v] = fused(x, load(b + k * N + v * LANES), total[0][v]);
            continue;
        }
        vec w[V];
        for (int v = 0; v < V; ++v) w[v] = kept(load(b + k * N + v * LANES));
        for (int r = 0; r < R; ++r) {
            const vec x = broadcast(a[r][k]);
            for (int v = 0; v < V; ++v) total[r][v] = fused(x, w[v], total[r][v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(c[r] + v * LANES, total[r][v]);
}

// A number of vectors, at most V, known at run time only.
template <int R, int V, class B, class W>
inline void column_vectors(long vectors, const float* const* a, const B* b, long terms, long N, bool more,
                           const Ahead<W>& ahead, float* const* c) {
    if constexpr (V > 0) {
        if (vectors == V) column_block<R, V>(a, b, terms, N, more, ahead, c);
        else column_vectors<R, V - 1>(vectors, a, b, terms, N, more, ahead, c);
    }
}

template <int R, class B>
inline void column_rest(const float* const* a, const B* b, long terms, long N, long columns, bool more,
                        float* const* c) {
    for (int r = 0; r < R; ++r)
        for (long j = 0; j < columns; ++j) {
            float total = more ? c[r][j] : 0;
            for (long k = 0; k < terms; ++k) total = fused(a[r][k], value(b + k * N + j), total);
            c[r][j] = total;
        }
}

// The last few columns before b's and c's, by a whole vector that begins among their neighbours, whose sums it leaves
// alone.
template <int R, class B, class W>
inline void column_tail(const float* const* a, const B* b, long terms, long N, long columns, bool more,
                        const Ahead<W>& ahead, float* const* c) {
    float sums[R][LANES];
    float* at[R];
    for (int r = 0; r < R; ++r) {
        at[r] = sums[r];
        std::memcpy(sums[r], c[r] - LANES, sizeof sums[r]);
    }
    column_block<R, 1>(a, b - LANES, terms, N, more, ahead, at);
    for (int r = 0; r < R; ++r) std::memcpy(c[r] - columns, sums[r] + LANES - columns, columns * sizeof(float));
}

// Columns [begin, end) of R rows, V vectors at once as long as there are so many. b begins with them, c with all.
template <int R, int V, class B, class W>
void column_range(const float* const* a, const B* b, long N, const Part<W>& part, long begin, long end, Tile tile,
                  float* const* c) {
    const long terms = part.terms, width = V * LANES, vectors = (end - begin) % width / LANES;
    float* at[R];
    const auto shifted = [&](long j) {
        for (int r = 0; r < R; ++r) at[r] = c[r] + j;
        return at;
    };
    long j = begin;
    for (; j + width <= end; j += width)
        column_block<R, V>(a, b + j - begin, terms, N, part.more, part.ahead(j, width, 1, tile), shifted(j));
    if (vectors > 0) {
        const Ahead<W> ahead = part.ahead(j, vectors * LANES, 1, tile);
        column_vectors<R, V - 1>(vectors, a, b + j - begin, terms, N, part.more, ahead, shifted(j));
        j += vectors * LANES;
    }
    if (j == end) return;
    const Ahead<W> ahead = part.ahead(j, end - j, 1, tile);
    if (end - begin < LANES) column_rest<R>(a, b, terms, N, end - j, part.more, shifted(j));
    else column_tail<R>(a, b + end - begin, terms, N, end - j, part.more, ahead, shifted(end));
}

// Columns [begin, end) of all rows.
template <class B, class W>
void column_part(const float* const* a, long rows, const B* b, long N, const Part<W>& part, long begin, long end,
                 float* const* c) {
    constexpr int W4 = LANES == 16 ? 6 : 3, W2 = LANES == 16 ? 12 : 4, W1 = 12;  // by registers
    Tile tile{0, (rows + 3) / 4};
    for (; tile.number < rows / 4; ++tile.number, a += 4, c += 4)
        column_range<4, W4>(a, b, N, part, begin, end, tile, c);
    if (rows % 4 == 3) column_range<3, W4>(a, b, N, part, begin, end, tile, c);
    if (rows % 4 == 2) column_range<2, W2>(a, b, N, part, begin, end, tile, c);
    if (rows % 4 == 1) column_range<1, W1>(a, b, N, part, begin, end, tile, c);
}

// The same stripe by stripe with weights copied together, for many rows.
template <class W>
void column_stripes(const float* const* a, long rows, const Part<W>& part, long begin, long end, float* const* c) {
    float panel[PART * STRIPE];
    for (long from = begin; from < end; from += STRIPE) {
        const long to = std::min(end, from + STRIPE), columns = to - from;
        for (long k = 0; k < part.terms; ++k) {
            float* copy = panel + k * columns;
            const W* row = part.b + k * part.N + from;
            long j = 0;
            for (; j + LANES <= columns; j += LANES) store(copy + j, load(row + j));
            for (; j < columns; ++j) copy[j] = value(row + j);
        }
        column_part(a, rows, panel, columns, part, from, to, c);
    }
}

// Columns [begin, end) of rows by weights [K, N]. then: what will be read after these weights.
template <class W>
void row_products(const float* const* rows_of_terms, long rows, const W* b, long K, long N, long begin, long end,
                  const W* then, float* const* c) {
    const bool packed = rows >= PACKED_ROWS;
    std::vector<const float*> a(rows);
    in_parts(b, K, N, packed ? PART : FEW_PART, begin == 0 && end == N, then, [&](const Part<W>& part, long first) {
        for (long r = 0; r < rows; ++r) a[r] = rows_of_terms[r] + first;
        if (packed) column_stripes(a.data(), rows, part, begin, end, c);
        else column_part(a.data(), rows, part.b + begin, N, part, begin, end, c);
    });
}

// Products with weights [N, K], their rows a stride apart: LANES accumulators an output, over k in ascending order.

// Nothing to fetch.
struct NothingAhead {
    template <long columns, int rows>
    void fetch(long) const {}
};

template <int R, int C, class W, class A>
inline void dot_block(const float* const* a, const W* b, long K, long stride, const A& ahead, float* const* c) {
    vec total[R][C] = {};
    long k = 0;
    for (; k + LANES <= K; k += LANES) {
        ahead.template fetch<C * LANES, 1>(k / LANES);
        if constexpr (R < C) {  // the fewer stay in registers
            vec x[R];
            for (int r = 0; r < R; ++r) x[r] = kept(load(a[r] + k));
            for (int j = 0; j < C; ++j) {
                const vec w = load(b + j * stride + k);
                for (int r = 0; r < R; ++r) total[r][j] = fused(x[r], w, total[r][j]);
            }
        } else {
            vec w[C];
            for (int j = 0; j < C; ++j) w[j] = kept(load(b + j * stride + k));
            for (int r = 0; r < R; ++r) {
                const vec x = load(a[r] + k);
                for (int j = 0; j < C; ++j) total[r][j] = fused(x, w[j], total[r][j]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < C; ++j) c[r][j] = sum(total[r][j]);  // by itself: else compilers keep sums in memory
    if (k == K) return;
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < C; ++j) {
            float rest = 0;
            for (long i = k; i < K; ++i) rest = fused(a[r][i], value(b + j * stride + i), rest);
            c[r][j] += rest;
        }
}

constexpr long DOT_STRIPE = 24;  // columns that all rows are multiplied by in turn; a multiple of all C below

// Columns [begin, end) of R rows, C at once as long as there are so many; those that come next are fetched meanwhile.
template <int R, int C, class W>
void dot_range(const float* const* a, const W* b, long K, long begin, long end, Tile tile, float* const* c) {
    float* at[R];
    const auto shifted = [&](long j) {
        for (int r = 0; r < R; ++r) at[r] = c[r] + j;
        return at;
    };
    const long distance = tile.count == 1 ? C : DOT_STRIPE, skipped = tile.number * (K / LANES) / tile.count;
    long j = begin;
    for (; j + C <= end; j += C) {
        const Ahead<W> ahead{b + (j + distance) * K + skipped * C * LANES, C * LANES, 256 / tile.count};
        dot_block<R, C>(a, b + j * K, K, K, ahead, shifted(j));
    }
    for (; j < end; ++j) dot_block<R, 1>(a, b + j * K, K, K, NothingAhead(), shifted(j));
}

template <class W>
void dot_products(const float* const* a, long rows, const W* b, long K, long begin, long end, float* const* c) {
    const long stripe = rows > 4 ? DOT_STRIPE : end - begin;
    for (; begin < end; begin += stripe) {
        const long to = std::min(end, begin + stripe);
        Tile tile{0, (rows + 3) / 4};
        for (; tile.number < rows / 4; ++tile.number) {
            const long r = 4 * tile.number;
            dot_range<4, 3>(a + r, b, K, begin, to, tile, c + r);
        }
        const long r = 4 * tile.number;
        if (rows - r == 3) dot_range<3, 4>(a + r, b, K, begin, to, tile, c + r);
        if (rows - r == 2) dot_range<2, 4>(a + r, b, K, begin, to, tile, c + r);
        if (rows - r == 1) dot_range<1, 8>(a + r, b, K, begin, to, tile, c + r);
    }
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
