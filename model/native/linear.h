// Rows by a matrix of weights, in the processor's tiles or pairs where it has them for the type.

#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "pair_columns.h"
#include "pair_dots.h"
#include "products.h"
#include "team.h"
#include "tiles.h"

namespace {

// Rows made ready for products in pairs.
class PackedRows {
   public:
    template <class W>
    void pack(const float* const* in, long count, long K) {
        const long width = (K + 1) / 2;
        pairs_.resize(std::max(pairs_.size(), size_t(count * width)));
        rows.resize(count), scales.resize(count);
        for (long r = 0; r < count; ++r) {
            Paired<W>::pack(in[r], K, &pairs_[r * width], &scales[r]);
            rows[r] = &pairs_[r * width];
        }
    }

    std::vector<const uint32_t*> rows;
    std::vector<float> scales;  // of integers

   private:
    std::vector<uint32_t> pairs_;
};

// Rows by weights [K, N] and, where there are scales, by those of the columns. then: what will be read next.
template <class W>
void product(const float* const* in, long rows, const W* b, long K, long N, const float* scales, const W* then,
             float* const* out, PackedRows& packed) {
    if constexpr (Paired<W>::here) {
        packed.pack<W>(in, rows, K);
        pair_products(packed.rows.data(), rows, b, K, N, 0, N, then, out);
        for (long r = 0; r < rows; ++r) Paired<W>::finish(out[r], N, packed.scales[r], scales);
    } else {
        row_products(in, rows, b, K, N, 0, N, then, out);
        if (scales == nullptr) return;
        for (long r = 0; r < rows; ++r)
            for (long j = 0; j < N; ++j) out[r][j] *= scales[j];
    }
}

// Columns that one thread takes at once, whole units: few enough for all of them to have some.
inline long stripe_of(long N, long unit) { return std::max(unit, std::min(256L, N / 4 / unit * unit)); }

template <class W>
void paired_stripe(const PackedRows& packed, long rows, const W* weight, long K, long N, long begin, long end,
                   bool by_output, float* const* out) {
    if constexpr (Paired<W>::here) {
        if (by_output) pair_dot_products(packed.rows.data(), rows, weight, K, begin, end, out);
        else pair_products(packed.rows.data(), rows, weight, K, N, begin, end, weight + end, out);
    }
}

// What is added to products: the bias of each column, and rows of results [rows, N]; either may be null.
template <class W>
struct Added {
    const W* bias;
    const float* onto;

    void to(const std::vector<float*>& rows, long N, long begin, long end) const {
        for (size_t r = 0; r < rows.size(); ++r) {
            float* row = rows[r];
            if (bias != nullptr)
                for (long j = begin; j < end; ++j) row[j] += value(bias + j);
            if (onto != nullptr)
                for (long j = begin; j < end; ++j) row[j] += onto[r * N + j];
        }
    }
};

#ifdef MOTSERVE_TILES
// By weights [N, K] (by_output) or [K, N] in tiles.
inline void linear_in_tiles(const float* x, const bf16* weight, const Added<bf16>& added, float* out, long rows, long K,
                            long N, bool by_output) {
    const auto from = row_pointers(x, rows, K);
    const auto to = row_pointers(out, rows, N);
    TileRows packed;
    packed.reserve(rows, K);
    const long stripe = stripe_of(N, 2 * TILE), stripes = (N + stripe - 1) / stripe;
    together(rows * K * N > SERIAL, [&](Member& member) {
        const TilesInUse tiles;
        TileMemory memory;
        uint32_t* copy = by_output ? memory.words(4 * packed.steps * TILE_WORDS) : nullptr;
        member.each(packed.tiles, 1, [&](long t) { packed.pack_tiles(from.data(), K, t, by_output); });
        member.wait();
        member.each(stripes, 1, [&](long s) {
            const long begin = s * stripe, end = std::min(N, begin + stripe);
            if (by_output) tile_dots(packed, weight, K, N, begin, end, copy, to.data());
            else tiled_products(packed, weight, begin, end, ToRows{to.data()});
            added.to(to, N, begin, end);
        });
    });
}
#endif

// How the weights of a linear layer lie.
enum Order { BY_INPUT, BY_OUTPUT, IN_TILES };  // [K, N], [N, K], [K, N] as model/tiles.py puts them

// exact: rows are not rounded, whatever the weights are.
template <class W>
void linear(const float* x, const W* weight, const Added<W>& added, float* out, long rows, long K, long N, Order order,
            bool exact) {
    const bool by_output = order == BY_OUTPUT;
#ifdef MOTSERVE_TILES
    if constexpr (std::is_same_v<W, bf16>)
        if (order == IN_TILES || (by_output && !exact && tiles_here() && K % TERMS == 0 && N >= 2 * TILE))
            return linear_in_tiles(x, weight, added, out, rows, K, N, by_output);
#endif
    const auto from = row_pointers(x, rows, K);
    const auto to = row_pointers(out, rows, N);
    PackedRows packed;
    if constexpr (Paired<W>::here)
        if (!exact) packed.pack<W>(from.data(), rows, K);
    const bool paired = Paired<W>::here && !exact;
    const long stripe = paired ? stripe_of(N, 64) : STRIPE, stripes = (N + stripe - 1) / stripe;
    for_each(rows * K * N > SERIAL, stripes, 1, [&](long s) {
        const long begin = s * stripe, end = std::min(N, begin + stripe);
        if (paired) paired_stripe(packed, rows, weight, K, N, begin, end, by_output, to.data());
        else if (by_output) dot_products(from.data(), rows, weight, K, begin, end, to.data());
        else row_products(from.data(), rows, weight, K, N, begin, end, weight + end - begin, to.data());
        added.to(to, N, begin, end);
    });
}

}  // namespace
