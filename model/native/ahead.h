// Fetching memory before it is needed: what a product reads next, while it computes.

#pragma once

#include <algorithm>
#include <cstdint>

namespace {

// Rows of weights, a stride apart: share / 256 of a row a step, and always whole ones.
template <class W>
struct Ahead {
    const W* at;
    long stride, share;

    template <long columns, int rows>
    void fetch(long step) const {
        const W* row = at + long(uint64_t(step * share) / 256) * stride;
        for (int r = 0; r < rows; ++r)
            for (long i = 0; i < columns; i += 64 / long(sizeof(W))) __builtin_prefetch(row + r * stride + i, 0, 2);
    }
};

// One of so many tiles of rows that are multiplied by the same weights, each of which fetches its share.
struct Tile {
    long number = 0, count = 1;
};

// Some terms of a product with weights [K, N], and what to fetch meanwhile: the same columns of the next terms or, when
// all columns are wanted, whatever comes next in memory.
template <class W>
struct Part {
    const W* b;  // the first term's weights
    long terms, N;
    const W* next;  // the weights of the next part's first term
    bool whole;     // all columns are wanted
    bool more;      // sums have begun

    // While these columns are multiplied, so many terms a step.
    Ahead<W> ahead(long j, long columns, long terms_a_step, Tile tile = {}) const {
        const long stride = whole ? columns : N;
        const W* at = whole ? next + j * terms : next + j;
        return {at + tile.number * terms / tile.count * stride, stride, 256 * terms_a_step / tile.count};
    }
};

// All terms of weights [K, N], some at a time: work(part, first) with the number of the part's first term. then: what
// will be read after these weights.
template <class W, class Work>
void in_parts(const W* b, long K, long N, long step, bool whole, const W* then, const Work& work) {
    for (long first = 0; first < K; first += step) {
        const long terms = std::min(step, K - first);
        const W *at = b + first * N, *next = first + terms < K ? at + terms * N : then;
        work(Part<W>{at, terms, N, next, whole, first > 0}, first);
    }
}

}  // namespace
