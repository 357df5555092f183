// A whole pass through the decoder for rows that attend one by one: what the parts beside this file do, in one call, as
// a step of few rows would otherwise spend as long in between as in them. Dense models, Switch and top-k, and MoT above
// temperature 0.

#pragma once

#include <algorithm>

#include "attention.h"
#include "mixing.h"
#include "normalization.h"
#include "private_layer.h"
#include "shared_layer.h"
#include "token_choice.h"

extern "C" {

// These three are mirrored in model/native/decoder.py.

struct Affine {
    const void *weight, *bias;
    int64_t order;  // linear.h's
};

struct DecoderLayer {
    const void *norm1, *norm1_bias, *norm2, *norm2_bias;
    Affine attention, projection;
    void *keys, *values;  // [blocks, block_size, D]
    Affine first, second;  // of a dense layer, or:
    const void* controller;  // [D, E], or [D, routed]
    const void *lin1, *lin2;
    const float *scale1, *scale2;
    const void* crowd;          // [places, G, D]; null: private rows have no company, and there are no groups
    const float* crowd_scores;  // [places, E, G]
};

struct Decoder {
    int64_t vocabulary, length;  // how many embeddings there are
    int64_t layers, D, heads, block_size, hidden;  // hidden: a dense layer's, or an expert's
    int64_t E, G, places, rivals;         // E 0: dense
    int64_t routed, per_token, normalize;  // per_token 0: rows choose no experts
    int32_t activation, experts;   // the type of experts
    int32_t half, crowd_half;      // whether they are bfloat16
    double epsilon;
    double temperature;  // of shared groups
    const DecoderLayer* layer;
    const void *tokens, *positions;  // embeddings
    const void *norm, *norm_bias;
};

// Public rows first.
struct DecoderStep {
    int64_t rows, shared;  // rows: all; shared: the public ones
    const int64_t *ids, *positions, *slots, *lengths;  // [rows]
    const int64_t* tables;  // [rows, table_width]
    int64_t table_width;
    int64_t groups;
    const int64_t* members;  // [groups, G]: a row, or -1 where the crowd of the group's position stands
    const int64_t* places;   // [groups]
    const float *temperatures, *skip_below;  // of private rows
    const uint8_t* live;
    float *shared_entropy, *private_entropy;  // [groups], [private rows]; added to
    int64_t* used;                            // [private rows], added to
    float* room;
    float* out;  // [rows, D]
};
}

namespace {

inline bool known_rows(const Decoder& d, const DecoderStep& s) {
    for (long row = 0; row < s.rows; ++row)
        if (s.ids[row] < 0 || s.ids[row] >= d.vocabulary || s.positions[row] < 0 || s.positions[row] >= d.length)
            return false;
    return true;
}

// Memory of a pass, part after part; without any, only the sizes are added up.
class Room {
   public:
    explicit Room(float* base) : base_(base) {}
    float* take(long count) {
        float* part = base_ == nullptr ? nullptr : base_ + taken;
        taken += (count + LANES - 1) / LANES * LANES;
        return part;
    }
    long taken = 0;

   private:
    float* base_;
};

struct PassMemory {
    float *x, *next, *normed, *wide, *seen, *own, *gates, *members, *scores, *answers, *mixes, *out, *private_answers,
        *mixed;

    PassMemory(const Decoder& d, const DecoderStep& s, Room& room) {
        const long n = s.rows, alone = std::min<long>(n - s.shared, PRIVATE_ROWS), places = s.groups * d.G;
        const long beside = d.E * d.D;
        x = room.take(n * d.D), next = room.take(n * d.D), normed = room.take(n * d.D), seen = room.take(n * d.D);
        wide = room.take(n * std::max<long>(3 * d.D, d.E == 0 ? d.hidden : 0));
        if (d.E == 0) return;
        own = room.take(n * d.E);
        if (d.per_token > 0) {
            gates = room.take(n * d.E);
            return;
        }
        members = room.take(places * d.D), scores = room.take(places * d.E);
#ifdef MOTSERVE_TILES
        if (alone == 0 && d.experts >= TILES && GroupTiles::worth_it(d.G)) {
            answers = room.take(GroupTiles::words(s.groups, d.G, d.D, d.E));
            return;
        }
#endif
        out = room.take(places * d.D), answers = room.take(s.groups * beside);
        if (alone == 0) return;
        mixes = room.take(s.groups * beside);
        private_answers = room.take(alone * beside);
        mixed = room.take(alone * beside);
    }
};

template <class W>
class Pass {
   public:
    Pass(const Decoder& d, const DecoderStep& s, const PassMemory& m) : d(d), s(s), m(m) {}

