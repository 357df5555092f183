// Products of bfloat16 in tiles (x86's AMX): 16 rows by 16 columns over 32 terms an instruction. Every row of a tile goes
// through the same operations, and any number of rows is filled up to whole tiles: a result depends on its row and column
// alone. It is not that of products in pairs, whose sums run in another order.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "pairs.h"

#if defined(MOTSERVE_PAIRS) && defined(__AVX512BF16__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && \
    defined(__linux__)
#define MOTSERVE_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef MOTSERVE_TILES

constexpr long TILE = 16;         // rows, columns, and pairs of terms
constexpr long TERMS = 2 * TILE;  // terms
constexpr long TILE_WORDS = TILE * TILE;

// Linux lends tiles to processes that ask (ARCH_REQ_XCOMP_PERM for XTILEDATA).
inline bool tiles_here() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted;
}

// Eight tiles of full size, for one thread and a while: other libraries use them in shapes of their own.
class TilesInUse {
   public:
    TilesInUse() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int t = 0; t < 8; ++t) config.bytes[t] = 64, config.rows[t] = TILE;
        asm volatile("" : : "r"(&config) : "memory");  // compilers believe that only its first bytes are read
        _tile_loadconfig(&config);
    }
    ~TilesInUse() { _tile_release(); }
    TilesInUse(const TilesInUse&) = delete;
    TilesInUse& operator=(const TilesInUse&) = delete;
};

inline long tiles_of(long count, long size) { return (count + size - 1) / size; }

// Memory that begins at a cache line; what was in it is lost when it grows.
class TileMemory {
   public:
    uint32_t* words(long count) {
        if (count > size_) held_.reset(static_cast<uint32_t*>(std::aligned_alloc(64, 4 * tiles_of(count, TILE) * TILE)));
        size_ = std::max(size_, count);
        return held_.get();
    }

   private:
    struct Free {
        void operator()(uint32_t* words) const { std::free(words); }
    };
    std::unique_ptr<uint32_t, Free> held_;
    long size_ = 0;
};

// Rows rounded to bfloat16 in tiles [row tiles, steps, 16 rows, 16 pairs], filled up with zeros. Turned round: [.., 16
// pairs, 16 rows].
class TileRows {
   public:
    const uint32_t* words = nullptr;
    long count = 0, tiles = 0, steps = 0;

    void pack(const float* const* in, long rows, long K, bool turned) {
        reserve(rows, K);
        for (long t = 0; t < tiles; ++t) pack_tiles(in, K, t, turned);
    }

    // The same in two steps, of which threads may share the second out.
    void reserve(long rows, long K) {
        count = rows, tiles = tiles_of(rows, TILE), steps = tiles_of(K, TERMS);
        words = to_ = memory_.words(tiles * steps * TILE_WORDS);
    }
    void pack_tiles(const float* const* in, long K, long t, bool turned) {
        alignas(64) uint32_t pairs[TILE];
        for (long i = 0; i < std::min(TILE, count - t * TILE); ++i) {
            const float* from = in[t * TILE + i];
            uint32_t* tile = to_ + t * steps * TILE_WORDS;
            for (long s = 0; s < steps; ++s, tile += TILE_WORDS) {
                const __m512i row = rounded(from + s * TERMS, K - s * TERMS);
                if (!turned) {
                    _mm512_store_si512(tile + i * TILE, row);
                    continue;
                }
                _mm512_store_si512(pairs, row);
                for (long p = 0; p < TILE; ++p) tile[p * TILE + i] = pairs[p];
            }
        }
    }

   private:
    TileMemory memory_;
    uint32_t* to_ = nullptr;

