// Mixing weights of shared groups.

#pragma once

#include <cmath>

#include "team.h"
#include "vectors.h"

namespace {

// A whole vector, or the beginning of one.
template <bool whole>
inline vec load_some(const float* p, long count) {
    if constexpr (whole) return load(p);
    vec v = {};
    std::memcpy(&v, p, count * sizeof(float));
    return v;
}
template <bool whole>
inline void store_some(float* p, long count, vec v) {
    if constexpr (whole) store(p, v);
    else std::memcpy(p, &v, count * sizeof(float));
}

// Scores of some experts, at most LANES, to softmax over G members a stride apart, in place. Returns the sum of their
// entropies.
template <bool whole>
inline double mix_some(float* scores, long G, long stride, long count, float T) {
    vec top = load_some<whole>(scores, count);
    for (long g = 1; g < G; ++g) top = maximum(load_some<whole>(scores + g * stride, count), top);
    vec total = {}, weighted = {};
    for (long g = 0; g < G; ++g) {
        const vec z = (load_some<whole>(scores + g * stride, count) - top) / T, w = exponential(z);
        total += w;
        weighted += w > 0 ? w * z : vec{};  // of an empty place, whose score is minus infinity, nothing
        store_some<whole>(scores + g * stride, count, w);
    }
    for (long g = 0; g < G; ++g) {
        float* at = scores + g * stride;
        store_some<whole>(at, count, load_some<whole>(at, count) / total);
    }
    double spent = 0;
    for (long i = 0; i < count; ++i) spent += std::log(total[i]) - weighted[i] / total[i];
    return spent;
}

// Scores of one group [G, E] to softmax over its members at temperature T, in place, expert by expert. Returns the mean
// entropy of the experts, between 0 and 1.
inline float mix_weights(float* scores, long G, long E, float T) {
    double spent = 0;
    long e = 0;
    for (; e + LANES <= E; e += LANES) spent += mix_some<true>(scores + e, G, E, LANES, T);
    if (e < E) spent += mix_some<false>(scores + e, G, E, E - e, T);
    return G > 1 ? float(spent / E / std::log(double(G))) : 0.0f;
}

inline void mix_weights(float* scores, long n, long G, long E, float T, float* entropy) {
    for_each(n > 1, n, 0, [&](long group) { entropy[group] += mix_weights(scores + group * G * E, G, E, T); });
}

}  // namespace
