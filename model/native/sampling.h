// Sampling. A row's token depends on its logits, its parameters and its random number alone.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
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

// Those among whom a sum that runs from the best on comes to a limit, to found; returns what those before them weigh.
inline double around(const std::vector<float>& weights, double limit, std::vector<Candidate>& found) {
    constexpr long SHIFT = 21, BUCKETS = (0x3f800000 >> SHIFT) + 1;  // by leading bits: weights are 1 at most
    const auto bucket_of = [](float weight) {
        uint32_t bits;
        std::memcpy(&bits, &weight, sizeof bits);
        return std::min<long>(bits >> SHIFT, BUCKETS - 1);  // of what is not a number too
    };
    static_assert(BUCKETS < 512, "sums stay in the nearest cache");
    double sums[4][BUCKETS] = {};  // four, so that one addition need not wait for the one before
    const long V = weights.size();
    for (long i = 0; i < V; ++i) sums[i % 4][bucket_of(weights[i])] += weights[i];
    const auto sum = [&](long b) { return sums[0][b] + sums[1][b] + sums[2][b] + sums[3][b]; };
    double before = 0;
    long bucket = BUCKETS - 1;
    while (bucket > 0 && before + sum(bucket) < limit) before += sum(bucket--);
    for (long i = 0; i < V; ++i)
        if (bucket_of(weights[i]) == bucket) found.push_back({weights[i], int32_t(i)});
    return before;
}

// The last candidate, in order of weight, that top_k, then min_p, then top_p leave. Weights are relative to the best
// one's, 1; total is the sum of all of them.
inline Candidate last_kept(const std::vector<float>& weights, double total, long top_k, float top_p, float min_p) {
    const long V = weights.size();
    std::vector<Candidate> kept;
    double left = total, before = 0;
    if (top_k <= 0 && min_p <= 0) {
        before = around(weights, double(top_p) * left, kept);
    } else {
        for (long i = 0; i < V; ++i)
            if (weights[i] > 0 && weights[i] >= min_p) kept.push_back({weights[i], int32_t(i)});
        if (kept.empty()) return {0, 0};  // of what is not a number
        if (top_k > 0 && top_k < long(kept.size())) {
            std::nth_element(kept.begin(), kept.begin() + top_k, kept.end());
            kept.resize(top_k);
        }
        if (!(top_p < 1)) return *std::max_element(kept.begin(), kept.end());
        left = 0;
        for (const Candidate& c : kept) left += c.weight;
    }
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

// Weights of a row, and their sums by blocks: adding them up in one run would take longer than computing them.
class RowWeights {
   public:
    // Their exponentials, relative to the largest's.
    void of(const float* logits, long V, float temperature) {
        values.assign(logits, logits + V);
        const float top = largest(logits, V);
        apply(values.data(), V, [=](vec v) { return exponential((v - top) / temperature); });
        add_up();
    }

    void add_up() {
        const long V = values.size(), blocks = (V + BLOCK - 1) / BLOCK;
        sums_.resize(blocks);
        total = 0;
        for (long b = 0; b < blocks; ++b) total += sums_[b] = sum_of(&values[b * BLOCK], std::min(BLOCK, V - b * BLOCK));
    }

    // The first with which the sum exceeds a part of the total, in order of id.
    long exceeding(double part) const {
        const long V = values.size();
        double passed = 0;
        long block = 0, token = 0;
        for (long b = 0; b < long(sums_.size()); ++b) {
            if (!(sums_[b] > 0)) continue;
            block = b;
            if (passed + sums_[b] > part * total) break;
            passed += sums_[b];
        }
        for (long i = block * BLOCK; i < std::min(V, (block + 1) * BLOCK); ++i) {
            if (!(values[i] > 0)) continue;
            passed += values[i];
            token = i;
            if (passed > part * total) break;
        }
        return token;
    }

    std::vector<float> values;
    double total = 0;

   private:
    static constexpr long BLOCK = 512;
    std::vector<double> sums_;

    static double sum_of(const float* x, long count) {
        double part[8] = {};
        long i = 0;
        for (; i + 8 <= count; i += 8)
            for (long k = 0; k < 8; ++k) part[k] += x[i + k];
        for (; i < count; ++i) part[0] += x[i];
        double sum = 0;
        for (double p : part) sum += p;
        return sum;
    }
};

inline int64_t draw(const float* logits, long V, float temperature, long top_k, float top_p, float min_p, double uniform,
                    RowWeights& weights) {
    if (!(temperature > 0)) return std::find(logits, logits + V, largest(logits, V)) - logits;
    weights.of(logits, V, temperature);
    if ((top_k > 0 && top_k < V) || top_p < 1 || min_p > 0) {
        const Candidate last = last_kept(weights.values, weights.total, top_k, top_p, min_p);
        for (long i = 0; i < V; ++i) {
            const float w = weights.values[i];
            weights.values[i] = w > last.weight || (w == last.weight && i <= last.id) ? w : 0;
        }
        weights.add_up();
    }
    return weights.exceeding(uniform);
}

// Log probabilities of one token and of the best k, best first.
inline void score(const float* logits, long V, int64_t token, long k, float* chosen, int64_t* ids, float* values) {
    RowWeights weights;
    weights.of(logits, V, 1);
    const float normaliser = largest(logits, V) + float(std::log(weights.total));
    *chosen = logits[token] - normaliser;
    if (k <= 0) return;
    std::vector<Candidate> best(V);
    for (long i = 0; i < V; ++i) best[i] = {logits[i], int32_t(i)};
    std::partial_sort(best.begin(), best.begin() + k, best.end());
    for (long i = 0; i < k; ++i) ids[i] = best[i].id, values[i] = best[i].weight - normaliser;
}

}  // namespace
