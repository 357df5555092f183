// Activations, by number: the order of model/native's table.

#pragma once

#include <cmath>

#include "team.h"
#include "vectors.h"

namespace {

// The error function, absolute error below 5e-7 (Abramowitz and Stegun, 7.1.26).
inline vec error_function(vec x) {
    const vec size = x < 0 ? -x : x, t = 1.0f / fused(size, broadcast(0.3275911f), broadcast(1.0f));
    vec p = broadcast(1.061405429f);
    p = fused(p, t, broadcast(-1.453152027f));
    p = fused(p, t, broadcast(1.421413741f));
    p = fused(p, t, broadcast(-0.284496736f));
    p = fused(p, t, broadcast(0.254829592f));
    const vec found = 1.0f - p * t * exponential(-size * size);
    return x < 0 ? -found : found;
}

// Calls use with the activation of that number, a function of vectors.
template <class F>
inline void with_activation(int kind, F use) {
    switch (kind) {
        case 0: return use([](vec v) { return 0.5f * v * (1.0f + error_function(v * 0.70710678118654752f)); });
        case 1:  // x (1 + tanh(z)) / 2 = x / (1 + e^(-2z))
            return use([](vec v) {
                const vec z = 1.59576912160573072f * (v + 0.044715f * v * v * v);
                return v / (1.0f + exponential(-z));
            });
        case 2: return use([](vec v) { return v > 0 ? v : vec{}; });
        default: return use([](vec v) { return v / (1.0f + exponential(-v)); });
    }
}

inline void activate(float* x, long count, int kind) {
    with_activation(kind, [&](auto activation) { apply(x, count, activation); });
}

// The same by several threads where that is worth it.
inline void activate_together(float* x, long count, int kind) {
    constexpr long share = 4096;
    for_each(count > SERIAL, (count + share - 1) / share, 1, [&](long part) {
        const long i = part * share;
        activate(x + i, count - i < share ? count - i : share, kind);
    });
}

}  // namespace
