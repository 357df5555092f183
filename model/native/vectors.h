// Vectors of the processor at hand: loads and conversions, fused multiply-adds, the exponential.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

struct bf16 {
    uint16_t bits;
};

#ifndef MOTSERVE_LANES
#ifdef __AVX512F__
#define MOTSERVE_LANES 16
#else
#define MOTSERVE_LANES 8
#endif
#endif
constexpr long LANES = MOTSERVE_LANES;
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int8_t byte_bits __attribute__((vector_size(LANES)));
typedef int32_t wide_bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t half_bits __attribute__((vector_size(LANES * 2)));
typedef uint32_t full_bits __attribute__((vector_size(LANES * 4)));
constexpr long SERIAL = 1 << 15;  // multiplications below which threads cost more than they bring

inline vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Compilers make these conversions of vectors number by number; x86 has instructions.
inline vec load(const bf16* p) {
#if defined(__AVX512F__) && MOTSERVE_LANES == 16
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__) && MOTSERVE_LANES == 8
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    half_bits h;
    std::memcpy(&h, p, sizeof h);
    full_bits wide = __builtin_convertvector(h, full_bits) << 16;
    vec v;
    std::memcpy(&v, &wide, sizeof v);
    return v;
#endif
}

inline vec load(const int8_t* p) {
#if defined(__AVX512F__) && MOTSERVE_LANES == 16
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__) && MOTSERVE_LANES == 8
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    byte_bits b;
    std::memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, wide_bits), vec);
#endif
}

inline float value(const float* p) { return *p; }

inline float value(const int8_t* p) { return *p; }

inline float value(const bf16* p) {
    uint32_t wide = uint32_t(p->bits) << 16;
    float v;
    std::memcpy(&v, &wide, sizeof v);
    return v;
}

inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

inline vec broadcast(float x) { return x - vec{}; }  // minus zero would turn -0 to +0 the other way round

// In halves.
inline float sum(vec v) {
#if defined(__AVX2__) && MOTSERVE_LANES == 8
    const __m256 all = (__m256)v;
    const __m128 fours = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    const __m128 twos = _mm_add_ps(fours, _mm_movehl_ps(fours, fours));
    return _mm_cvtss_f32(_mm_add_ss(twos, _mm_movehdup_ps(twos)));
#else
    float parts[LANES];
    std::memcpy(parts, &v, sizeof v);
    for (long half = LANES / 2; half > 0; half /= 2)
        for (long i = 0; i < half; ++i) parts[i] += parts[i + half];
    return parts[0];
#endif
}

// a * b + c in one rounding, where the processor has it; the same for vectors and single numbers.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

inline vec fused(vec a, vec b, vec c) {
#if defined(__AVX512F__) && MOTSERVE_LANES == 16
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && MOTSERVE_LANES == 8
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    vec result;
    for (long i = 0; i < LANES; ++i) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return result;
#endif
}
#else
inline float fused(float a, float b, float c) { return a * b + c; }
inline vec fused(vec a, vec b, vec c) { return a * b + c; }
#endif

// Stays in a register: compilers like to read memory anew for every use, more often than processors can.
inline vec kept(vec v) {
#if defined(__AVX512F__) && MOTSERVE_LANES == 16
    asm("" : "+v"(v));
#elif defined(__AVX2__) && MOTSERVE_LANES == 8
    asm("" : "+x"(v));
#endif
    return v;
}

inline vec maximum(vec a, vec b) { return a > b ? a : b; }

// e^x, relative error below 3e-7, 0 and infinity at the ends: 2^n times a polynomial on [-ln2/2, ln2/2] (Taylor).
inline vec exponential(vec x) {
    const vec low = broadcast(-87.0f), high = broadcast(88.7f), magic = broadcast(12582912.0f);  // 1.5 * 2^23
    const vec clamped = x < low ? low : x > high ? high : x;
    const vec n = fused(clamped, broadcast(1.44269504088896341f), magic) - magic;
    const vec r = fused(n, broadcast(2.12194440e-4f), fused(n, broadcast(-0.693359375f), clamped));
    vec p = broadcast(1.0f / 720);
    p = fused(p, r, broadcast(1.0f / 120));
    p = fused(p, r, broadcast(1.0f / 24));
    p = fused(p, r, broadcast(1.0f / 6));
    p = fused(p, r, broadcast(0.5f));
    p = fused(p, r, broadcast(1.0f));
    p = fused(p, r, broadcast(1.0f));
    const wide_bits scale = (__builtin_convertvector(n, wide_bits) + 127) << 23;
    vec factor;
    std::memcpy(&factor, &scale, sizeof factor);
    const vec value = p * factor;
    return x < low ? vec{} : value;
}

// A vectorised function of count floats in place; the last few go through the same operations, padded.
template <class F>
inline void apply(float* x, long count, F function) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) store(x + i, function(load(x + i)));
    if (i < count) {
        float rest[LANES] = {};
        std::memcpy(rest, x + i, (count - i) * sizeof(float));
        store(rest, function(load(rest)));
        std::memcpy(x + i, rest, (count - i) * sizeof(float));
    }
}

}  // namespace
