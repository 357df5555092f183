// Activations, by number: the order of model/native's table.

#pragma once

#include <cmath>

#include "vectors.h"

namespace {

inline void activate(float* x, long count, int kind) {
    switch (kind) {
        case 0:
            for (long i = 0; i < count; ++i) x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678118654752f));
            break;
        case 1:  // x (1 + tanh(z)) / 2 = x / (1 + e^(-2z))
            apply(x, count, [](vec v) {
                const vec z = 1.59576912160573072f * (v + 0.044715f * v * v * v);
                return v / (1.0f + exponential(-z));
            });
            break;
        case 2:
            for (long i = 0; i < count; ++i) x[i] = x[i] > 0 ? x[i] : 0;
            break;
        default:
            apply(x, count, [](vec v) { return v / (1.0f + exponential(-v)); });
    }
}

}  // namespace
