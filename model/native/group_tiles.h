// Shared groups in tiles: what experts see of them, and what their members get back.

#pragma once

#include <algorithm>
#include <cstring>

#include "tiles.h"

namespace {

#ifdef MOTSERVE_TILES

// Words that hold numbers of two rows, rounded: the even row's below, the odd one's above.
inline __m512i rounded_words(__m512 numbers) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(numbers)); }
inline __m512i above(__m512i words) { return _mm512_slli_epi32(words, TILE); }

// Some groups of one layer. Members, weights and answers are rounded to bfloat16; sums run in float32.
class GroupTiles {
   public:
    const long n, G, D, E;  // D a multiple of 32

    // room: so many words that begin at a cache line.
    GroupTiles(long n, long G, long D, long E, uint32_t* room)
        : n(n), G(G), D(D), E(E), steps_(tiles_of(G, TERMS)), blocks_(tiles_of(E, TILE)), rows_(tiles_of(G, TILE)),
          answer_steps_(tiles_of(E, TERMS)) {
        members_ = room, room += n * members_size();
        merge_ = room, room += n * merge_size();
        emit_ = room, room += n * emit_size();
        answers_ = room;
    }
    // Of groups of fewer most of a tile would be empty, and that takes as long to multiply.
    static bool worth_it(long G) { return G >= TILE; }
    static long words(long n, long G, long D, long E) {
        const GroupTiles one(1, G, D, E, nullptr);
        return n * (one.members_size() + one.merge_size() + one.emit_size() + one.answers_size());
    }

    // A group's members [G, D], and the weights by which they mix and share answers [G, E].
    void pack(long group, const float* members, const float* weights) const {
        pack_members(members, members_ + group * members_size());
        for (long block = 0; block < blocks_; ++block)
            pack_merge(weights, block * TILE, merge_ + group * merge_size() + block * steps_ * TILE_WORDS);
        for (long g = 0; g < G; ++g) {
            uint32_t* to = emit_ + group * emit_size() + g / TILE * answer_steps_ * TILE_WORDS + g % TILE * TILE;
            for (long s = 0; s < answer_steps_; ++s, to += TILE_WORDS)
                _mm512_store_si512(to, TileRows::rounded(weights + g * E + s * TERMS, E - s * TERMS));
        }
        // What no expert answers must be a number, as it is multiplied by zero.
        for (long pair = (E + 1) / 2; pair < answer_steps_ * TILE; ++pair)
            for (long j = 0; j < D; j += TILE) _mm512_store_si512(answer(group, 2 * pair, j), __m512i());
    }

    // What 16 experts, or as many as there are from a multiple of 16 on, see of a group: put(number of the expert among
    // them, column, 16 numbers).
    template <class Put>
    void mix(long group, long first, const Put& put) const {
        alignas(64) float sums[4 * TILE_WORDS];
        const uint32_t* merge = merge_ + group * merge_size() + first / TILE * steps_ * TILE_WORDS;
        for (long j = 0; j < D; j += 2 * TILE) {
            const uint32_t* members = members_ + group * members_size() + j / TILE * steps_ * TILE_WORDS;
            tile_sums<false>(merge, 0, TILE_WORDS, members, TILE_WORDS, 2 * TILE_WORDS, steps_, sums, Nothing());
            for (long e = 0; e < std::min(TILE, E - first); ++e) {
                put(e, j, _mm512_load_ps(sums + e * TILE));
                put(e, j + TILE, _mm512_load_ps(sums + TILE_WORDS + e * TILE));
            }
        }
    }

    // Takes an expert's answers, 16 columns of a group's from one on; an even expert's before the next one's.
    struct Answers {
        const GroupTiles& groups;
        long expert;

        void operator()(long group, long column, __m512 numbers) const {
            uint32_t* to = groups.answer(group, expert, column);
            const __m512i words = rounded_words(numbers);
            if (expert % 2 == 0) _mm512_store_si512(to, words);
            else _mm512_store_si512(to, _mm512_or_si512(_mm512_load_si512(to), above(words)));
        }
    };

