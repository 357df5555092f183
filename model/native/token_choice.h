// A layer of experts of which every row chooses its own: Switch and top-k (model/token_choice.py has the equations).

#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "experts.h"

namespace {

// How rows choose: some of the routed experts, and all of the shared ones, which follow them.
struct Choice {
    long routed, shared, per_token;
    bool normalize;  // gates over their sum
};

// Scores of one row [routed] to gates [routed + shared], zero for experts that it does not choose. Ties go to the lowest
// expert; scores that are no numbers choose nothing.
inline void gates_of(const Choice& by, const float* scores, float* gates) {
    std::vector<float> left(scores, scores + by.routed), probabilities(left);
    const float top = *std::max_element(scores, scores + by.routed);
    apply(probabilities.data(), by.routed, [=](vec v) { return exponential(v - top); });
    float total = 0, chosen = 0;
    for (const float p : probabilities) total += p;
    std::fill(gates, gates + by.routed, 0.0f);
    std::fill(gates + by.routed, gates + by.routed + by.shared, 1.0f);
    for (long n = 0; n < by.per_token; ++n) {
        const long best = std::max_element(left.begin(), left.end()) - left.begin();
        if (!(left[best] > -std::numeric_limits<float>::infinity())) break;
        left[best] = -std::numeric_limits<float>::infinity();
        chosen += gates[best] = probabilities[best] / total;
    }
    if (by.normalize)
        for (long e = 0; e < by.routed; ++e) gates[e] /= chosen;
}

inline void gates_of(const Choice& by, const float* scores, float* gates, long n) {
    for_each(n * by.routed > SERIAL / 8, n, 0, [&](long row) {
        gates_of(by, scores + row * by.routed, gates + row * (by.routed + by.shared));
    });
}

// Each row through the experts whose gate is above zero.
template <class W>
void routed(const Experts<W>& experts, const float* x, const float* gates, float* out, long n, long E) {
    const long D = experts.D;
    std::vector<Pair> pairs;
    std::vector<long> first(E + 1);
    for (long e = 0; e < E; ++e) {
        first[e] = pairs.size();
        for (long row = 0; row < n; ++row)
            if (gates[row * E + e] > 0) pairs.push_back({row, e, gates[row * E + e]});
    }
    first[E] = pairs.size();
    std::vector<float> answers(pairs.size() * D);
    together(true, [&](Member& member) {
        Scratch scratch(experts.tiles);
        member.each(E, 1, [&](long e) {
            const long count = first[e + 1] - first[e];
            if (count == 0) return;
            std::vector<const float*> from(count);
            for (long i = 0; i < count; ++i) from[i] = x + pairs[first[e] + i].row * D;
            const auto to = row_pointers(&answers[first[e] * D], count, D);
            experts.run(e, from.data(), to.data(), count, scratch);
        });
    });
    add_up(pairs, answers.data(), out, n, D);
}

}  // namespace
