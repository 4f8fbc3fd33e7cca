// A step of decodes: every row is the next of a thread of its own, and no thread of the step waits
// for one that has lost its core.
//
// Such a step is over in milliseconds and reads every weight once, while other processes want the
// same cores for moments.  A phase is done when every piece is: whoever finds no piece left to claim
// waits about as long as a piece takes, and then computes what is still missing itself.  A piece
// that two have computed has been written twice with the same bits, because
// - a phase reads what earlier phases gave and nothing that it writes itself;
// - what a phase gives is kept while the last of the threads may still write it: the first is never
//   more than KEPT_LAYERS - 1 layers ahead, and the step ends when all have come back;
// - the residual stream, which is added to, is every thread's own.
// Who comes back late passes over all that is done meanwhile.
//
// Threads take pieces; which of them computes what is left to chance, what is computed is not.
#pragma once
#include "attention.h"
#include "engine.h"
#include "linear.h"
#include "rows.h"

namespace {

constexpr int64_t PATIENCE_NS = 1000; // beside twice the time of a piece

struct DecodeStep {
    LlmEngine &engine;
    const LlmModel &model;
    const LlmPlan &plan;
    const int threads;
    Scratch &scratch;
    const int64_t rows, x_stride, mixed_stride;
    Phase *phase; // the next one

    DecodeStep(LlmEngine &e, int t)
        : engine(e), model(e.model), plan(*e.plan), threads(pool_threads(e.pool)), scratch(e.scratch[t]),
          rows(e.plan->rows), x_stride(rounded(e.model.hidden, GROUP)),
          mixed_stride(rounded(e.model.heads * e.model.head_dim, GROUP)), phase(e.phases) {}

    static bool is_marked(const Phase &of, int64_t piece) {
        return __atomic_load_n(of.marks + piece, __ATOMIC_ACQUIRE);
    }
    static bool is_whole(const Phase &of, int64_t pieces) {
        int64_t piece = 0;
        while (piece < pieces && is_marked(of, piece)) piece++;
        return piece == pieces;
    }
    template <class Compute> static void once(Phase &of, int64_t piece, Compute compute) {
        if (is_marked(of, piece)) return;
        compute(piece);
        __atomic_store_n(of.marks + piece, 1, __ATOMIC_RELEASE);
    }

    // Returns when the result of every piece stands.
    template <class Compute> void complete(Phase &of, int64_t pieces, Compute compute) {
        Share share;
        int64_t patience = PATIENCE_NS;
        while (claim(&of.taken, pieces, threads, pieces, &share)) {
            const int64_t began = pool_now();
            for (int64_t piece = share.begin; piece < share.end; piece++) once(of, piece, compute);
            patience = PATIENCE_NS + 2 * (pool_now() - began) / (share.end - share.begin);
        }
        const int64_t until = pool_now() + patience;
        for (int64_t piece = 0; piece < pieces; piece++)
            while (!is_marked(of, piece)) {
                if (pool_now() < until) {
                    pool_breathe();
                    continue;
                }
                // From the end: who has the core back goes on from the front.
                for (int64_t other = pieces - 1; other >= piece; other--) once(of, other, compute);
            }
    }

    // Rows as the input of a matrix, through a norm where there is one.  A few are prepared by every
    // thread for itself; `shared` is where many go, by threads in turn.
    Input prepared(const float *from, int64_t stride, const float *norm, const LlmMatrix &matrix, const Input &shared) {
        const bool alone = rows <= ALONE_ROWS;
        const Input &to = alone ? scratch.alone : shared;
        const auto prepare = [&](int64_t row) {
            prepare_row(from + row * stride, model, norm, matrix, scratch.rows, to, row);
        };
        if (alone)
            for (int64_t row = 0; row < rows; row++) prepare(row);
        else
            complete(phase[-2], rows, prepare);
        return to;
    }

    // Two phases.  `input` makes the input; it is not asked where nothing is left to compute.
    template <class Make> void product(const LlmMatrix &matrix, Product made, Make input) {
        phase += 2;
        const int64_t panels = matrix.columns / PANEL;
        if (is_whole(phase[-1], panels)) return;
        made.matrix = &matrix;
        made.rows = rows;
        made.input = input();
        complete(phase[-1], panels, [&](int64_t panel) { panel_any(made, panel, scratch.sums); });
    }
    static Product stored(float *to, int64_t stride, After after = AFTER_STORE) {
        Product made{};
        made.after = after;
        made.to = to;
        made.to_stride = stride;
        return made;
    }