    void run() {
        embed();
        for (long i = 0; i < d.layers; ++i) {
            const DecoderLayer& layer = d.layer[i];
            attention(layer);
            normalize(m.x, of(layer.norm2), of(layer.norm2_bias), d.epsilon, m.normed, s.rows, d.D);
            if (d.E == 0) dense(layer);
            else if (d.per_token > 0) chosen(layer);
            else if (d.crowd_half) mixture<bf16>(layer);
            else mixture<float>(layer);
        }
        normalize(m.x, of(d.norm), of(d.norm_bias), d.epsilon, s.out, s.rows, d.D);
    }

   private:
    const Decoder& d;
    const DecoderStep& s;
    PassMemory m;

    static const W* of(const void* weights) { return static_cast<const W*>(weights); }

    void embed() {
        for (long row = 0; row < s.rows; ++row) {
            const W *token = of(d.tokens) + s.ids[row] * d.D, *place = of(d.positions) + s.positions[row] * d.D;
            for (long i = 0; i < d.D; ++i) m.x[row * d.D + i] = value(token + i) + value(place + i);
        }
    }

    void affine(const Affine& by, const float* x, const float* onto, float* out, long K, long N) {
        linear(x, of(by.weight), Added<W>{of(by.bias), onto}, out, s.rows, K, N, Order(by.order), false);
    }

    void attention(const DecoderLayer& layer) {
        const long D = d.D;
        normalize(m.x, of(layer.norm1), of(layer.norm1_bias), d.epsilon, m.normed, s.rows, D);
        affine(layer.attention, m.normed, nullptr, m.wide, D, 3 * D);
        keep(m.wide, s.slots, static_cast<W*>(layer.keys), static_cast<W*>(layer.values), s.rows, D);
        attend(m.wide, 3 * D, of(layer.keys), of(layer.values), s.tables, s.lengths, m.seen, s.rows, d.heads,
               D / d.heads, s.table_width, d.block_size);
        affine(layer.projection, m.seen, m.x, m.next, D, D);
        std::swap(m.x, m.next);
    }

    void dense(const DecoderLayer& layer) {
        affine(layer.first, m.normed, nullptr, m.wide, d.D, d.hidden);
        activate_together(m.wide, s.rows * d.hidden, d.activation);
        affine(layer.second, m.wide, m.x, m.next, d.hidden, d.D);
        std::swap(m.x, m.next);
    }

    // Scores of all rows, to m.own.
    void score(const DecoderLayer& layer, long count) {
        linear(m.normed, of(layer.controller), Added<W>{nullptr, nullptr}, m.own, s.rows, d.D, count, BY_INPUT, true);
    }

    template <class F>
    void with(const DecoderLayer& layer, F use) {
        with_experts(layer.lin1, layer.lin2, layer.scale1, layer.scale2, d.D, d.hidden, d.activation, d.experts, use);
    }

    void chosen(const DecoderLayer& layer) {
        score(layer, d.routed);
        gates_of({long(d.routed), long(d.E - d.routed), long(d.per_token), d.normalize != 0}, m.own, m.gates, s.rows);
        with(layer, [&](const auto& experts) { routed(experts, m.normed, m.gates, m.next, s.rows, d.E); });
        add(m.next, m.x, s.rows * d.D);
    }