    static __m512i rounded(const float* x, long left) {
        const __mmask32 mask = left < TERMS ? (1u << left) - 1 : 0xffffffff;
        const __m512 low = _mm512_maskz_loadu_ps(mask & 0xffff, x), high = _mm512_maskz_loadu_ps(mask >> 16, x + 16);
        return (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }
};

// Two tiles of 16 and, with both, two more below them, over all steps: sums [4, 16, 16]. At each step so many cache
// lines are fetched of what comes next.
template <bool both, long lines>
inline void tile_sums(const uint32_t* a, long a_row, long a_step, long a_stride, const uint32_t* b, long b_column,
                      long b_step, long steps, const char* next, float* sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long s = 0; s < steps; ++s, next += lines * 64) {
        for (long i = 0; i < lines; ++i) __builtin_prefetch(next + i * 64, 0, 2);
        _tile_loadd(4, a + s * a_step, a_stride);
        _tile_loadd(6, b + s * b_step, 64);
        _tile_loadd(7, b + b_column + s * b_step, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (both) {
            _tile_loadd(5, a + a_row + s * a_step, a_stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + TILE_WORDS, 64);
    if constexpr (both) {
        _tile_stored(2, sums + 2 * TILE_WORDS, 64);
        _tile_stored(3, sums + 3 * TILE_WORDS, 64);
    }
}

constexpr long TILES_AT_ONCE = 16;      // of rows, whose pairs stay in a cache while all columns pass
constexpr long TILE_LINES = 2 * TILE;   // of the two tiles of a step
constexpr long TILES_AHEAD = 1024;      // bytes: how far ahead weights in tiles are fetched, the best of those tried

// Rows by columns [begin, end), multiples of 32, of weights [K, N] that lie in tiles (model/tiles.py): [N / 32, steps,
// 2 tiles, 16 pairs of terms, 16 columns].
inline void tiled_products(const TileRows& rows, const bf16* weights, long begin, long end, float* const* c) {
    alignas(64) float sums[4 * TILE_WORDS];
    const long steps = rows.steps, size = steps * TILE_WORDS;
    for (long first = 0; first < rows.tiles; first += TILES_AT_ONCE)
        for (long j = begin; j < end; j += 2 * TILE) {
            const uint32_t* b = reinterpret_cast<const uint32_t*>(weights) + j / TILE * size;
            const char* next = reinterpret_cast<const char*>(b) + TILES_AHEAD;
            for (long t = first; t < std::min(rows.tiles, first + TILES_AT_ONCE); t += 2) {
                const uint32_t* a = rows.words + t * size;
                const bool both = t + 1 < rows.tiles;
                const auto sum = t > first ? (both ? tile_sums<true, 0> : tile_sums<false, 0>)
                                           : (both ? tile_sums<true, TILE_LINES> : tile_sums<false, TILE_LINES>);
                sum(a, size, TILE_WORDS, 64, b, TILE_WORDS, 2 * TILE_WORDS, steps, next, sums);
                for (long r = t * TILE; r < std::min(rows.count, (t + 2) * TILE); ++r) {
                    const float* at = sums + (r - t * TILE) / TILE * 2 * TILE_WORDS + r % TILE * TILE;
                    _mm512_storeu_ps(c[r] + j, _mm512_load_ps(at));
                    _mm512_storeu_ps(c[r] + j + TILE, _mm512_load_ps(at + TILE_WORDS));
                }
            }
        }
}

// Rows, packed and turned round, by rows [begin, end) of weights [N, K], K a multiple of 32 and N no less: columns of c.
// The last few, fewer than 32, are computed together with their neighbours.
inline void tile_dots(const TileRows& rows, const bf16* weights, long K, long N, long begin, long end,
                      float* const* c) {
    alignas(64) float sums[4 * TILE_WORDS];
    const long size = rows.steps * TILE_WORDS, words = K / 2;
    const auto* b = reinterpret_cast<const uint32_t*>(weights);
    for (long j = begin; j < end; j += 2 * TILE) {
        const long from = std::min(j, N - 2 * TILE), known = j - from;
        // The 32 rows of weights that follow, a share at each step of the first tiles of rows.
        const auto* next = reinterpret_cast<const char*>(b + (from + 2 * TILE) * words);
        for (long t = 0; t < rows.tiles; t += 2) {
            // One tile of rows twice where there is no second: its sums are not used.
            const long below = t + 1 < rows.tiles ? size : 0;
            (t == 0 ? tile_sums<true, TILE_LINES> : tile_sums<true, 0>)(
                b + from * words, TILE * words, TILE, K * 2, rows.words + t * size, below, TILE_WORDS, rows.steps,
                next, sums);
            for (long r = t * TILE; r < std::min(rows.count, (t + 2) * TILE); ++r) {
                const float* at = sums + (r - t * TILE) / TILE * TILE_WORDS + r % TILE;
                float* to = c[r] + from;
                for (long i = known; i < TILE; ++i) to[i] = at[i * TILE];
                for (long i = std::max(0L, known - TILE); i < TILE; ++i) to[TILE + i] = at[2 * TILE_WORDS + i * TILE];
            }
        }
    }
}

#endif

}  // namespace
