// Layer normalisation, row by row.

#pragma once

#include <cmath>

#include "team.h"
#include "vectors.h"

namespace {

// Sum of function(x) over a row: whole vectors, then the rest one by one.
template <class F>
inline float row_sum(const float* x, long count, F function) {
    vec total = {};
    long i = 0;
    for (; i + LANES <= count; i += LANES) total += function(load(x + i));
    float rest = 0;
    for (; i < count; ++i) rest += function(broadcast(x[i]))[0];
    return sum(total) + rest;
}

template <class W>
void normalize(const float* x, const W* weight, const W* bias, double epsilon, float* out, long rows, long D) {
    for_each(rows * D > SERIAL, rows, 0, [&](long r) {
        const float* from = x + r * D;
        float* to = out + r * D;
        const vec mean = broadcast(row_sum(from, D, [](vec v) { return v; }) / D);
        const float variance = row_sum(from, D, [mean](vec v) { return (v - mean) * (v - mean); }) / D;
        const vec by = broadcast(float(1 / std::sqrt(variance + epsilon)));
        long i = 0;
        for (; i + LANES <= D; i += LANES)
            store(to + i, fused((load(from + i) - mean) * by, load(weight + i), load(bias + i)));
        for (; i < D; ++i) to[i] = fused((from[i] - mean[0]) * by[0], value(weight + i), value(bias + i));
    });
}

}  // namespace
