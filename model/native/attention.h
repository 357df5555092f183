// Attention of single queries over their own paged keys and values.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "products.h"

namespace {

// Scores of count consecutive places whose keys lie a stride apart.
template <class W>
void key_scores(const float* query, const W* keys, long count, long size, long stride, float scale, float* scores) {
    long t = 0;
    for (; t + 4 <= count; t += 4) {
        float* to = scores + t;
        dot_block<1, 4>(&query, keys + t * stride, size, stride, NothingAhead(), &to);
    }
    for (; t < count; ++t) {
        float* to = scores + t;
        dot_block<1, 1>(&query, keys + t * stride, size, stride, NothingAhead(), &to);
    }
    for (t = 0; t < count; ++t) scores[t] *= scale;
}

// The values' sum by their weights: V vectors of columns from begin on.
template <int V, class W>
void value_sums(const float* weights, const W* values, const int64_t* table, long length, long block_size, long stride,
                float* out) {
    vec total[V] = {};
    for (long begin = 0; begin < length; begin += block_size) {
        const W* block = values + table[begin / block_size] * block_size * stride;
        const long count = std::min(block_size, length - begin);
        for (long t = 0; t < count; ++t) {
            const vec w = broadcast(weights[begin + t]);
            for (int v = 0; v < V; ++v) total[v] = fused(w, load(block + t * stride + v * LANES), total[v]);
        }
    }
    for (int v = 0; v < V; ++v) store(out + v * LANES, total[v]);
}

template <class W>
void attend_head(const float* query, const W* keys, const W* values, const int64_t* table, long length, long size,
                 long stride, long block_size, float* weights, float* out) {
    const float scale = 1.0f / std::sqrt(float(size));
    for (long begin = 0; begin < length; begin += block_size)
        key_scores(query, keys + table[begin / block_size] * block_size * stride, std::min(block_size, length - begin),
                   size, stride, scale, weights + begin);
    const float top = *std::max_element(weights, weights + length);
    apply(weights, length, [top](vec v) { return exponential(v - top); });
    float total = 0;
    for (long t = 0; t < length; ++t) total += weights[t];
    for (long t = 0; t < length; ++t) weights[t] /= total;
    long i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES)
        value_sums<4>(weights, values + i, table, length, block_size, stride, out + i);
    for (; i + LANES <= size; i += LANES)
        value_sums<1>(weights, values + i, table, length, block_size, stride, out + i);
    for (; i < size; ++i) {
        out[i] = 0;
        for (long t = 0; t < length; ++t) {
            const long place = table[t / block_size] * block_size + t % block_size;
            out[i] = fused(weights[t], value(values + place * stride + i), out[i]);
        }
    }
}

template <class W>
void attend(const float* queries, const W* keys, const W* values, const int64_t* tables, const int64_t* lengths,
            float* out, long rows, long heads, long size, long table_width, long block_size) {
    const long stride = heads * size;
#pragma omp parallel
    {
        std::vector<float> weights(table_width * block_size);
#pragma omp for collapse(2) schedule(dynamic, 4)
        for (long row = 0; row < rows; ++row)
            for (long head = 0; head < heads; ++head) {
                const long at = row * stride + head * size;
                attend_head(queries + at, keys + head * size, values + head * size, tables + row * table_width,
                            lengths[row], size, stride, block_size, weights.data(), out + at);
            }
    }
}

}  // namespace
