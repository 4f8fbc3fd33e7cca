// Products of all rows of a step with one matrix, and what is done with the result while it is hot.
#pragma once
#include "engine.h"
#include "rows.h"

namespace {

// A number of pieces that threads take from until none is left, many at first, single ones in the
// end: whoever has lost its core for a moment holds nobody up.
struct Share {
    int64_t begin, end;
};
INLINE bool claim(int64_t *taken, int64_t pieces, int threads, int64_t most, Share *share) {
    int64_t begin = __atomic_load_n(taken, __ATOMIC_RELAXED);
    for (;;) {
        if (begin >= pieces) return false;
        int64_t count = (pieces - begin) / (2 * threads);
        if (count > most) count = most;
        if (count < 1) count = 1;
        if (__atomic_compare_exchange_n(taken, &begin, begin + count, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
            *share = {begin, begin + count};
            return true;
        }
    }
}

enum After { AFTER_STORE, AFTER_ADD, AFTER_SILU, AFTER_LOGITS };

struct Product {
    const LlmMatrix *matrix;
    Input input;
    int64_t rows;
    After after;
    float *to; // STORE, ADD, LOGITS, and SILU where the next product quantises
    int64_t to_stride;
    const Input *next;         // SILU: else here, as
    const LlmMatrix *consumer; // this matrix wants it
    int64_t vocab;
    float *best_value;
    int32_t *best_token;
};

constexpr int64_t AHEAD = 2048;       // bytes that are asked for before they are read
constexpr int FEW_TILES = 6;           // so many need a panel's data soon again; more, those of the rows
constexpr int DECODES = FEW_TILES * TILE_ROWS_INT4 < DECODE_ROWS ? FEW_TILES * TILE_ROWS_INT4 : DECODE_ROWS;
constexpr int64_t SHARED_DEPTH = 1024; // depths that many rows reduce at a time: what a core's caches hold

template <class Dot> struct Plain {
    static constexpr int TILE = TILE_ROWS;
    static constexpr int64_t UNIT = 32; // depths
    static constexpr int64_t TOGETHER = 1; // units that are not cut apart
    static constexpr int64_t UNIT_BYTES = UNIT / Dot::DEPTHS * Dot::B_BYTES * 2;

    template <int ROWS, int HALVES, bool ONCE>
    INLINE void run(const Input &input, int64_t row, const char *panel, int half, int64_t begin, int64_t end,
                    bool first, float *sums, Soon soon) {
        typename Dot::Sum sum[ROWS][HALVES * VECTORS];
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < HALVES * VECTORS; i++) {
                float *at = sums + r * PANEL + half * HALF + i * WIDTH;
                if (first)
                    sum[r][i] = start(input, row + r, typename Dot::Sum{});
                else
                    memcpy(&sum[r][i], at, sizeof sum[r][i]);
            }
        const int64_t steps = UNIT / Dot::DEPTHS;
        const char *from = panel + begin * UNIT_BYTES + half * Dot::B_BYTES;
        const char *const b[2] = {from, from + Dot::B_BYTES};
        dot_steps<Dot, ROWS, HALVES, ONCE>(sum, input.data + row * input.stride + begin * steps * Dot::A_BYTES, input.stride,
                                     b, 2 * Dot::B_BYTES, (end - begin) * steps, soon);
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < HALVES * VECTORS; i++)
                memcpy(sums + r * PANEL + half * HALF + i * WIDTH, &sum[r][i], sizeof sum[r][i]);
    }
    INLINE vf start(const Input &, int64_t, vf zero) { return zero; }
    INLINE vi start(const Input &input, int64_t row, vi) { return all_int(input.sums[row * input.sums_stride]); }
};

// Weights of 8 bits whose rows have a scale for each ROW_GROUP: what a few wide numbers of a row cost
// stays among their neighbours.
struct GroupedRows {
    static constexpr int TILE = TILE_ROWS;
    static constexpr int64_t UNIT = 32, TOGETHER = ROW_GROUP / UNIT;
    static constexpr int64_t STEPS = UNIT / DotInt8::DEPTHS, UNIT_BYTES = STEPS * DotInt8::B_BYTES * 2;

