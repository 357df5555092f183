// Products of bfloat16 in tiles (x86's AMX): 16 rows by 16 columns over 32 terms an instruction. Every row of a tile goes
// through the same operations, and any number of rows is filled up to whole tiles: a result depends on its row and column
// alone. It is not that of products in pairs, whose sums run in another order.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <type_traits>

#include "pairs.h"

#if defined(MOTSERVE_PAIRS) && defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AMX_TILE__) && \
    defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define MOTSERVE_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef MOTSERVE_TILES

constexpr long TILE = 16;         // rows, columns, and pairs of terms
constexpr long TERMS = 2 * TILE;  // terms
constexpr long TILE_WORDS = TILE * TILE;
typedef std::bool_constant<true> Yes;
typedef std::bool_constant<false> No;

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

// Rows rounded to bfloat16 in tiles [row tiles, steps, 16 rows, 16 pairs]. Terms are filled up with zeros; rows with
// whatever is there, as no row's results depend on another's. Turned round: [.., 16 pairs, 16 rows].
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

    // 16 numbers of a row, from a term on that is a multiple of 16.
    void put(long row, long term, __m512 numbers) {
        uint32_t* to = to_ + (row / TILE * steps + term / TERMS) * TILE_WORDS + row % TILE * TILE + term % TERMS / 2;
        _mm256_store_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(numbers));
    }

    // 32 numbers, or those there are.
    static __m512i rounded(const float* x, long left) {
        const __mmask32 mask = left < TERMS ? (1u << left) - 1 : 0xffffffff;
        const __m512 low = _mm512_maskz_loadu_ps(mask & 0xffff, x), high = _mm512_maskz_loadu_ps(mask >> 16, x + 16);
        return (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }

   private:
    TileMemory memory_;
    uint32_t* to_ = nullptr;
};

// Sums stand in the first four tiles, [4, 16, 16]; all: not only the first two are of interest.
inline void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

template <bool all, class Number>
inline void store_sums(Number* sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + TILE_WORDS, 64);
    if constexpr (all) {
        _tile_stored(2, sums + 2 * TILE_WORDS, 64);
        _tile_stored(3, sums + 3 * TILE_WORDS, 64);
    }
}