    void begin() {
        const int64_t half = model.head_dim / 2;
        for (int64_t row = 0; row < rows; row++) {
            embed_row(model, plan.tokens[row], scratch.x + row * x_stride);
            turn_angles(model, engine.positions[row], scratch.cosines + row * half, scratch.sines + row * half);
        }
    }

    void add(const float *values, int64_t stride) {
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < x_stride; i += WIDTH) {
                float *const at = scratch.x + row * x_stride + i;
                store(at, load(at) + load(values + row * stride + i));
            }
    }

    // One row's queries of one key-value head: rotated, its key and value kept, all keys attended to.
    template <class Dot> void attend(const LlmLayer &layer, const LayerResults &results, int64_t piece) {
        const Paged<Dot> paged(engine, layer);
        const int64_t dims = model.head_dim, shared = model.heads / model.kv_heads, half = dims / 2;
        const int64_t row = piece / model.kv_heads, head = piece % model.kv_heads;
        const float *const qkv = results.qkv + row * layer.qkv.columns;
        const float *const keys = qkv + model.heads * dims, *const values = keys + model.kv_heads * dims;
        const float *const cosines = scratch.cosines + row * half, *const sines = scratch.sines + row * half;
        float *const key = scratch.turned + shared * dims;
        memcpy(scratch.turned, qkv + head * shared * dims, shared * dims * sizeof(float));
        memcpy(key, keys + head * dims, dims * sizeof(float));
        for (int64_t i = 0; i < shared; i++) turn_head(scratch.turned + i * dims, model, layer.q_norm, cosines, sines);
        turn_head(key, model, layer.k_norm, cosines, sines);
        const LlmSegment &segment = plan.segments[row];
        const int64_t position = engine.positions[row], tokens = model.block_tokens;
        const int32_t block = plan.blocks[segment.first_block + position / tokens];
        paged.write(key, values + head * dims, block, position % tokens, head);
        paged.attend(segment, 0, 1, head, scratch.turned, results.mixed + row * mixed_stride + head * shared * dims, scratch);
    }

    void layer_step(const LlmLayer &layer, const LayerResults &results) {
        product(layer.qkv, stored(results.qkv, layer.qkv.columns),
                [&] { return prepared(scratch.x, x_stride, layer.attention_norm, layer.qkv, results.qkv_input); });
        complete(*phase++, rows * model.kv_heads, [&](int64_t piece) {
            if (model.kind == LLM_BFLOAT16)
                attend<DotBfloat16>(layer, results, piece);
            else
                attend<DotFloat32>(layer, results, piece);
        });
        product(layer.out, stored(results.attended, layer.out.columns),
                [&] { return prepared(results.mixed, mixed_stride, nullptr, layer.out, results.out_input); });
        add(results.attended, layer.out.columns);
        const bool quantised = layer.down.kind == LLM_INT8 || layer.down.kind == LLM_INT4;
        float *const inner = (float *)results.inner.data;
        const int64_t inner_stride = results.inner.stride / (int64_t)sizeof(float);
        Product up = stored(inner, inner_stride, AFTER_SILU);
        if (!quantised) {
            up.next = &results.inner;
            up.consumer = &layer.down;
        }
        product(layer.up, up,
                [&] { return prepared(scratch.x, x_stride, layer.mlp_norm, layer.up, results.up_input); });
        product(layer.down, stored(results.added, layer.down.columns), [&] {
            return quantised ? prepared(inner, inner_stride, nullptr, layer.down, results.down_input) : results.inner;
        });
        add(results.added, layer.down.columns);
    }

    // The results of this layer take the place of those of an earlier one, which nobody may be at.
    void enter(int64_t layer) {
        __atomic_store_n(&scratch.layer, layer, __ATOMIC_RELEASE);
        for (int other = 0; other < threads; other++)
            while (__atomic_load_n(&engine.scratch[other].layer, __ATOMIC_ACQUIRE) <= layer - KEPT_LAYERS) pool_rest();
    }

    void all_layers() {
        begin();
        for (int64_t i = 0; i < model.layer_count; i++) {
            enter(i);
            layer_step(engine.layers[i], engine.results[i % KEPT_LAYERS]);
        }
        enter(model.layer_count);
        Product made = stored(plan.logits, model.head.columns, AFTER_LOGITS);
        made.vocab = model.vocab;
        made.best_value = scratch.best_value;
        made.best_token = scratch.best_token;
        product(model.head, made,
                [&] { return prepared(scratch.x, x_stride, model.final_norm, model.head, engine.head_input); });
    }
};

} // namespace
