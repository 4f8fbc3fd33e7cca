// One step: every layer over the rows of a plan.  Included once for each instruction set.
//
// Threads go through the same phases; between two that depend on each other they meet.  Which
// thread computes what is left to chance, what is computed is not.
#pragma once
#include "attention.h"
#include "decode.h"
#include "engine.h"
#include "linear.h"
#include "rows.h"

namespace {

struct Step {
    LlmEngine &engine;
    const LlmModel &model;
    const LlmPlan &plan;
    const int thread, threads;
    Scratch &scratch;
    const int64_t x_stride, mixed_stride;
    int64_t rows;
    int64_t *counter;

    Step(LlmEngine &e, int t)
        : engine(e), model(e.model), plan(*e.plan), thread(t), threads(pool_threads(e.pool)), scratch(e.scratch[t]),
          x_stride(rounded(e.model.hidden, GROUP)), mixed_stride(rounded(e.model.heads * e.model.head_dim, GROUP)),
          rows(e.plan->rows), counter(e.counters) {}

    void meet() { pool_barrier(engine.pool); }
    int64_t mine(int64_t count, int side) const { return count * (thread + side) / threads; }

    void begin_rows() {
        const int64_t half = model.head_dim / 2;
        for (int64_t row = mine(rows, 0); row < mine(rows, 1); row++) {
            embed_row(model, plan.tokens[row], engine.x + row * x_stride);
            turn_angles(model, engine.positions[row], engine.cosines + row * half, engine.sines + row * half);
        }
    }

    // Rows as the input of a matrix, through a norm where there is one.  Few rows are prepared by
    // every thread for itself, which costs less than to meet.
    Input prepare(const float *from, int64_t stride, const float *norm, const LlmMatrix &matrix) {
        const bool alone = rows <= ALONE_ROWS;
        const Input &to = alone ? scratch.alone : engine.input;
        for (int64_t row = alone ? 0 : mine(rows, 0); row < (alone ? rows : mine(rows, 1)); row++)
            prepare_row(from + row * stride, model, norm, matrix, scratch.rows, to, row);
        if (!alone) meet();
        return to;
    }

    void product(const LlmMatrix &matrix, const Input &input, After after, float *to, int64_t to_stride) {
        Product made{};
        made.matrix = &matrix;
        made.input = input;
        made.rows = rows;
        made.after = after;
        made.to = to;
        made.to_stride = to_stride;
        run(made);
        meet();
    }
    void run(const Product &made) { multiply_any(made, counter++, threads, scratch.sums); }

    template <class Dot> void turn_rows(const LlmLayer &layer) {
        const Paged<Dot> paged(engine, layer);
        const int64_t dims = model.head_dim, stride = layer.qkv.columns, half = dims / 2, tokens = model.block_tokens;
        int64_t segment = 0, begin = 0; // of the segment's rows
        for (int64_t row = mine(rows, 0); row < mine(rows, 1); row++) {
            while (row >= begin + plan.segments[segment].rows) begin += plan.segments[segment++].rows;
            float *qkv = engine.qkv + row * stride;
            const float *cosines = engine.cosines + row * half, *sines = engine.sines + row * half;
            for (int64_t head = 0; head < model.heads; head++)
                turn_head(qkv + head * dims, model, layer.q_norm, cosines, sines);
            const int32_t position = engine.positions[row];
            const int32_t block = plan.blocks[plan.segments[segment].first_block + position / tokens];
            for (int64_t head = 0; head < model.kv_heads; head++) {
                float *key = qkv + (model.heads + head) * dims;
                turn_head(key, model, layer.k_norm, cosines, sines);
                paged.write(key, key + model.kv_heads * dims, block, position % tokens, head);
            }
        }
        meet();
    }

