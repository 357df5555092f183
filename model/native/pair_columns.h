// Products of rows of pairs with weights [K, N].

#pragma once

#include <algorithm>
#include <vector>

#include "ahead.h"
#include "pairs.h"

#ifdef MOTSERVE_PAIRS

namespace {

constexpr long PAIR_COLUMNS = 32;  // columns of two rows of weights that interleave to two vectors of pairs

// Interleaving works within quarters of a vector: the first holds columns 0-3, 8-11, 16-19 and 24-27, the second the
// others. These bring sums of two such vectors in order, and back.
inline void in_order(__m512& first, __m512& second) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    const __m512 a = first, b = second;
    first = _mm512_permutex2var_ps(a, low, b);
    second = _mm512_permutex2var_ps(a, high, b);
}

inline void interleaved(__m512& first, __m512& second) {
    const __m512i even = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const __m512i odd = _mm512_setr_epi32(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    const __m512 a = first, b = second;
    first = _mm512_permutex2var_ps(a, even, b);
    second = _mm512_permutex2var_ps(a, odd, b);
}

// Where a product finds its weights' pairs: in the rows of the weights themselves,
template <class W>
struct WeightRows {
    const W* b;
    long N;

    void pairs(long k, long v, __m512i& first, __m512i& second) const {
        const W* at = b + 2 * k * N + v * PAIR_COLUMNS;
        const __m512i even = halves(at), odd = halves(at + N);
        first = _mm512_unpacklo_epi16(even, odd);
        second = _mm512_unpackhi_epi16(even, odd);
    }
};

// in an odd number's last row, or in the last columns, fewer than a vector,
template <class W>
struct WeightRest {
    const W* b;
    long N, terms;
    __mmask32 mask;

    void pairs(long k, long v, __m512i& first, __m512i& second) const {
        const W* at = b + 2 * k * N + v * PAIR_COLUMNS;
        const __m512i even = masked(at, mask);
        const __m512i odd = 2 * k + 1 < terms ? masked(at + N, mask) : _mm512_setzero_si512();
        first = _mm512_unpacklo_epi16(even, odd);
        second = _mm512_unpackhi_epi16(even, odd);
    }
};

// or copied together.
constexpr long PANEL_COLUMNS = 64;

struct PackedPairs {
    const __m512i* panel;

    void pairs(long k, long v, __m512i& first, __m512i& second) const {
        const __m512i* at = panel + k * (PANEL_COLUMNS / 16) + 2 * v;
        first = _mm512_load_si512(at), second = _mm512_load_si512(at + 1);
    }
};

// R rows by V times PAIR_COLUMNS columns over so many pairs of terms; with more, going on from the sums in c.
template <class W, int R, int V, class Weights>
inline void pair_block(const uint32_t* const* a, long pairs, const Weights& weights, bool more, const Ahead<W>& ahead,
                       float* const* c) {
    typedef Paired<W> P;
    typename P::sums total[R][2 * V] = {};
    if (more)
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) {
                __m512 first = _mm512_loadu_ps(c[r] + 2 * v * 16), second = _mm512_loadu_ps(c[r] + (2 * v + 1) * 16);
                interleaved(first, second);
                from_floats(first, total[r][2 * v]), from_floats(second, total[r][2 * v + 1]);
            }
    for (long k = 0; k < pairs; ++k) {
        ahead.template fetch<V * PAIR_COLUMNS, 2>(k);
        if constexpr (R <= V) {
            __m512i x[R];
            for (int r = 0; r < R; ++r) x[r] = _mm512_set1_epi32(a[r][k]);
            for (int v = 0; v < V; ++v) {
                __m512i first, second;
                weights.pairs(k, v, first, second);
                for (int r = 0; r < R; ++r) {
                    total[r][2 * v] = P::step(total[r][2 * v], first, x[r]);
                    total[r][2 * v + 1] = P::step(total[r][2 * v + 1], second, x[r]);
                }
            }
        } else {
            __m512i w[2 * V];
            for (int v = 0; v < V; ++v) weights.pairs(k, v, w[2 * v], w[2 * v + 1]);
            for (int r = 0; r < R; ++r) {
                const __m512i x = _mm512_set1_epi32(a[r][k]);
                for (int v = 0; v < 2 * V; ++v) total[r][v] = P::step(total[r][v], w[v], x);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
            __m512 first = as_floats(total[r][2 * v]), second = as_floats(total[r][2 * v + 1]);
            in_order(first, second);
            _mm512_storeu_ps(c[r] + 2 * v * 16, first), _mm512_storeu_ps(c[r] + (2 * v + 1) * 16, second);
        }
}

constexpr long PAIR_PART = 128;       // terms whose products are added up at once
constexpr long PAIR_FEW_PART = 64;    // the same without copying, so that what is fetched ahead is soon needed
constexpr long PAIR_PACKED_ROWS = 7;  // from so many rows on, weights are copied together before use
constexpr long PAIR_TILE = 6;         // rows at once, by registers

// Fewer columns than a block has: by a copy of their sums, filled up.
template <class W, int R, class Weights>
void pair_tail(const uint32_t* const* a, long pairs, const Weights& weights, long columns, bool more,
               const Ahead<W>& ahead, float* const* c) {
    float sums[R][PAIR_COLUMNS] = {};
    float* at[R];
    for (int r = 0; r < R; ++r) {
        at[r] = sums[r];
        if (more) std::memcpy(sums[r], c[r], columns * sizeof(float));
    }
    pair_block<W, R, 1>(a, pairs, weights, more, ahead, at);
    for (int r = 0; r < R; ++r) std::memcpy(c[r], sums[r], columns * sizeof(float));
}

// R rows, from the weights' own rows: V blocks of columns at once as long as there are so many, then half as many.
template <class W, int R, int V>
void pair_range(const uint32_t* const* a, const Part<W>& part, long begin, long end, float* const* c) {
    constexpr long width = V * PAIR_COLUMNS;
    const uint32_t* last[R];
    for (int r = 0; r < R; ++r) last[r] = a[r] + part.terms / 2;
    float* at[R];
    long j = begin;
    for (; j + width <= end; j += width) {
        for (int r = 0; r < R; ++r) at[r] = c[r] + j;
        const WeightRows<W> weights{part.b + j, part.N};
        pair_block<W, R, V>(a, part.terms / 2, weights, part.more, part.ahead(j, width, 2), at);
        if (part.terms % 2) {
            const WeightRest<W> rest{part.b + (part.terms - 1) * part.N + j, part.N, 1, 0xffffffff};
            pair_block<W, R, V>(last, 1, rest, part.more || part.terms > 1, part.ahead(j, width, 2), at);
        }
    }
    if (j == end) return;
    if constexpr (V > 1) {
        pair_range<W, R, V / 2>(a, part, j, end, c);
    } else {
        for (int r = 0; r < R; ++r) at[r] = c[r] + j;
        const WeightRest<W> rest{part.b + j, part.N, part.terms, (1u << (end - j)) - 1};
        pair_tail<W, R>(a, (part.terms + 1) / 2, rest, end - j, part.more, part.ahead(j, end - j, 2), at);
    }
}

// Up to PAIR_TILE rows by a panel of at most PANEL_COLUMNS columns that has been copied together.
template <class W, int R>
void pair_panel(long rows, const uint32_t* const* a, long pairs, const __m512i* panel, long columns, bool more,
                const Ahead<W>& ahead, float* const* c) {
    if constexpr (R > 1) {
        if (rows < R) return pair_panel<W, R - 1>(rows, a, pairs, panel, columns, more, ahead, c);
    }
    constexpr long V = PANEL_COLUMNS / PAIR_COLUMNS;
    const PackedPairs weights{panel};
    if (columns == PANEL_COLUMNS) return pair_block<W, R, V>(a, pairs, weights, more, ahead, c);
    if (columns < PAIR_COLUMNS) return pair_tail<W, R>(a, pairs, weights, columns, more, ahead, c);
    pair_block<W, R, 1>(a, pairs, weights, more, ahead, c);
    if (columns == PAIR_COLUMNS) return;
    float* at[R];
    for (int r = 0; r < R; ++r) at[r] = c[r] + PAIR_COLUMNS;
    pair_tail<W, R>(a, pairs, PackedPairs{panel + 2}, columns - PAIR_COLUMNS, more, ahead, at);
}

template <class W>
void pack_panel(const Part<W>& part, long j, long columns, __m512i* panel) {
    for (long v = 0; v < columns; v += PAIR_COLUMNS, panel += 2) {
        const __mmask32 mask = columns - v < PAIR_COLUMNS ? (1u << (columns - v)) - 1 : 0xffffffff;
        const WeightRest<W> rest{part.b + j + v, part.N, part.terms, mask};
        const WeightRows<W> rows{part.b + j + v, part.N};
        for (long k = 0; 2 * k < part.terms; ++k) {
            __m512i* to = panel + k * (PANEL_COLUMNS / 16);
            if (mask == 0xffffffff && 2 * k + 1 < part.terms) rows.pairs(k, 0, to[0], to[1]);
            else rest.pairs(k, 0, to[0], to[1]);
        }
    }
}

// The same with weights copied together, panel by panel, for many rows.
template <class W>
void pair_panels(const uint32_t* const* a, long rows, const Part<W>& part, long begin, long end, float* const* c) {
    alignas(64) __m512i panel[PAIR_PART / 2 * PANEL_COLUMNS / 16];
    const long tiles = (rows + PAIR_TILE - 1) / PAIR_TILE;
    std::vector<float*> at(rows);
    for (long j = begin; j < end; j += PANEL_COLUMNS) {
        const long columns = std::min(PANEL_COLUMNS, end - j);
        pack_panel(part, j, columns, panel);
        for (long r = 0; r < rows; ++r) at[r] = c[r] + j;
        for (long tile = 0; tile < tiles; ++tile) {
            const Ahead<W> ahead = part.ahead(j, columns, 2, {tile, tiles});
            const long from = tile * rows / tiles, to = (tile + 1) * rows / tiles;
            pair_panel<W, PAIR_TILE>(to - from, a + from, (part.terms + 1) / 2, panel, columns, part.more, ahead,
                                     &at[from]);
        }
    }
}

// Columns [begin, end) of rows of pairs by weights [K, N]: sums, not yet results, in c. then: what will be read after
// these weights.
template <class W>
void pair_products(const uint32_t* const* rows_of_pairs, long rows, const W* b, long K, long N, long begin, long end,
                   const W* then, float* const* c) {
    const bool packed = rows >= PAIR_PACKED_ROWS;
    const long step = packed ? PAIR_PART : PAIR_FEW_PART;
    std::vector<const uint32_t*> a(rows);
    in_parts(b, K, N, step, begin == 0 && end == N, then, [&](const Part<W>& part, long first) {
        for (long r = 0; r < rows; ++r) a[r] = rows_of_pairs[r] + first / 2;
        if (packed) pair_panels(a.data(), rows, part, begin, end, c);
        if (rows == 6) pair_range<W, 6, 2>(a.data(), part, begin, end, c);
        if (rows == 5) pair_range<W, 5, 2>(a.data(), part, begin, end, c);
        if (rows == 4) pair_range<W, 4, 2>(a.data(), part, begin, end, c);
        if (rows == 3) pair_range<W, 3, 2>(a.data(), part, begin, end, c);
        if (rows == 2) pair_range<W, 2, 4>(a.data(), part, begin, end, c);
        if (rows == 1) pair_range<W, 1, 8>(a.data(), part, begin, end, c);
    });
}

}  // namespace

#endif