    template <int ROWS, int HALVES, bool ONCE>
    INLINE void run(const Input &input, int64_t row, const char *panel, int half, int64_t begin, int64_t end,
                    bool first, float *sums, Soon soon) {
        for (int64_t unit = begin; unit < end; unit += TOGETHER) {
            const int64_t group = unit / TOGETHER, stop = unit + TOGETHER < end ? unit + TOGETHER : end;
            vi dots[ROWS][HALVES * VECTORS];
            for (int r = 0; r < ROWS; r++)
                for (int i = 0; i < HALVES * VECTORS; i++)
                    dots[r][i] = all_int(input.sums[(row + r) * input.sums_stride + group]);
            const char *const from = panel + unit * UNIT_BYTES + half * DotInt8::B_BYTES;
            const char *const b[2] = {from, from + DotInt8::B_BYTES};
            const int64_t steps = (stop - unit) * STEPS;
            dot_steps<DotInt8, ROWS, HALVES, ONCE>(dots, input.data + row * input.stride + unit * STEPS * DotInt8::A_BYTES,
                                                   input.stride, b, 2 * DotInt8::B_BYTES, steps, soon);
            soon.at += soon.step * steps;
            const bool fresh = first && unit == begin;
            for (int r = 0; r < ROWS; r++) {
                const float scale = input.scales[(row + r) * input.scales_stride + group];
                for (int i = 0; i < HALVES * VECTORS; i++) {
                    float *const at = sums + r * PANEL + half * HALF + i * WIDTH;
                    store(at, (fresh ? vf{} : load(at)) + settled(to_float(dots[r][i]) * scale));
                }
            }
        }
    }
};

// Groups of 32 depths: 32 scales in half precision, then four times 32 columns of eight depths, the
// first four in the low halves of the bytes.
struct Grouped {
    static constexpr int TILE = TILE_ROWS_INT4;
    static constexpr int64_t UNIT = GROUP, TOGETHER = 1;
    static constexpr int64_t UNIT_BYTES = PANEL * 2 + 4 * 2 * 64;

    template <int ROWS, int HALVES, bool ONCE>
    INLINE void run(const Input &input, int64_t row, const char *panel, int half, int64_t begin, int64_t end,
                    bool first, float *sums, Soon soon) {
        vf sum[ROWS][HALVES * VECTORS];
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < HALVES * VECTORS; i++)
                sum[r][i] = first ? vf{} : load(sums + r * PANEL + half * HALF + i * WIDTH);
        const char *a = input.data + row * input.stride + begin * GROUP / 4 * QUAD_BYTES;
        for (int64_t group = begin; group < end; group++) {
            const char *from = panel + group * UNIT_BYTES;
            vi dots[ROWS][HALVES * VECTORS];
            for (int r = 0; r < ROWS; r++)
                for (int i = 0; i < HALVES * VECTORS; i++)
                    dots[r][i] = all_int(input.sums[(row + r) * input.sums_stride + group]);
            const int64_t asked = UNIT_BYTES * soon.step / 128;
            for (int64_t i = 0; i < asked; i += 64) ask<ONCE>(soon.at + i);
            soon.at += asked;
#pragma GCC unroll 4
            for (int pair = 0; pair < 4; pair++) {
                vi low[HALVES * VECTORS], high[HALVES * VECTORS];
                for (int i = 0; i < HALVES * VECTORS; i++) {
                    const char *at = from + PANEL * 2 + (pair * 2 + half) * 64 + i * WIDTH * 4;
                    vu bytes;
                    memcpy(&bytes, at, sizeof bytes);
                    low[i] = (vi)(bytes & 0x0f0f0f0fu);
                    high[i] = (vi)((bytes >> 4) & 0x0f0f0f0fu);
                }
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    const char *at = a + r * input.stride + pair * 2 * QUAD_BYTES;
                    const QuadA one = quad_broadcast(at), two = quad_broadcast(at + QUAD_BYTES);
#pragma GCC unroll 8
                    for (int i = 0; i < HALVES * VECTORS; i++) {
                        quad_add(dots[r][i], one, low[i]);
                        quad_add(dots[r][i], two, high[i]);
                    }
                }
            }
            for (int i = 0; i < HALVES * VECTORS; i++) {
                const vf scale = half_to_float(from + half * HALF * 2 + i * WIDTH * 2);
                for (int r = 0; r < ROWS; r++) sum[r][i] += to_float(dots[r][i]) * scale;
            }
            a += GROUP / 4 * QUAD_BYTES;
        }
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < HALVES * VECTORS; i++) store(sums + r * PANEL + half * HALF + i * WIDTH, sum[r][i]);
    }
};

