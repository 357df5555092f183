// Products of 16-bit pairs: bfloat16 weights with rows rounded to bfloat16, or int8 weights with rows as integers of 16
// bits and a scale, by the processor's instruction that multiplies two pairs and adds both products to a sum (x86's
// AVX512-BF16 and AVX512-VNNI). Sums of bfloat16 products run in float32 over pairs of terms in ascending order, those
// of integers are exact; so a result depends on its row and column alone.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

#if defined(__AVX512BW__) && MOTSERVE_LANES == 16
#define MOTSERVE_PAIRS
#endif

namespace {

// Whether weights of a type are multiplied in pairs here.
template <class W>
struct Paired {
    static constexpr bool here = false;
};

#ifdef MOTSERVE_PAIRS

inline __m512i masked(const bf16* p, __mmask32 mask) { return _mm512_maskz_loadu_epi16(mask, p); }

inline __m512i masked(const int8_t* p, __mmask32 mask) {
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, p));
}

inline __m512i halves(const bf16* p) { return _mm512_loadu_si512(p); }

inline __m512i halves(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }

#ifdef __AVX512BF16__
template <>
struct Paired<bf16> {
    static constexpr bool here = true;
    typedef __m512 sums;

    static sums step(sums total, __m512i w, __m512i x) { return _mm512_dpbf16_ps(total, (__m512bh)w, (__m512bh)x); }

    // A row of K numbers as (K + 1) / 2 pairs, the last one filled up with zero.
    static void pack(const float* x, long K, uint32_t* pairs, float*) {
        uint16_t* to = reinterpret_cast<uint16_t*>(pairs);
        if (K % 2) to[K] = 0;
        for (long k = 0; k < K; k += 16) {
            const __mmask16 mask = K - k < 16 ? (1u << (K - k)) - 1 : 0xffff;
            const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + k));
            _mm256_mask_storeu_epi16(to + k, mask, rounded);
        }
    }

    static void finish(float*, long, float, const float*) {}  // sums are results
};
#endif

#ifdef __AVX512VNNI__
template <>
struct Paired<int8_t> {
    static constexpr bool here = true;
    typedef __m512i sums;

    // As the instruction itself: compilers move sums about for its function.
    static sums step(sums total, __m512i w, __m512i x) {
        asm("vpdpwssd %2, %1, %0" : "+v"(total) : "v"(w), "v"(x));
        return total;
    }

    // Integers so large that no sum of K products with weights up to 127 can overflow; scale is one's worth.
    static void pack(const float* x, long K, uint32_t* pairs, float* scale) {
        int16_t* to = reinterpret_cast<int16_t*>(pairs);
        if (K % 2) to[K] = 0;
        __m512 top = _mm512_setzero_ps();
        __mmask16 broken = 0;
        for (long k = 0; k < K; k += 16) {
            const __mmask16 mask = K - k < 16 ? (1u << (K - k)) - 1 : 0xffff;
            const __m512 part = _mm512_maskz_loadu_ps(mask, x + k);
            top = _mm512_max_ps(top, _mm512_abs_ps(part));
            broken |= _mm512_cmp_ps_mask(part, part, _CMP_UNORD_Q);
        }
        const float largest = _mm512_reduce_max_ps(top);
        const float range = float(std::min(32767L, 2147483647L / (127 * K)));
        const __m512 by = _mm512_set1_ps(largest > 1e-30f ? range / largest : 0);
        *scale = broken ? std::nanf("") : largest / range;
        for (long k = 0; k < K; k += 16) {
            const __mmask16 mask = K - k < 16 ? (1u << (K - k)) - 1 : 0xffff;
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + k), by));
            _mm256_mask_storeu_epi16(to + k, mask, _mm512_cvtsepi32_epi16(whole));
        }
    }

    // Sums to results, in place, by the row's scale and those of the columns.
    static void finish(float* c, long N, float scale, const float* scales) {
        for (long j = 0; j < N; j += 16) {
            const __mmask16 mask = N - j < 16 ? (1u << (N - j)) - 1 : 0xffff;
            const __m512 sums = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(mask, c + j));
            const __m512 by = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, scales + j), _mm512_set1_ps(scale));
            _mm512_mask_storeu_ps(c + j, mask, _mm512_mul_ps(sums, by));
        }
    }
};
#endif

inline __m512 as_floats(__m512 v) { return v; }
inline __m512 as_floats(__m512i v) { return _mm512_castsi512_ps(v); }
inline void from_floats(__m512 v, __m512& to) { to = v; }
inline void from_floats(__m512 v, __m512i& to) { to = _mm512_castps_si512(v); }

#endif

}  // namespace
