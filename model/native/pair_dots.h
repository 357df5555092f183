// Products of rows of bfloat16 pairs with weights [N, K]: sums of every 16th pair of terms, added up at the end.

#pragma once

#include <algorithm>
#include <vector>

#include "pairs.h"

#if defined(MOTSERVE_PAIRS) && defined(__AVX512BF16__)

namespace {

// The sums of 16 vectors, each added up in halves, as one vector in their order.
inline __m512 sums_of(const __m512* v) {
    __m512 eights[8], fours[4], twos[2];
    for (int i = 0; i < 8; ++i) {  // vectors 4 apart stand beside each other in the end
        const __m512 a = v[8 * (i % 2) + i / 2], b = v[8 * (i % 2) + i / 2 + 4];
        eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    for (int i = 0; i < 4; ++i) {
        const __m512 a = eights[2 * i], b = eights[2 * i + 1];
        fours[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    for (int i = 0; i < 2; ++i) {
        const __m512 a = fours[2 * i], b = fours[2 * i + 1];
        twos[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    return _mm512_add_ps(_mm512_shuffle_ps(twos[0], twos[1], 0x88), _mm512_shuffle_ps(twos[0], twos[1], 0xdd));
}

inline float pair_dot(const uint32_t* a, const bf16* b, long K) {
    __m512 total = _mm512_setzero_ps();
    for (long k = 0; k < K; k += 32) {
        const __mmask32 mask = K - k < 32 ? (1u << (K - k)) - 1 : 0xffffffff;
        total = Paired<bf16>::step(total, masked(b + k, mask), _mm512_maskz_loadu_epi16(mask, a + k / 2));
    }
    return sum((vec)total);
}

// R rows by 16 / R rows of weights, a stride apart. Those 16 further on are fetched meanwhile: one tile's share.
template <int R>
inline void pair_dots(const uint32_t* const* a, const bf16* b, long K, long stride, long tile, long tiles,
                      float* const* c) {
    constexpr int C = 16 / R;
    typedef Paired<bf16> P;
    __m512 total[16] = {};
    long k = 0;
    for (; k + 32 <= K; k += 32) {
        for (long j = tile; j < C; j += tiles) __builtin_prefetch(b + (j + 16) * stride + k, 0, 2);
        __m512i x[R];
        for (int r = 0; r < R; ++r) x[r] = _mm512_loadu_si512(a[r] + k / 2);
        for (int j = 0; j < C; ++j) {
            const __m512i w = _mm512_loadu_si512(b + j * stride + k);
            for (int r = 0; r < R; ++r) total[r * C + j] = P::step(total[r * C + j], w, x[r]);
        }
    }
    if (k < K) {
        const __mmask32 mask = (1u << (K - k)) - 1;
        for (int j = 0; j < C; ++j)
            for (int r = 0; r < R; ++r)
                total[r * C + j] = P::step(total[r * C + j], masked(b + j * stride + k, mask),
                                           _mm512_maskz_loadu_epi16(mask, a[r] + k / 2));
    }
    float sums[16];
    _mm512_storeu_ps(sums, sums_of(total));
    for (int r = 0; r < R; ++r) std::memcpy(c[r], sums + r * C, C * sizeof(float));
}

// R rows at a time by 16 rows of weights, then half as many.
template <int R>
void pair_dot_tiles(const uint32_t* const* a, long rows, const bf16* b, long K, long tile, long tiles, float* const* c) {
    long r = 0;
    for (; r + R <= rows; r += R, ++tile)
        for (long j = 0; j < 16; j += 16 / R) {
            float* at[R];
            for (int i = 0; i < R; ++i) at[i] = c[r + i] + j;
            pair_dots<R>(a + r, b + j * K, K, K, tile, tiles, at);
        }
    if constexpr (R > 1) {
        if (r < rows) pair_dot_tiles<R / 2>(a + r, rows - r, b, K, tile, tiles, c + r);
    }
}

// Columns [begin, end) of a product with weights [N, K].
inline void pair_dot_products(const uint32_t* const* a, long rows, const bf16* b, long K, long begin, long end,
                              float* const* c) {
    const long tiles = rows / 4 + rows % 4 / 2 + rows % 2;
    std::vector<float*> at(rows);
    for (long j = begin; j < end; j += 16) {
        // The last few columns once more with their neighbours: a result is the same whoever stands beside it.
        const long from = std::max(begin, std::min(j, end - 16));
        if (end - from < 16) {
            for (; j < end; ++j)
                for (long r = 0; r < rows; ++r) c[r][j] = pair_dot(a[r], b + j * K, K);
            return;
        }
        for (long r = 0; r < rows; ++r) at[r] = c[r] + from;
        pair_dot_tiles<4>(a, rows, b + from * K, K, 0, tiles, at.data());
    }
}

}  // namespace

#endif
