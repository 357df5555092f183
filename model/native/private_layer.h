// A layer of experts for private rows, each in a group of its own beside the reference crowd.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "experts.h"
#include "mixing.h"

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
    int64_t experts_apart, groups_apart;
    const float* mixes;  // [E, groups, D]
    float* outputs;      // the same
    // Room for [rows * E, D] each, of as many rows as are computed at once; the latter only where experts are in tiles.
    float *answers, *mixed;
};
}

namespace {

// Each expert sees the member with the highest score alone: merge [E, G] and emit [E] of ones and zeros. Unmixed, it
// sees the row where that has the highest score, and nobody else.
inline void choose(const PrivateLayer& l, bool unmixed, const float* own, const float* scores, float* merge,
                   float* emit) {
    const long others = l.members > 0 ? l.members - 1 : 0, rivals = unmixed ? std::min<long>(l.rivals, others) : others;
    std::fill(merge, merge + l.E * (others + 1), 0.0f);
    for (long e = 0; e < l.E; ++e, merge += others + 1) {
        const float *theirs = scores + e * l.members + 1, *best = std::max_element(theirs, theirs + rivals);
        const bool wins = rivals == 0 || (unmixed ? own[e] > *best : own[e] >= *best);
        if (wins) merge[0] = 1;
        else if (!unmixed) merge[1 + (best - theirs)] = 1;
        emit[e] = merge[0];
    }
}

// Softmax over the members, of LANES experts at once. Returns the sum of the experts' entropies.
inline double soften(const PrivateLayer& l, float T, const float* own, const float* scores, float* merge, float* emit) {
    const long size = std::max<long>(l.members, 1);
    std::vector<float> weights(size * LANES);
    double spent = 0;
    for (long first = 0; first < l.E; first += LANES) {
        const long count = std::min(LANES, l.E - first);
        for (long i = 0; i < count; ++i) {
            weights[i] = own[first + i];
            for (long j = 1; j < size; ++j) weights[j * LANES + i] = scores[(first + i) * size + j];
        }
        spent += mix_some<true>(weights.data(), size, LANES, count, T);
        for (long i = 0; i < count; ++i) {
            for (long j = 0; j < size; ++j) merge[(first + i) * size + j] = weights[j * LANES + i];
            emit[first + i] = weights[i];
        }
    }
    return spent;
}

// Weights of one row's group for every expert: merge [E, G] and emit [E]. Returns the row's mean normalised entropy.
inline float mixing_weights(const PrivateLayer& l, long row, const float* scores, float* merge, float* emit) {
    const float T = l.temperatures[row], *own = l.own + row * l.E;
    const bool unmixed = T == 0;
    double spent = 0;
    if (unmixed || l.discrete) choose(l, unmixed, own, scores, merge, emit);
    else spent = soften(l, T, own, scores, merge, emit);
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
    return l.members > 1 ? float(spent / l.E / std::log(double(l.members))) : 0.0f;
}

// The mix that one expert sees: the row and its rivals by their weights, in order.
template <class C>
void mix(const PrivateLayer& l, long row, const C* crowd, const float* merge, float* out) {
    const float* x = l.x + row * l.D;
    if (l.temperatures[row] == 0) {
        std::copy(x, x + l.D, out);
        return;
    }
    constexpr long V = 4;
    long d = 0;
    for (; d + V * LANES <= l.D; d += V * LANES) {
        vec total[V];
        for (long v = 0; v < V; ++v) total[v] = broadcast(merge[0]) * load(x + d + v * LANES);
        for (long j = 1; j < l.members; ++j) {
            const vec w = broadcast(merge[j]);
            const C* member = crowd + j * l.D + d;
            for (long v = 0; v < V; ++v) total[v] = fused(w, load(member + v * LANES), total[v]);
        }
        for (long v = 0; v < V; ++v) store(out + d + v * LANES, total[v]);
    }
    for (; d < l.D; ++d) {
        out[d] = merge[0] * x[d];
        for (long j = 1; j < l.members; ++j) out[d] = fused(merge[j], value(crowd + j * l.D + d), out[d]);
    }
}

#ifdef MOTSERVE_TILES
// All mixes of one row in tiles: members [G, D], the row first, by mixing weights, those of one expert a row.
class TileMixes {
   public:
    template <class C>
    void mix(const PrivateLayer& l, long row, const C* crowd, const std::vector<const float*>& merge,
             const std::vector<float*>& out) {
        const long pairs = tiles_of(l.members, TERMS) * TILE;
        uint32_t* words = members_.words(pairs * l.D);
        for (long p = 0; p < pairs; ++p)
            for (long j = 0; j < l.D; j += 2 * TILE) {
                const __m512i even = member(l, row, crowd, 2 * p, j), odd = member(l, row, crowd, 2 * p + 1, j);
                uint32_t* to = words + j * pairs + p / TILE * 2 * TILE_WORDS + p % TILE * TILE;
                _mm512_store_si512(to, _mm512_permutex2var_epi16(even, places(0), odd));
                _mm512_store_si512(to + TILE_WORDS, _mm512_permutex2var_epi16(even, places(TILE), odd));
            }
        weights_.pack(merge.data(), merge.size(), l.members, false);
        tiled_products(weights_, reinterpret_cast<const bf16*>(words), 0, l.D, ToRows{out.data()});
    }

   private:
    TileMemory members_;
    TileRows weights_;

