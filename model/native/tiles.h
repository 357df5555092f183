// Products of bfloat16 in tiles (x86's AMX): 16 rows by 16 columns over 32 terms an instruction. Every row of a tile goes
// through the same operations, and any number of rows is filled up to whole tiles: a result depends on its row and column
// alone. It is not that of products in pairs, whose sums run in another order.

#pragma once

#include <algorithm>
#include <vector>

#include "pair_columns.h"

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
        if (long(held_.size()) < count + 16) held_.resize(count + 16);
        return reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(held_.data()) + 63) & ~uintptr_t(63));
    }

   private:
    std::vector<uint32_t> held_;
};

// Rows rounded to bfloat16 in tiles [row tiles, steps, 16 rows, 16 pairs], filled up with zeros. Turned round: [.., 16
// pairs, 16 rows].
struct TileRows {
    TileMemory memory;
    uint32_t* words = nullptr;
    long count = 0, tiles = 0, steps = 0;

    void pack(const float* const* in, long rows, long K, bool turned) {
        count = rows, tiles = tiles_of(rows, TILE), steps = tiles_of(K, TERMS);
        words = memory.words(tiles * steps * TILE_WORDS);
        alignas(64) uint32_t pairs[TILE];
        for (long r = 0; r < tiles * TILE; ++r)
            for (long s = 0; s < steps; ++s) {
                uint32_t* tile = words + (r / TILE * steps + s) * TILE_WORDS;
                _mm512_store_si512(pairs, r < rows ? rounded(in[r] + s * TERMS, K - s * TERMS) : __m512i());
                for (long p = 0; p < TILE; ++p) tile[turned ? p * TILE + r % TILE : r % TILE * TILE + p] = pairs[p];
            }
    }

   private:
    static __m512i rounded(const float* x, long left) {
        const __mmask32 mask = left < TERMS ? (1u << left) - 1 : 0xffffffff;
        const __m512 low = _mm512_maskz_loadu_ps(mask & 0xffff, x), high = _mm512_maskz_loadu_ps(mask >> 16, x + 16);
        return (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }
};

// Fetches what comes next, some lines at a time.
struct TileAhead {
    const char* at;
    long lines;

    void fetch() {
        for (long i = 0; i < lines; ++i, at += 64) __builtin_prefetch(at, 0, 2);
    }
};

// Words from one column tile of packed weights to the next: all steps, and a cache line, or all columns would share few
// places of a cache.
inline long tile_stride(long steps) { return steps * TILE_WORDS + TILE; }

// Words that columns of so many steps take.
inline long packed_words(long columns, long steps) { return tiles_of(columns, PAIR_COLUMNS) * 2 * tile_stride(steps); }

// Weights [K, columns], rows a stride apart, as tiles of pairs [column tiles, steps, 16 pairs, 16 columns]; the columns
// of two tiles are interleaved.
inline void pack_weights(const bf16* b, long K, long columns, long stride, uint32_t* words) {
    const long steps = tiles_of(K, TERMS);
    for (long p = 0; p < steps * TILE; ++p) {
        uint32_t* to = words + p / TILE * TILE_WORDS + p % TILE * TILE;
        for (long j = 0; j < columns; j += PAIR_COLUMNS, to += 2 * tile_stride(steps)) {
            __m512i first = __m512i(), second = __m512i();
            if (2 * p < K) {
                const bool whole = columns - j >= PAIR_COLUMNS && 2 * p + 1 < K;
                const __mmask32 mask = columns - j < PAIR_COLUMNS ? (1u << (columns - j)) - 1 : 0xffffffff;
                const bf16* at = b + j;
                if (whole) WeightRows<bf16>{at, stride}.pairs(p, 0, first, second);
                else WeightRest<bf16>{at, stride, K, mask}.pairs(p, 0, first, second);
            }
            _mm512_store_si512(to, first);
            _mm512_store_si512(to + tile_stride(steps), second);
        }
    }
}

// Two tiles of 16 and, with both, two more below them, over all steps: sums [4, 16, 16].
template <bool both>
inline void tile_sums(const uint32_t* a, long a_row, long a_step, long a_stride, const uint32_t* b, long b_column,
                      long steps, TileAhead ahead, float* sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long s = 0; s < steps; ++s) {
        _tile_loadd(4, a + s * a_step, a_stride);
        _tile_loadd(6, b + s * TILE_WORDS, 64);
        _tile_loadd(7, b + b_column + s * TILE_WORDS, 64);
        ahead.fetch();
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

// Rows by weights [K, columns] that have been packed, to columns of c.
inline void tile_columns(const TileRows& rows, const uint32_t* weights, long columns, float* const* c) {
    alignas(64) float sums[4 * TILE_WORDS];
    const long steps = rows.steps, size = steps * TILE_WORDS, pairs = tiles_of(columns, PAIR_COLUMNS);
    const TileAhead nothing{nullptr, 0};
    for (long j = 0; j < pairs; ++j)
        for (long t = 0; t < rows.tiles; t += 2) {
            const uint32_t *a = rows.words + t * size, *b = weights + 2 * j * tile_stride(steps);
            if (t + 1 < rows.tiles) tile_sums<true>(a, size, TILE_WORDS, 64, b, tile_stride(steps), steps, nothing, sums);
            else tile_sums<false>(a, size, TILE_WORDS, 64, b, tile_stride(steps), steps, nothing, sums);
            const long left = columns - j * PAIR_COLUMNS;
            const __mmask32 mask = left < PAIR_COLUMNS ? (1u << left) - 1 : 0xffffffff;
            for (long r = t * TILE; r < std::min(rows.count, (t + 2) * TILE); ++r) {
                const float* at = sums + (r - t * TILE) / TILE * 2 * TILE_WORDS + r % TILE * TILE;
                __m512 first = _mm512_load_ps(at), second = _mm512_load_ps(at + TILE_WORDS);
                in_order(first, second);
                _mm512_mask_storeu_ps(c[r] + j * PAIR_COLUMNS, mask & 0xffff, first);
                _mm512_mask_storeu_ps(c[r] + j * PAIR_COLUMNS + 16, mask >> 16, second);
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
            tile_sums<true>(b + from * words, TILE * words, TILE, K * 2, rows.words + t * size, below, rows.steps,
                            TileAhead{next, t == 0 ? 2 * TILE : 0}, sums);
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