// Two tiles of 16 and, with both, two more below them, over all steps: sums [4, 16, 16]. What else is to be done
// meanwhile, at each step.
template <bool both, class Meanwhile>
inline void tile_sums(const uint32_t* a, long a_row, long a_step, const uint32_t* b, long b_column, long b_step,
                      long steps, float* sums, const Meanwhile& meanwhile) {
    clear_sums();
    for (long s = 0; s < steps; ++s) {
        meanwhile(s);
        _tile_loadd(4, a + s * a_step, 64);
        _tile_loadd(6, b + s * b_step, 64);
        _tile_loadd(7, b + b_column + s * b_step, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (both) {
            _tile_loadd(5, a + a_row + s * a_step, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    store_sums<both>(sums);
}

struct Nothing {
    void operator()(long) const {}
};

constexpr long TILES_AHEAD = 4096;  // bytes that weights are fetched ahead, the best of those tried

// Fetches weights in tiles, two tiles a step.
struct FetchTiles {
    const uint32_t* at;

    void operator()(long s) const {
        const char* next = reinterpret_cast<const char*>(at + s * 2 * TILE_WORDS) + TILES_AHEAD;
        for (long i = 0; i < 2 * TILE; ++i) __builtin_prefetch(next + i * 64, 0, 2);
    }
};

constexpr long TILES_AT_ONCE = 16;  // of rows, whose pairs stay in a cache while all columns pass

// Takes results, 16 columns of a row from one on, to rows of floats.
struct ToRows {
    float* const* c;

    void operator()(long row, long column, __m512 numbers) const { _mm512_storeu_ps(c[row] + column, numbers); }
};

// Rows by columns [begin, end), multiples of 32, of weights [K, N] that lie in tiles (model/tiles.py): [N / 32, steps,
// 2 tiles, 16 pairs of terms, 16 columns].
template <class To>
inline void tiled_products(const TileRows& rows, const bf16* weights, long begin, long end, const To& to) {
    alignas(64) float sums[4 * TILE_WORDS];
    const long steps = rows.steps, size = steps * TILE_WORDS;
    for (long first = 0; first < rows.tiles; first += TILES_AT_ONCE)
        for (long j = begin; j < end; j += 2 * TILE) {
            const uint32_t* b = reinterpret_cast<const uint32_t*>(weights) + j / TILE * size;
            for (long t = first; t < std::min(rows.tiles, first + TILES_AT_ONCE); t += 2) {
                const auto add_up = [&](auto both, const auto& meanwhile) {
                    tile_sums<both.value>(rows.words + t * size, size, TILE_WORDS, b, TILE_WORDS, 2 * TILE_WORDS, steps,
                                          sums, meanwhile);
                };
                if (t == first) t + 1 < rows.tiles ? add_up(Yes(), FetchTiles{b}) : add_up(No(), FetchTiles{b});
                else t + 1 < rows.tiles ? add_up(Yes(), Nothing()) : add_up(No(), Nothing());
                for (long r = t * TILE; r < std::min(rows.count, (t + 2) * TILE); ++r) {
                    const float* at = sums + (r - t * TILE) / TILE * 2 * TILE_WORDS + r % TILE * TILE;
                    to(r, j, _mm512_load_ps(at));
                    to(r, j + TILE, _mm512_load_ps(at + TILE_WORDS));
                }
            }
        }
}

// Copies 32 rows of weights [.., K], one run of memory, to tiles [steps, 2, 16 rows, 16 pairs], some rows a step.
struct CopyRows {
    const bf16* from;
    long K;
    uint32_t* to;

    void operator()(long s) const {
        const long steps = K / TERMS, rows = 2 * TILE;
        for (long r = s * rows / steps; r < (s + 1) * rows / steps; ++r) {
            uint32_t* row = to + r / TILE * TILE_WORDS + r % TILE * TILE;
            for (long k = 0; k < K; k += TERMS, row += 2 * TILE_WORDS) {
                __builtin_prefetch(from + r * K + k + TILES_AHEAD / 2, 0, 2);
                _mm512_store_si512(row, _mm512_loadu_si512(from + r * K + k));
            }
        }
    }
};

// Columns of a tile but for the first few, as rows.
inline void store_turned(const float* tile, long columns, long skipped, float* const* c, long at) {
    const __m512i places = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
    for (long r = 0; r < columns; ++r)
        _mm512_mask_storeu_ps(c[r] + at, 0xffff << skipped, _mm512_i32gather_ps(places, tile + r, 4));
}

// Rows, packed and turned round, by rows [begin, end) of weights [N, K], K a multiple of 32 and N no less: columns of c.
// The last few, fewer than 32, are computed together with their neighbours. copy: room for 64 rows of weights: while 32
// are multiplied, the next ones come.
inline void tile_dots(const TileRows& rows, const bf16* weights, long K, long N, long begin, long end, uint32_t* copy,
                      float* const* c) {
    alignas(64) float sums[4 * TILE_WORDS];
    const long steps = rows.steps, size = steps * TILE_WORDS;
    const auto place = [&](long j) { return std::min(j, N - 2 * TILE); };
    for (long s = 0; s < steps; ++s) CopyRows{weights + place(begin) * K, K, copy}(s);
    for (long j = begin, half = 0; j < end; j += 2 * TILE, half = 1 - half) {
        const uint32_t* a = copy + half * 2 * size;
        const CopyRows following{weights + place(std::min(j + 2 * TILE, end)) * K, K, copy + (1 - half) * 2 * size};
        for (long t = 0; t < rows.tiles; t += 2) {
            const uint32_t* b = rows.words + t * size;
            // One tile of rows twice where there is no second: its sums are not used.
            const long below = t + 1 < rows.tiles ? size : 0;
            if (t == 0) tile_sums<true>(a, TILE_WORDS, 2 * TILE_WORDS, b, below, TILE_WORDS, steps, sums, following);
            else tile_sums<true>(a, TILE_WORDS, 2 * TILE_WORDS, b, below, TILE_WORDS, steps, sums, Nothing());
            for (long part = 0; part < 4; ++part) {
                const long first = (t + part % 2) * TILE, skipped = std::max(0L, j - place(j) - part / 2 * TILE);
                if (first < rows.count && skipped < TILE)
                    store_turned(sums + part * TILE_WORDS, std::min(TILE, rows.count - first), skipped, c + first,
                                 place(j) + part / 2 * TILE);
            }
        }
    }
}

#endif

}  // namespace
