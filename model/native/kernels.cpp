// Row-wise kernels of the decoder for CPUs: every row of a result is computed by the same sequence of operations,
// whatever rows stand beside it and however many there are. Sums run in float32; weights are float32 or bfloat16,
// experts also int8 with a scale an output.
// Multiply-adds that are fused are written so (`fused`), and the compiler is told to fuse no others: it would choose
// anew for each number of rows.
//
// Plain C interface, called through ctypes by model/native; shapes are checked there.

#include "attention.h"
#include "decoder.h"
#include "experts.h"
#include "mixing.h"
#include "normalization.h"
#include "private_layer.h"
#include "sampling.h"
#include "token_choice.h"

extern "C" {

void motserve_draw(const float* logits, int64_t rows, int64_t V, const float* temperature, const int64_t* top_k,
                   const float* top_p, const float* min_p, const double* uniform, int64_t* tokens) {
    together(rows > 1, [&](Member& member) {
        RowWeights weights;
        member.each(rows, 1, [&](long r) {
            tokens[r] = draw(logits + r * V, V, temperature[r], top_k[r], top_p[r], min_p[r], uniform[r], weights);
        });
    });
}

void motserve_score(const float* logits, int64_t rows, int64_t V, const int64_t* tokens, int64_t k, float* chosen,
                    int64_t* ids, float* values) {
    for_each(rows > 1, rows, 1, [&](long r) {
        score(logits + r * V, V, tokens[r], k, chosen + r, ids + r * k, values + r * k);
    });
}

void motserve_normalize(const float* x, const void* weight, const void* bias, double epsilon, float* out, int64_t rows,
                        int64_t D, int32_t half) {
    if (half) normalize(x, static_cast<const bf16*>(weight), static_cast<const bf16*>(bias), epsilon, out, rows, D);
    else normalize(x, static_cast<const float*>(weight), static_cast<const float*>(bias), epsilon, out, rows, D);
}

void motserve_linear(const float* x, const void* weight, const void* bias, const float* onto, float* out, int64_t rows,
                     int64_t K, int64_t N, int32_t order, int32_t exact, int32_t half) {
    if (half)
        linear(x, static_cast<const bf16*>(weight), Added<bf16>{static_cast<const bf16*>(bias), onto}, out, rows, K, N,
               Order(order), exact);
    else
        linear(x, static_cast<const float*>(weight), Added<float>{static_cast<const float*>(bias), onto}, out, rows, K,
               N, Order(order), exact);
}

// Whether products of bfloat16 are made in tiles.
int32_t motserve_tiles() {
#ifdef MOTSERVE_TILES
    return tiles_here();
#else
    return 0;
#endif
}

void motserve_bank(const float* mixes, const void* lin1, const void* lin2, const float* scale1, const float* scale2,
                   float* out, int64_t experts_apart, int64_t rows_apart, int64_t E, int64_t n, int64_t D, int64_t S,
                   int32_t activation, int32_t weights) {
    with_experts(lin1, lin2, scale1, scale2, D, S, activation, weights,
                 [&](const auto& experts) { bank(experts, mixes, out, {experts_apart, rows_apart}, E, n); });
}

void motserve_mix_weights(float* scores, int64_t n, int64_t G, int64_t E, float T, float* entropy) {
    mix_weights(scores, n, G, E, T, entropy);
}

void motserve_private_layer(const PrivateLayer* layer) { private_layer(*layer); }

// How many private rows are computed at once.
int64_t motserve_private_rows() { return PRIVATE_ROWS; }

// Numbers of float32 that a pass needs room for.
int64_t motserve_decoder_room(const Decoder* decoder, const DecoderStep* step) {
    Room room(nullptr);
    PassMemory(*decoder, *step, room);
    return room.taken;
}

// Whether it was done: not where a row is of a token or a position that the model does not know.
int32_t motserve_decode(const Decoder* decoder, const DecoderStep* step) {
    if (!known_rows(*decoder, *step)) return 0;
    Room room(step->room);
    const PassMemory memory(*decoder, *step, room);
    if (decoder->half) Pass<bf16>(*decoder, *step, memory).run();
    else Pass<float>(*decoder, *step, memory).run();
    return 1;
}

void motserve_gates(const float* scores, float* gates, int64_t n, int64_t routed, int64_t shared, int64_t per_token,
                    int32_t normalize) {
    gates_of({long(routed), long(shared), long(per_token), normalize != 0}, scores, gates, n);
}

void motserve_routed(const float* x, const float* gates, const void* lin1, const void* lin2, const float* scale1,
                     const float* scale2, float* out, int64_t n, int64_t E, int64_t D, int64_t S, int32_t activation,
                     int32_t weights) {
    with_experts(lin1, lin2, scale1, scale2, D, S, activation, weights,
                 [&](const auto& experts) { routed(experts, x, gates, out, n, E); });
}

void motserve_activate(float* x, int64_t count, int32_t kind) { activate_together(x, count, kind); }

void motserve_keep(const float* qkv, const int64_t* slots, void* keys, void* values, int64_t rows, int64_t width,
                   int32_t half) {
    if (half) keep(qkv, slots, static_cast<bf16*>(keys), static_cast<bf16*>(values), rows, width);
    else keep(qkv, slots, static_cast<float*>(keys), static_cast<float*>(values), rows, width);
}

void motserve_attend(const float* queries, int64_t apart, const void* keys, const void* values, const int64_t* tables,
                     const int64_t* lengths, float* out, int64_t rows, int64_t heads, int64_t size,
                     int64_t table_width, int64_t block_size, int32_t half) {
    if (half)
        attend(queries, apart, static_cast<const bf16*>(keys), static_cast<const bf16*>(values), tables, lengths, out,
               rows, heads, size, table_width, block_size);
    else
        attend(queries, apart, static_cast<const float*>(keys), static_cast<const float*>(values), tables, lengths, out,
               rows, heads, size, table_width, block_size);
}
}