template <class Kind, int ROWS, bool ONCE = false>
void tile(const Input &input, int64_t row, const char *panel, int64_t begin, int64_t end, bool first, float *sums,
          Soon soon) {
    for (int half = 0; half < 2; half += TILE_HALVES)
        Kind::template run<ROWS, TILE_HALVES, ONCE>(input, row, panel, half, begin, end, first, sums, soon);
}

template <class Kind, int ROWS>
INLINE void tile_of(int rows, const Input &input, int64_t row, const char *panel, int64_t begin, int64_t end,
                    bool first, float *sums, Soon soon) {
    if constexpr (ROWS == 1) {
        tile<Kind, 1>(input, row, panel, begin, end, first, sums, soon);
    } else {
        if (rows == ROWS)
            tile<Kind, ROWS>(input, row, panel, begin, end, first, sums, soon);
        else
            tile_of<Kind, ROWS - 1>(rows, input, row, panel, begin, end, first, sums, soon);
    }
}

INLINE vf finished(const Product &product, int64_t row, int64_t panel, const float *sums, int i) {
    const LlmMatrix &matrix = *product.matrix;
    vf value;
    const float *const scale = product.input.scales + row * product.input.scales_stride;
    if (matrix.kind == LLM_INT8 && !matrix.grouped) {
        vi exact;
        memcpy(&exact, sums + i, sizeof exact);
        value = to_float(exact) * *scale;
    } else {
        value = load(sums + i);
        if (matrix.kind == LLM_INT4) value *= *scale;
    }
    if (matrix.kind == LLM_INT8) value *= load(matrix.scales + panel * PANEL + i);
    if (matrix.bias) value += load(matrix.bias + panel * PANEL + i);
    return value;
}

INLINE void note_best(const Product &product, int64_t row, int64_t column, const float *logits) {
    const int64_t left = product.vocab - column;
    const int count = left < PANEL ? (int)left : PANEL;
    float most = product.best_value[row];
    if (count == PANEL) { // most panels hold nothing better
        vf top = load(logits);
        for (int i = WIDTH; i < PANEL; i += WIDTH) top = greater(load(logits + i), top);
        if (!(greatest(top) >= most)) return;
    }
    int32_t token = product.best_token[row]; // of equal ones the first, in whatever order panels come
    for (int i = 0; i < count; i++)
        if (logits[i] > most || (logits[i] == most && column + i < token)) {
            most = logits[i];
            token = (int32_t)(column + i);
        }
    product.best_token[row] = token;
    product.best_value[row] = most;
}

// What becomes of the sums of one panel of one row.
INLINE void finish(const Product &product, int64_t row, int64_t panel, const float *sums) {
    if (product.after == AFTER_SILU) {
        for (int i = 0; i < HALF; i += WIDTH) {
            const vf gate = finished(product, row, panel, sums, i);
            const vf value = silu(gate) * finished(product, row, panel, sums, i + HALF);
            const int64_t column = panel * HALF + i;
            if (!product.next)
                store(product.to + row * product.to_stride + column, value);
            else if (product.consumer->kind == LLM_BFLOAT16 && BF16_INPUT)
                store_bf16((uint16_t *)(product.next->data + row * product.next->stride) + column, value);
            else
                store((float *)(product.next->data + row * product.next->stride) + column, value);
        }
        return;
    }
    float *to = product.to + row * product.to_stride + panel * PANEL;
    for (int i = 0; i < PANEL; i += WIDTH) {
        const vf value = finished(product, row, panel, sums, i);
        store(to + i, product.after == AFTER_ADD ? load(to + i) + settled(value) : value);
    }
    if (product.after == AFTER_LOGITS) note_best(product, row, panel * PANEL, to);
}

