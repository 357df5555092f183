// A whole layer of shared groups: mixes, experts, redistribution. For few groups, whose members stay in a cache: mixes
// are made beside the weights that they meet, while memory is the limit, and never all at once.

#pragma once

#include <algorithm>
#include <vector>

#include "experts.h"

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

// Members [n, G, D]; the weights that mix and redistribute [n, G, E]; room for answers [n, E, D]; out like members.
struct SharedLayer {
    long n, G, E;
    const float *members, *weights;
    float *answers, *out;
};

template <class W>
void shared_layer(const Experts<W>& experts, const SharedLayer& l) {
    const long D = experts.D, columns = 8 * LANES;
#pragma omp parallel
    {
        Scratch scratch(experts.tiles);
        std::vector<float> mixes(l.n * TOGETHER * D);  // [n, experts, D]
#pragma omp for schedule(dynamic, 1)
        for (long first = 0; first < l.E; first += TOGETHER) {
            const long count = std::min(TOGETHER, l.E - first);
            for (long g = 0; g < l.n; ++g)
                all_weighted_sums(l.weights + g * l.G * l.E + first, 1, l.E, l.members + g * l.G * D, l.G, D, 0, D,
                                  &mixes[g * TOGETHER * D], D, count);
            for (long e = 0; e < count; ++e) {
                const auto from = row_pointers(static_cast<const float*>(&mixes[e * D]), l.n, TOGETHER * D);
                const auto to = row_pointers(l.answers + (first + e) * D, l.n, l.E * D);
                experts.run(first + e, from.data(), to.data(), l.n, scratch);
            }
        }
#pragma omp for collapse(2) schedule(static)
        for (long g = 0; g < l.n; ++g)
            for (long j = 0; j < D; j += columns)
                all_weighted_sums(l.weights + g * l.G * l.E, l.E, 1, l.answers + g * l.E * D, l.E, D, j,
                                  std::min(D, j + columns), l.out + g * l.G * D, D, l.G);
    }
}

}  // namespace