    // Adds what members get, in columns [begin, end), multiples of 32, to their rows; null: nobody's.
    void share_out(long group, long begin, long end, float* const* rows) const {
        alignas(64) float sums[4 * TILE_WORDS];
        const long size = answer_steps_ * TILE_WORDS;
        for (long j = begin; j < end; j += 2 * TILE)
            for (long t = 0; t < rows_; t += 2) {
                const uint32_t* emit = emit_ + group * emit_size() + t * size;
                const auto add_up = [&](auto both) {
                    tile_sums<both.value>(emit, size, TILE_WORDS, answer(group, 0, j), TILE_WORDS, 2 * TILE_WORDS,
                                          answer_steps_, sums, Nothing());
                };
                t + 1 < rows_ ? add_up(Yes()) : add_up(No());
                for (long g = t * TILE; g < std::min(G, (t + 2) * TILE); ++g) {
                    if (rows[g] == nullptr) continue;
                    const float* at = sums + (g - t * TILE) / TILE * 2 * TILE_WORDS + g % TILE * TILE;
                    for (long half = 0; half < 2; ++half) {
                        float* to = rows[g] + j + half * TILE;
                        _mm512_storeu_ps(to, _mm512_loadu_ps(to) + _mm512_load_ps(at + half * TILE_WORDS));
                    }
                }
            }
    }

   private:
    const long steps_, blocks_, rows_, answer_steps_;
    uint32_t* members_;  // [n, D / 32, steps, 2 tiles, 16 pairs of members, 16 columns]
    uint32_t* merge_;    // [n, blocks, steps, 16 experts, 16 pairs of members]
    uint32_t* emit_;     // [n, row tiles, answer steps, 16 members, 16 pairs of experts]
    uint32_t* answers_;  // [n, D / 32, answer steps, 2 tiles, 16 pairs of experts, 16 columns]

    long members_size() const { return D / TILE * steps_ * TILE_WORDS; }
    long merge_size() const { return blocks_ * steps_ * TILE_WORDS; }
    long emit_size() const { return rows_ * answer_steps_ * TILE_WORDS; }
    long answers_size() const { return D / TILE * answer_steps_ * TILE_WORDS; }

    uint32_t* answer(long group, long expert, long column) const {
        const long tile = 2 * (column / TERMS * answer_steps_ + expert / TERMS) + column % TERMS / TILE;
        return answers_ + group * answers_size() + tile * TILE_WORDS + expert % TERMS / 2 * TILE;
    }

    void pack_members(const float* members, uint32_t* to) const {
        const auto words = [&](long g, long j) {
            return g < G ? rounded_words(_mm512_loadu_ps(members + g * D + j)) : __m512i();
        };
        for (long j = 0; j < D; j += 2 * TILE)
            for (long pair = 0; pair < steps_ * TILE; ++pair)
                for (long half = 0; half < 2; ++half) {
                    const long tile = 2 * (j / TERMS * steps_ + pair / TILE) + half, column = j + half * TILE;
                    _mm512_store_si512(to + tile * TILE_WORDS + pair % TILE * TILE,
                                       _mm512_or_si512(words(2 * pair, column), above(words(2 * pair + 1, column))));
                }
    }

    // Turned round: weights [G, E] by expert.
    void pack_merge(const float* weights, long first, uint32_t* to) const {
        alignas(64) uint32_t pairs[TILE];
        const __mmask16 there = E - first < TILE ? (1u << (E - first)) - 1 : 0xffff;
        const auto words = [&](long g) {
            return g < G ? rounded_words(_mm512_maskz_loadu_ps(there, weights + g * E + first)) : __m512i();
        };
        if (G % TERMS != 0) std::memset(to, 0, steps_ * TILE_WORDS * sizeof(uint32_t));
        for (long pair = 0; pair < (G + 1) / 2; ++pair) {
            _mm512_store_si512(pairs, _mm512_or_si512(words(2 * pair), above(words(2 * pair + 1))));
            uint32_t* column = to + pair / TILE * TILE_WORDS + pair % TILE;
            for (long e = 0; e < TILE; ++e) column[e * TILE] = pairs[e];
        }
    }
};

#endif

}  // namespace