// One panel of all rows; what is read only once leaves the caches to others.
template <class Kind> void panel_of(const Product &product, int64_t panel, float *sums) {
    const int64_t rows = product.rows, units = product.matrix->depth / Kind::UNIT;
    const int64_t bytes = units * Kind::UNIT_BYTES, tiles = (rows + Kind::TILE - 1) / Kind::TILE;
    const char *const at = (const char *)product.matrix->data + panel * bytes;
    if (rows == 1) {
        tile<Kind, 1, true>(product.input, 0, at, 0, units, true, sums, Soon{at + AHEAD, 128});
        return finish(product, 0, panel, sums);
    }
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t row = rows * t / tiles, count = rows * (t + 1) / tiles - row;
        // A single tile runs ahead of itself; several, each through its part of the next panel.
        const char *const next = at + (tiles == 1 ? AHEAD : bytes + bytes * t / tiles);
        tile_of<Kind, Kind::TILE>((int)count, product.input, row, at, 0, units, true, sums, Soon{next, 128 / tiles});
        for (int64_t r = 0; r < count; r++) finish(product, row + r, panel, sums + r * PANEL);
    }
}

// One thread's part of a product.
template <class Kind> void multiply(const Product &product, int64_t *taken, int threads, float *scratch) {
    const LlmMatrix &matrix = *product.matrix;
    const int64_t rows = product.rows, panels = matrix.columns / PANEL, units = matrix.depth / Kind::UNIT;
    const int64_t panel_bytes = units * Kind::UNIT_BYTES;
    const int64_t tiles = (rows + Kind::TILE - 1) / Kind::TILE;
    const int64_t at_once = SHARED_DEPTH / Kind::UNIT;
    const int64_t cuts = tiles > 1 ? (units + at_once - 1) / at_once : 1;
    Share share;
    while (claim(taken, panels, threads, tiles > FEW_TILES ? SHARE_PANELS : panels, &share)) {
        const char *first_panel = (const char *)matrix.data + share.begin * panel_bytes;
        if (tiles <= FEW_TILES) {
            for (int64_t panel = share.begin; panel < share.end; panel++) panel_of<Kind>(product, panel, scratch);
            continue;
        }
        for (int64_t cut = 0; cut < cuts; cut++) {
            const int64_t begin = units * cut / cuts / Kind::TOGETHER * Kind::TOGETHER;
            const int64_t next = units * (cut + 1) / cuts / Kind::TOGETHER * Kind::TOGETHER;
            const int64_t end = cut + 1 == cuts ? units : next;
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t row = rows * t / tiles, count = rows * (t + 1) / tiles - row;
                for (int64_t panel = share.begin; panel < share.end; panel++) {
                    const int64_t index = panel - share.begin;
                    float *sums = scratch + (index * rows + row) * PANEL;
                    tile_of<Kind, Kind::TILE>((int)count, product.input, row, first_panel + index * panel_bytes, begin,
                                              end, cut == 0, sums, Soon{first_panel + index * panel_bytes + begin * Kind::UNIT_BYTES + AHEAD, t ? 0 : 128});
                    if (cut == cuts - 1)
                        for (int64_t r = 0; r < count; r++) finish(product, row + r, panel, sums + r * PANEL);
                }
            }
        }
    }
}

// Calls run(kind) with the kind of products that a matrix wants.
template <class Run> INLINE void of_kind(const LlmMatrix &matrix, Run run) {
    switch (matrix.kind) {
    case LLM_FLOAT32: return run(Plain<DotFloat32>{});
    case LLM_BFLOAT16: return run(Plain<DotBfloat16>{});
    case LLM_INT8: return matrix.grouped ? run(GroupedRows{}) : run(Plain<DotInt8>{});
    default: return run(Grouped{});
    }
}

void panel_any(const Product &product, int64_t panel, float *sums) {
    of_kind(*product.matrix, [&](auto kind) { panel_of<decltype(kind)>(product, panel, sums); });
}

void multiply_any(const Product &product, int64_t *taken, int threads, float *scratch) {
    of_kind(*product.matrix, [&](auto kind) { multiply<decltype(kind)>(product, taken, threads, scratch); });
}

} // namespace
