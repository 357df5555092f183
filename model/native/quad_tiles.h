// Products of int8 weights in tiles (x86's AMX): 16 rows by 16 columns over 64 terms an instruction. Rows are integers
// of 16 bits, as for products in pairs, in two parts of 8 bits that are multiplied one after the other. Sums are exact,
// so results are those of products in pairs, bit for bit.

#pragma once

#include "tiles.h"

namespace {

#ifdef MOTSERVE_TILES

constexpr long QUAD_TERMS = 4 * TILE;

// Rows as integers: their higher and their lower halves in tiles [row tiles, steps, 16 rows, 64 terms], and scales.
// Terms are filled up with zeros; rows with whatever is there.
class QuadRows {
   public:
    const uint32_t *high = nullptr, *low = nullptr;
    long count = 0, tiles = 0, steps = 0;
    std::vector<float> scales;

    void pack(const float* const* in, long rows, long K) {
        count = rows, tiles = tiles_of(rows, TILE), steps = tiles_of(K, QUAD_TERMS);
        const long size = tiles * steps * TILE_WORDS;
        uint32_t* words = memory_.words(2 * size);
        high = words, low = words + size;
        scales.resize(rows);
        whole_.resize(steps * QUAD_TERMS / 2);
        std::fill(whole_.begin() + K / 2, whole_.end(), 0);
        for (long r = 0; r < rows; ++r) {
            Paired<int8_t>::pack(in[r], K, whole_.data(), &scales[r]);
            uint32_t* to = words + r / TILE * steps * TILE_WORDS + r % TILE * TILE;
            for (long s = 0; s < steps; ++s, to += TILE_WORDS) split(&whole_[s * QUAD_TERMS / 2], to, to + size);
        }
    }

   private:
    TileMemory memory_;
    std::vector<uint32_t> whole_;

    // 64 integers: number = 256 * high + low, high with its sign, low without.
    static void split(const uint32_t* pairs, uint32_t* high, uint32_t* low) {
        for (long half = 0; half < 2; ++half) {
            const __m512i whole = _mm512_loadu_si512(pairs + half * TILE);
            _mm256_store_si256((__m256i*)high + half, _mm512_cvtepi16_epi8(_mm512_srai_epi16(whole, 8)));
            _mm256_store_si256((__m256i*)low + half, _mm512_cvtepi16_epi8(whole));
        }
    }
};

// One tile of rows by two tiles of columns over all steps: sums of high and low halves of the first, then of the second
// columns, [4, 16, 16].
template <class Meanwhile>
inline void quad_sums(const uint32_t* high, const uint32_t* low, const uint32_t* b, long steps, int32_t* sums,
                      const Meanwhile& meanwhile) {
    clear_sums();
    for (long s = 0; s < steps; ++s) {
        meanwhile(s);
        _tile_loadd(4, high + s * TILE_WORDS, 64);
        _tile_loadd(5, low + s * TILE_WORDS, 64);
        _tile_loadd(6, b + 2 * s * TILE_WORDS, 64);
        _tile_loadd(7, b + (2 * s + 1) * TILE_WORDS, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbusd(1, 5, 6);
        _tile_dpbssd(2, 4, 7);
        _tile_dpbusd(3, 5, 7);
    }
    store_sums<true>(sums);
}

// Rows by all N columns, a multiple of 32, of weights [K, N] with a scale a column that lie in tiles (model/tiles.py):
// [N / 32, steps, 2 tiles, 16 times 4 terms, 16 columns].
template <class To>
inline void quad_products(const QuadRows& rows, const int8_t* weights, const float* scales, long N, const To& to) {
    alignas(64) int32_t sums[4 * TILE_WORDS];
    const long size = rows.steps * TILE_WORDS;
    for (long first = 0; first < rows.tiles; first += TILES_AT_ONCE)
        for (long j = 0; j < N; j += 2 * TILE) {
            const uint32_t* b = reinterpret_cast<const uint32_t*>(weights) + j / TILE * size;
            for (long t = first; t < std::min(rows.tiles, first + TILES_AT_ONCE); ++t) {
                const uint32_t *high = rows.high + t * size, *low = rows.low + t * size;
                if (t == first) quad_sums(high, low, b, rows.steps, sums, FetchTiles{b});
                else quad_sums(high, low, b, rows.steps, sums, Nothing());
                for (long r = t * TILE; r < std::min(rows.count, (t + 1) * TILE); ++r)
                    for (long half = 0; half < 2; ++half) {
                        const int32_t* at = sums + 2 * half * TILE_WORDS + r % TILE * TILE;
                        const __m512i upper = _mm512_slli_epi32(_mm512_load_si512(at), 8);
                        const __m512i total = _mm512_add_epi32(upper, _mm512_load_si512(at + TILE_WORDS));
                        const __m512 by = _mm512_loadu_ps(scales + j + half * TILE) * _mm512_set1_ps(rows.scales[r]);
                        to(r, j + half * TILE, _mm512_cvtepi32_ps(total) * by);
                    }
            }
        }
}

#endif

}  // namespace
