// Sampling. A row's token depends on its logits, its parameters and its random number alone.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

struct Candidate {
    float weight;
    int32_t id;
    bool operator<(const Candidate& other) const {  // best first, ties to the lowest id
        return weight != other.weight ? weight > other.weight : id < other.id;
    }
};

inline float largest(const float* x, long count) {
    float top = -std::numeric_limits<float>::infinity();
    long i = 0;
    if (count >= LANES) {
        vec best = load(x);
        for (; i + LANES <= count; i += LANES) best = maximum(load(x + i), best);
        for (long lane = 0; lane < LANES; ++lane) top = std::max(top, best[lane]);
    }
    for (; i < count; ++i) top = std::max(top, x[i]);
    return top;
}

// The last candidate, in order of weight, that top_k, then min_p, then top_p leave. Weights are relative to the best
// one's, 1; total is the sum of all of them.
inline Candidate last_kept(const std::vector<float>& weights, double total, long top_k, float top_p, float min_p) {
    const long V = weights.size();
    // What cannot be within top_p: all weights below this one together weigh less than the rest that top_p leaves out.
    const bool alone = top_k <= 0 && min_p <= 0;
    const double negligible = alone && top_p < 1 ? (1 - double(top_p)) * total / V : 0;
    std::vector<Candidate> kept;
    for (long i = 0; i < V; ++i)
        if (weights[i] > 0 && weights[i] >= min_p && weights[i] >= negligible) kept.push_back({weights[i], int32_t(i)});
    if (top_k > 0 && top_k < long(kept.size())) {
        std::nth_element(kept.begin(), kept.begin() + top_k, kept.end());
        kept.resize(top_k);
    }
    if (!(top_p < 1)) return *std::max_element(kept.begin(), kept.end());
    double left = alone ? total : 0, before = 0;
    if (!alone) for (const Candidate& c : kept) left += c.weight;
    // A candidate stays while those before it do not make up top_p; the first one always does.
    size_t low = 0, high = kept.size();
    while (high - low > 1) {
        const size_t middle = (low + high) / 2;
        std::nth_element(kept.begin() + low, kept.begin() + middle, kept.begin() + high);
        double part = 0;
        for (size_t i = low; i < middle; ++i) part += kept[i].weight;
        if (before + part < double(top_p) * left) before += part, low = middle;
        else high = middle;
    }
    return kept[low];
}

inline int64_t draw(const float* logits, long V, float temperature, long top_k, float top_p, float min_p, double uniform) {
    const float top = largest(logits, V);
    if (!(temperature > 0)) return std::find(logits, logits + V, top) - logits;
    std::vector<float> weights(logits, logits + V);
    apply(weights.data(), V, [=](vec v) { return exponential((v - top) / temperature); });
    double total = 0;
    for (float w : weights) total += w;
    if ((top_k > 0 && top_k < V) || top_p < 1 || min_p > 0) {
        const Candidate last = last_kept(weights, total, top_k, top_p, min_p);
        total = 0;
        for (long i = 0; i < V; ++i) {
            if (last < Candidate{weights[i], int32_t(i)}) weights[i] = 0;
            total += weights[i];
        }
    }
    double passed = 0;
    long token = 0;
    for (long i = 0; i < V; ++i) {
        if (!(weights[i] > 0)) continue;
        passed += weights[i];
        token = i;
        if (passed > uniform * total) break;
    }
    return token;
}

// Log probabilities of one token and of the best k, best first.
inline void score(const float* logits, long V, int64_t token, long k, float* chosen, int64_t* ids, float* values) {
    const float top = largest(logits, V);
    std::vector<float> weights(logits, logits + V);
    apply(weights.data(), V, [=](vec v) { return exponential(v - top); });
    double total = 0;
    for (float w : weights) total += w;
    const float normaliser = top + float(std::log(total));
    *chosen = logits[token] - normaliser;
    if (k <= 0) return;
    std::vector<Candidate> best(V);
    for (long i = 0; i < V; ++i) best[i] = {logits[i], int32_t(i)};
    std::partial_sort(best.begin(), best.begin() + k, best.end());
    for (long i = 0; i < k; ++i) ids[i] = best[i].id, values[i] = best[i].weight - normaliser;
}

}  // namespace