    template <class Dot> void attend(const LlmLayer &layer) {
        const Paged<Dot> paged(engine, layer);
        const int64_t shared = model.heads / model.kv_heads;
        const int64_t at_once = QUERY_ROWS / shared > 0 ? QUERY_ROWS / shared : 1;
        int64_t pieces = 0;
        for (int64_t i = 0; i < plan.segment_count; i++)
            pieces += (plan.segments[i].rows + at_once - 1) / at_once * model.kv_heads;
        int64_t segment = 0, segment_row = 0, before = 0; // pieces are claimed in ascending order
        int64_t *taken = counter++;
        Share share;
        while (claim(taken, pieces, threads, 1, &share)) {
            for (;;) {
                const LlmSegment &of = plan.segments[segment];
                const int64_t count = (of.rows + at_once - 1) / at_once * model.kv_heads;
                if (share.begin < before + count) break;
                before += count;
                segment_row += of.rows;
                segment++;
            }
            const LlmSegment &of = plan.segments[segment];
            const int64_t piece = share.begin - before, first = piece / model.kv_heads * at_once;
            const int64_t last = first + at_once < of.rows ? first + at_once : of.rows;
            const int64_t head = piece % model.kv_heads, row = segment_row + first;
            paged.attend(of, first, last, head, engine.qkv + row * layer.qkv.columns + head * shared * model.head_dim,
                         engine.mixed + row * mixed_stride + head * shared * model.head_dim, scratch);
        }
        meet();
    }

    // After the last layer's keys and values only rows matter whose logits are wanted.
    void keep_wanted() {
        if (thread == 0)
            for (int64_t i = 0; i < plan.wanted_count; i++) {
                const int64_t row = plan.wanted[i];
                if (row == i) continue;
                memcpy(engine.x + i * x_stride, engine.x + row * x_stride, x_stride * sizeof(float));
                memcpy(engine.mixed + i * mixed_stride, engine.mixed + row * mixed_stride, mixed_stride * sizeof(float));
            }
        rows = plan.wanted_count;
        meet();
    }

    void layer_step(const LlmLayer &layer, bool last) {
        Input input = prepare(engine.x, x_stride, layer.attention_norm, layer.qkv);
        product(layer.qkv, input, AFTER_STORE, engine.qkv, layer.qkv.columns);
        if (model.kind == LLM_BFLOAT16)
            turn_rows<DotBfloat16>(layer);
        else
            turn_rows<DotFloat32>(layer);
        if (last && plan.wanted_count == 0) return;
        if (model.kind == LLM_BFLOAT16)
            attend<DotBfloat16>(layer);
        else
            attend<DotFloat32>(layer);
        if (last) keep_wanted();
        input = prepare(engine.mixed, mixed_stride, nullptr, layer.out);
        product(layer.out, input, AFTER_ADD, engine.x, x_stride);
        input = prepare(engine.x, x_stride, layer.mlp_norm, layer.up);
        Product up{};
        up.matrix = &layer.up;
        up.input = input;
        up.rows = rows;
        up.after = AFTER_SILU;
        const bool quantised = layer.down.kind == LLM_INT8 || layer.down.kind == LLM_INT4;
        if (quantised) {
            up.to = engine.inner;
            up.to_stride = layer.down.depth;
        } else {
            up.next = &engine.inner_input;
            up.consumer = &layer.down;
        }
        run(up);
        meet();
        input = quantised ? prepare(engine.inner, layer.down.depth, nullptr, layer.down) : engine.inner_input;
        product(layer.down, input, AFTER_ADD, engine.x, x_stride);
    }

    void head_step() {
        const Input input = prepare(engine.x, x_stride, model.final_norm, model.head);
        Product made{};
        made.matrix = &model.head;
        made.input = input;
        made.rows = rows;
        made.after = AFTER_LOGITS;
        made.to = plan.logits;
        made.to_stride = model.head.columns;
        made.vocab = model.vocab;
        made.best_value = scratch.best_value;
        made.best_token = scratch.best_token;
        run(made);
    }

    void all_layers() {
        begin_rows();
        meet();
        for (int64_t i = 0; i < model.layer_count; i++) layer_step(engine.layers[i], i == model.layer_count - 1);
        if (plan.wanted_count) head_step();
    }
};

void step_on_thread(void *argument, int thread) {
    LlmEngine &engine = *(LlmEngine *)argument;
    for (int64_t row = 0; row < engine.plan->wanted_count; row++) {
        engine.scratch[thread].best_value[row] = -__builtin_inff();
        engine.scratch[thread].best_token[row] = 0;
    }
    if (engine.decodes)
        DecodeStep(engine, thread).all_layers();
    else
        Step(engine, thread).all_layers();
}

} // namespace
