// A whole layer of shared groups: mixes, experts, redistribution. For few groups, whose members stay in a cache: mixes
// are made beside the weights that they meet, while memory is the limit, and never all at once.

#pragma once

#include <algorithm>
#include <vector>

#include "experts.h"
#include "group_tiles.h"

namespace {

constexpr long TOGETHER = 4;  // sums that are made at once, of what is loaded once

// sums[k] += weights[k * sum + i * term] * in[i * apart] over all terms i, for columns [begin, end) and count values of
// k. Terms in order, whatever is computed beside.
template <long count>
inline void weighted_sums(const float* weights, long sum, long term, const float* in, long terms, long apart, long begin,
                          long end, float* sums, long sums_apart) {
    long j = begin;
    for (; j + 2 * LANES <= end; j += 2 * LANES) {
        vec total[count][2] = {};
        for (long i = 0; i < terms; ++i) {
            const vec low = load(in + i * apart + j), high = load(in + i * apart + j + LANES);
            for (long k = 0; k < count; ++k) {
                const vec by = broadcast(weights[k * sum + i * term]);
                total[k][0] = fused(by, low, total[k][0]);
                total[k][1] = fused(by, high, total[k][1]);
            }
        }
        for (long k = 0; k < count; ++k) {
            store(sums + k * sums_apart + j, total[k][0]);
            store(sums + k * sums_apart + j + LANES, total[k][1]);
        }
    }
    for (; j < end; ++j)
        for (long k = 0; k < count; ++k) {
            float total = 0;
            for (long i = 0; i < terms; ++i) total = fused(weights[k * sum + i * term], in[i * apart + j], total);
            sums[k * sums_apart + j] = total;
        }
}

// The same for any number of sums.
inline void all_weighted_sums(const float* weights, long sum, long term, const float* in, long terms, long apart,
                              long begin, long end, float* sums, long sums_apart, long count) {
    long k = 0;
    for (; k + TOGETHER <= count; k += TOGETHER)
        weighted_sums<TOGETHER>(weights + k * sum, sum, term, in, terms, apart, begin, end, sums + k * sums_apart,
                                sums_apart);
    for (; k < count; ++k)
        weighted_sums<1>(weights + k * sum, sum, term, in, terms, apart, begin, end, sums + k * sums_apart, sums_apart);
}

// Members [n, G, D]; the weights that mix and redistribute [n, G, E]; rows [n * G] of what members belong to, null where
// nobody asks, to which is added what they get. Room for answers [n, E, D] and for what members get [n, G, D]; the former
// for GroupTiles where these are used.
struct SharedLayer {
    long n, G, E;
    const float *members, *weights;
    float *answers, *out;
    float* const* rows;
};

#ifdef MOTSERVE_TILES
// The mixes of 16 experts, as their products take them.
template <class W>
struct BlockMixes;

template <>
struct BlockMixes<bf16> {
    TileRows rows[TILE];

    BlockMixes(long n, long D) {
        for (TileRows& some : rows) some.reserve(n, D);
    }
    void put(long e, long group, long column, __m512 numbers) { rows[e].put(group, column, numbers); }
    template <class To>
    void run(const Experts<bf16>& experts, long expert, long e, const To& to, Scratch& scratch) {
        experts.run_tiles(expert, rows[e], to, scratch);
    }
};

template <>
struct BlockMixes<int8_t> {
    const long n, D;
    std::vector<float> rows;

    BlockMixes(long n, long D) : n(n), D(D), rows(TILE * n * D) {}
    void put(long e, long group, long column, __m512 numbers) {
        _mm512_storeu_ps(&rows[(e * n + group) * D + column], numbers);
    }
    template <class To>
    void run(const Experts<int8_t>& experts, long expert, long e, const To& to, Scratch& scratch) {
        const auto from = row_pointers(static_cast<const float*>(&rows[e * n * D]), n, D);
        experts.run_tiles(expert, from.data(), n, to, scratch);
    }
};

template <class W>
void shared_layer_in_tiles(const Experts<W>& experts, const SharedLayer& l) {
    const long D = experts.D;
    const GroupTiles groups(l.n, l.G, D, l.E, reinterpret_cast<uint32_t*>(l.answers));
    const long columns = 4 * TILE, parts = tiles_of(D, columns);
    together(true, [&](Member& member) {
        Scratch scratch(true);
        BlockMixes<W> mixes(l.n, D);
        member.each(l.n, 0, [&](long g) { groups.pack(g, l.members + g * l.G * D, l.weights + g * l.G * l.E); });
        member.wait();
        member.each(tiles_of(l.E, TILE), 1, [&](long block) {
            const long first = block * TILE;
            for (long g = 0; g < l.n; ++g)
                groups.mix(g, first, [&](long e, long column, __m512 numbers) { mixes.put(e, g, column, numbers); });
            for (long e = 0; e < std::min(TILE, l.E - first); ++e)
                mixes.run(experts, first + e, e, GroupTiles::Answers{groups, first + e}, scratch);
        });
        member.wait();
        member.each(l.n * parts, 0, [&](long task) {
            const long g = task / parts, j = task % parts * columns;
            groups.share_out(g, j, std::min(D, j + columns), l.rows + g * l.G);
        });
    });
}
#endif

template <class W>
void shared_layer(const Experts<W>& experts, const SharedLayer& l) {
#ifdef MOTSERVE_TILES
    if constexpr (!std::is_same_v<W, float>)
        if (experts.tiles && GroupTiles::worth_it(l.G)) return shared_layer_in_tiles(experts, l);
#endif
    const long D = experts.D, columns = 8 * LANES, parts = (D + columns - 1) / columns;
    together(true, [&](Member& member) {
        Scratch scratch(experts.tiles);
        std::vector<float> mixes(l.n * TOGETHER * D);  // [n, experts, D]
        member.each((l.E + TOGETHER - 1) / TOGETHER, 1, [&](long block) {
            const long first = block * TOGETHER, count = std::min(TOGETHER, l.E - first);
            for (long g = 0; g < l.n; ++g)
                all_weighted_sums(l.weights + g * l.G * l.E + first, 1, l.E, l.members + g * l.G * D, l.G, D, 0, D,
                                  &mixes[g * TOGETHER * D], D, count);
            for (long e = 0; e < count; ++e) {
                const auto from = row_pointers(static_cast<const float*>(&mixes[e * D]), l.n, TOGETHER * D);
                const auto to = row_pointers(l.answers + (first + e) * D, l.n, l.E * D);
                experts.run(first + e, from.data(), to.data(), l.n, scratch);
            }
        });
        member.wait();
        member.each(l.n * parts, 0, [&](long task) {
            const long g = task / parts, begin = task % parts * columns, end = std::min(D, begin + columns);
            all_weighted_sums(l.weights + g * l.G * l.E, l.E, 1, l.answers + g * l.E * D, l.E, D, begin, end,
                              l.out + g * l.G * D, D, l.G);
            for (long at = g * l.G; at < (g + 1) * l.G; ++at) {
                float* to = l.rows[at];
                for (long j = begin; to != nullptr && j < end; ++j) to[j] += l.out[at * D + j];
            }
        });
    });
}

}  // namespace