    // 16 columns, from first on, of two members alternating.
    static __m512i places(uint16_t first) {
        alignas(64) uint16_t at[2 * TILE];
        for (long i = 0; i < TILE; ++i) at[2 * i] = first + i, at[2 * i + 1] = first + i + 2 * TILE;
        return _mm512_load_si512(at);
    }
    template <class C>
    static __m512i member(const PrivateLayer& l, long row, const C* crowd, long number, long j) {
        if (number >= l.members) return __m512i();
        if (number == 0) return rounded(l.x + row * l.D + j);
        return rounded(crowd + number * l.D + j);
    }
    static __m512i rounded(const float* p) {
        return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + TILE), _mm512_loadu_ps(p));
    }
    static __m512i rounded(const bf16* p) { return _mm512_loadu_si512(p); }
};

// What private_layer's experts will see, where they are in tiles: to l.mixed, by pair.
template <class C>
void mix_in_tiles(const PrivateLayer& l, const std::vector<Pair>& pairs, const float* merge) {
    const long size = l.members;
    std::vector<std::vector<const float*>> weights(l.n);
    std::vector<std::vector<float*>> out(l.n);
    for (size_t p = 0; p < pairs.size(); ++p) {
        weights[pairs[p].row].push_back(merge + (pairs[p].row * l.E + pairs[p].expert) * size);
        out[pairs[p].row].push_back(l.mixed + p * l.D);
    }
    together(true, [&](Member& member) {
        const TilesInUse tiles;
        TileMixes mixes;
        member.each(l.n, 1, [&](long row) {
            const long place = l.places > 1 ? l.positions[row] : 0;
            if (l.temperatures[row] == 0)
                for (float* to : out[row]) std::copy(l.x + row * l.D, l.x + (row + 1) * l.D, to);
            else if (!out[row].empty())
                mixes.mix(l, row, static_cast<const C*>(l.crowd) + place * size * l.D, weights[row], out[row]);
        });
    });
}
#endif

template <class W, class C>
void private_layer(const PrivateLayer& l) {
    const Experts<W> experts{static_cast<const W*>(l.lin1), static_cast<const W*>(l.lin2), l.scale1, l.scale2,
                             long(l.D), long(l.S), l.activation, (l.weights & TILES) != 0};
    const long size = l.members > 0 ? l.members : 1;
    std::vector<float> emit(l.n * l.E), merge(l.n * l.E * size);
    const C* crowd = static_cast<const C*>(l.crowd);
    const float* scores = l.crowd_scores;
    auto place = [&](long row) { return l.places > 1 ? l.positions[row] : 0; };
    for_each(true, l.n, 0, [&](long row) {
        if (!l.live[row]) return;
        l.entropy[row] += mixing_weights(l, row, scores + place(row) * l.E * l.members, &merge[row * l.E * size],
                                         &emit[row * l.E]);
    });
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
    const bool mixed = experts.tiles && l.members > 0;
#ifdef MOTSERVE_TILES
    if (mixed) mix_in_tiles<C>(l, pairs, merge.data());
#endif
    together(true, [&](Member& member) {
        Scratch scratch(experts.tiles);
        std::vector<float> mixes;
        member.each(l.E, 1, [&](long e) {
            const auto group_mixes = row_pointers(l.mixes + e * l.experts_apart, l.groups, l.groups_apart);
            const auto group_outputs = row_pointers(l.outputs + e * l.experts_apart, l.groups, l.groups_apart);
            experts.run(e, group_mixes.data(), group_outputs.data(), l.groups, scratch);
            const long count = first[e + 1] - first[e];
            if (!mixed) mixes.resize(count * l.D);
            for (long i = 0; i < count && !mixed; ++i) {
                const Pair& pair = pairs[first[e] + i];
                mix(l, pair.row, crowd + place(pair.row) * l.members * l.D, &merge[(pair.row * l.E + e) * size],
                    &mixes[i * l.D]);
            }
            const float* own = mixed ? l.mixed + first[e] * l.D : mixes.data();
            const auto from = row_pointers(own, count, l.D);
            const auto to = row_pointers(l.answers + first[e] * l.D, count, l.D);
            experts.run(e, from.data(), to.data(), count, scratch);
        });
    });
    add_up(pairs, l.answers, l.out, l.n, l.D);
}

constexpr long PRIVATE_ROWS = 128;  // at once: what is in between takes memory

inline void some_private_rows(const PrivateLayer& l) {
    if ((l.weights & ~TILES) == INT8) l.half ? private_layer<int8_t, bf16>(l) : private_layer<int8_t, float>(l);
    else if (l.weights != FLOAT32) l.half ? private_layer<bf16, bf16>(l) : private_layer<bf16, float>(l);
    else l.half ? private_layer<float, bf16>(l) : private_layer<float, float>(l);
}

// Any number of rows; groups count without rows too.
inline void private_layer(const PrivateLayer& l) {
    for (long first = 0; first == 0 || first < l.n; first += PRIVATE_ROWS) {
        PrivateLayer part = l;
        part.n = std::min<long>(l.n - first, PRIVATE_ROWS);
        part.x += first * l.D, part.own += first * l.E, part.out += first * l.D;
        part.positions += first, part.temperatures += first, part.skip_below += first, part.live += first;
        part.entropy += first, part.used += first;
        if (first > 0) part.groups = 0;
        some_private_rows(part);
    }
}

}  // namespace
