// The experts of one layer on their rows: all of them, or each row's own.

#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "activations.h"
#include "linear.h"
#include "quad_tiles.h"

namespace {

enum Weights { FLOAT32, BFLOAT16, INT8 };
constexpr int TILES = 4;  // added where they lie as model/tiles.py puts them

// What a thread needs to run experts, kept from one to the next.
class Scratch {
   public:
#ifdef MOTSERVE_TILES
    explicit Scratch(bool tiles) {
        if (tiles) in_use_.emplace();
    }
    TileRows tile_rows, hidden_tiles;
    QuadRows quad_rows;
#else
    explicit Scratch(bool) {}
#endif
    PackedRows packed;

    float* const* rows_of(long rows, long width) {
        hidden_.resize(std::max(hidden_.size(), size_t(rows * width)));
        at_ = row_pointers(hidden_.data(), rows, width);
        return at_.data();
    }

   private:
#ifdef MOTSERVE_TILES
    std::optional<TilesInUse> in_use_;
#endif
    std::vector<float> hidden_;
    std::vector<float*> at_;
};

// The experts of one layer. Scales, by output, are for int8 weights; null otherwise.
template <class W>
struct Experts {
    const W* lin1;        // [E, D, S]
    const W* lin2;        // [E, S, D]; in tiles an expert's follows its part of lin1
    const float* scale1;  // [E, S]
    const float* scale2;  // [E, D]
    long D, S;
    int activation;
    bool tiles;  // the order of the weights

    // Expert e on its rows.
    void run(long e, const float* const* in, float* const* out, long rows, Scratch& scratch) const {
        if (rows == 0) return;
#ifdef MOTSERVE_TILES
        if (tiles) {
            if constexpr (std::is_same_v<W, bf16>) {
                scratch.tile_rows.pack(in, rows, D, false);
                return run_tiles(e, scratch.tile_rows, ToRows{out}, scratch);
            }
            if constexpr (std::is_same_v<W, int8_t>) return run_tiles(e, in, rows, ToRows{out}, scratch);
        }
#endif
        const W *first = lin1 + e * D * S, *second = lin2 + e * D * S;
        float* const* hidden = scratch.rows_of(rows, S);
        product(in, rows, first, D, S, scales(scale1, e, S), second, hidden, scratch.packed);
        activate(hidden[0], rows * S, activation);
        product(hidden, rows, second, S, D, scales(scale2, e, D), first + D * S, out, scratch.packed);
    }

#ifdef MOTSERVE_TILES
    // Expert e on rows that are in tiles already.
    template <class To>
    void run_tiles(long e, const TileRows& rows, const To& to, Scratch& scratch) const {
        TileRows& hidden = scratch.hidden_tiles;
        hidden.reserve(rows.count, S);
        with_activation(activation, [&](auto function) {
            tiled_products(rows, lin1 + 2 * e * D * S, 0, S, [&](long row, long unit, __m512 numbers) {
                hidden.put(row, unit, (__m512)function((vec)numbers));
            });
        });
        tiled_products(hidden, lin2 + 2 * e * D * S, 0, D, to);
    }

    template <class To>
    void run_tiles(long e, const float* const* in, long rows, const To& to, Scratch& scratch) const {
        float* const* hidden = scratch.rows_of(rows, S);
        scratch.quad_rows.pack(in, rows, D);
        quad_products(scratch.quad_rows, lin1 + 2 * e * D * S, scales(scale1, e, S), S, ToRows{hidden});
        activate(hidden[0], rows * S, activation);
        scratch.quad_rows.pack(hidden, rows, S);
        quad_products(scratch.quad_rows, lin2 + 2 * e * D * S, scales(scale2, e, D), D, to);
    }
#endif

   private:
    static const float* scales(const float* of_all, long e, long count) {
        return of_all == nullptr ? nullptr : of_all + e * count;
    }
};

// Calls use with the experts of a type known at run time only.
template <class F>
void with_experts(const void* lin1, const void* lin2, const float* scale1, const float* scale2, long D, long S,
                  int activation, int weights, F use) {
    const auto typed = [&](auto* first, auto* second) {
        typedef std::remove_const_t<std::remove_pointer_t<decltype(first)>> W;
        use(Experts<W>{first, second, scale1, scale2, D, S, activation, (weights & TILES) != 0});
    };
    if ((weights & ~TILES) == INT8) typed(static_cast<const int8_t*>(lin1), static_cast<const int8_t*>(lin2));
    else if (weights == FLOAT32) typed(static_cast<const float*>(lin1), static_cast<const float*>(lin2));
    else typed(static_cast<const bf16*>(lin1), static_cast<const bf16*>(lin2));
}

// Rows of every expert [E, n, D], experts and rows so many floats apart.
struct Layout {
    long experts, rows;
};

template <class W>
void bank(const Experts<W>& experts, const float* mixes, float* out, Layout apart, long E, long n) {
    together(true, [&](Member& member) {
        Scratch scratch(experts.tiles);
        member.each(E, 1, [&](long e) {
            const auto from = row_pointers(mixes + e * apart.experts, n, apart.rows);
            const auto to = row_pointers(out + e * apart.experts, n, apart.rows);
            experts.run(e, from.data(), to.data(), n, scratch);
        });
    });
}

struct Pair {
    long row, expert;
    float emit;
};

// Answers by their weights, added up: experts in ascending order for every row; threads share columns out, never one
// sum. Zeros for a row without answers.
inline void add_up(const std::vector<Pair>& pairs, const float* answers, float* out, long n, long D) {
    std::fill(out, out + n * D, 0.0f);
    for_each(true, (D + 63) / 64, 1, [&](long part) {
        const long d = part * 64, end = std::min(D, d + 64);
        for (size_t p = 0; p < pairs.size(); ++p) {
            float* to = out + pairs[p].row * D;
            const float* answer = answers + p * D;
            for (long i = d; i < end; ++i) to[i] = fused(pairs[p].emit, answer[i], to[i]);
        }
    });
}

}  // namespace