    template <class C>
    void mixture(const DecoderLayer& layer) {
        score(layer, d.E);
        if (s.groups > 0) {
            gather<C>(layer);
            mix_weights(m.scores, s.groups, d.G, d.E, d.temperature, s.shared_entropy);
        }
        if (s.rows > s.shared) return beside_private_rows(layer);
        std::vector<float*> rows(s.groups * d.G);
        for (long at = 0; at < s.groups * d.G; ++at) rows[at] = s.members[at] < 0 ? nullptr : m.x + s.members[at] * d.D;
        with(layer, [&](const auto& experts) {
            shared_layer(experts, SharedLayer{long(s.groups), long(d.G), long(d.E), m.members, m.scores, m.answers,
                                              m.out, rows.data()});
        });
    }

    // Members of the shared groups, and their scores [groups, G, E].
    template <class C>
    void gather(const DecoderLayer& layer) {
        const long D = d.D, E = d.E, G = d.G;
        for_each(s.groups * G * (D + E) > SERIAL, s.groups * G, 0, [&](long at) {
            const long row = s.members[at], place = d.places > 1 ? s.places[at / G] : 0;
            float *member = m.members + at * D, *scores = m.scores + at * E;
            if (row >= 0) {
                std::copy(m.normed + row * D, m.normed + (row + 1) * D, member);
                std::copy(m.own + row * E, m.own + (row + 1) * E, scores);
                return;
            }
            const C* crowd = static_cast<const C*>(layer.crowd) + (place * G + at % G) * D;
            const float* theirs = layer.crowd_scores + place * E * G + at % G;
            for (long i = 0; i < D; ++i) member[i] = value(crowd + i);
            for (long e = 0; e < E; ++e) scores[e] = theirs[e * G];
        });
    }

    // Private rows, and the shared groups through the same experts while their weights are at hand.
    void beside_private_rows(const DecoderLayer& layer) {
        const long D = d.D, E = d.E, G = d.G, apart = s.groups * D;
        const long some = (E + TOGETHER - 1) / TOGETHER, columns = 8 * LANES, parts = (D + columns - 1) / columns;
        for_each(s.groups > 0, s.groups * some, 0, [&](long task) {
            const long group = task / some, e = task % some * TOGETHER;
            all_weighted_sums(m.scores + group * G * E + e, 1, E, m.members + group * G * D, G, D, 0, D,
                              m.mixes + e * apart + group * D, apart, std::min(TOGETHER, E - e));
        });
        PrivateLayer own{};
        own.n = s.rows - s.shared, own.D = D, own.E = E, own.S = d.hidden;
        own.places = d.places, own.members = layer.crowd == nullptr ? 0 : G, own.rivals = d.rivals;
        own.activation = d.activation, own.weights = d.experts, own.half = d.crowd_half;
        own.x = m.normed + s.shared * D, own.own = m.own + s.shared * E, own.out = m.next + s.shared * D;
        own.crowd = layer.crowd, own.crowd_scores = layer.crowd_scores;
        own.positions = s.positions + s.shared, own.live = s.live;
        own.temperatures = s.temperatures, own.skip_below = s.skip_below;
        own.lin1 = layer.lin1, own.lin2 = layer.lin2, own.scale1 = layer.scale1, own.scale2 = layer.scale2;
        own.entropy = s.private_entropy, own.used = s.used;
        own.groups = s.groups, own.experts_apart = apart, own.groups_apart = D;
        own.mixes = m.mixes, own.outputs = m.answers;
        own.answers = m.private_answers, own.mixed = m.mixed;
        private_layer(own);
        for_each(s.groups > 0, s.groups * parts, 0, [&](long task) {
            const long group = task / parts, j = task % parts * columns;
            all_weighted_sums(m.scores + group * G * E, E, 1, m.answers + group * D, E, apart, j,
                              std::min(D, j + columns), m.out + group * G * D, D, G);
        });
        for (long at = 0; at < s.groups * G; ++at)
            if (s.members[at] >= 0) add(m.out + at * D, m.x + s.members[at] * D, D);
        add(m.next + s.shared * D, m.x + s.shared * D, (s.rows - s.shared) * D);
    }

    static void add(const float* from, float* to, long count) {
        for (long i = 0; i < count; ++i) to[i] += from[i];
    }
};

}  // namespace
