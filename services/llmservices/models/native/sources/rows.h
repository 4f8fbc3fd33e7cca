// What happens to single rows: embedding, norms, rotation, and the formats that products want.
//
// Rows of floats are as long as the matrix that reads them is deep, a multiple of 32, with zeros
// behind their values, so that nothing here has a remainder to care for.
#pragma once
#include "engine.h"
#include "vectors.h"
#include "dots.h"

namespace {

// Float32 of half precision, subnormal numbers included: the exponent is moved by a product.
INLINE vf half_to_float(const char *from) {
    vh halves;
    memcpy(&halves, from, sizeof halves);
    const vu bits = __builtin_convertvector(halves, vu);
    const vu moved = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
    vf value;
    memcpy(&value, &moved, sizeof value);
    value *= 5.192296858534827628e33f; // 2^112
    vu out;
    memcpy(&out, &value, sizeof out);
    out |= sign;
    memcpy(&value, &out, sizeof value);
    return value;
}

// Symmetric, one scale for these numbers, which is none where one of them is none.  Gives minus 8
// times the sum of each GROUP (`sums`, where there is one) and the sum of all.
INLINE int32_t quantise_span(const float *from, int64_t depth, float *scale, int32_t *sums, char *to) {
    vu most = vu{}; // magnitudes are ordered as their bits are, with what is not a number above all
    for (int64_t i = 0; i < depth; i += WIDTH) {
        vu bits;
        memcpy(&bits, from + i, sizeof bits);
        bits &= 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    uint32_t widest = 0;
    for (int i = 0; i < WIDTH; i++) widest = most[i] > widest ? most[i] : widest;
    float largest;
    memcpy(&largest, &widest, sizeof largest);
    const float inverse = largest > 0 && largest < 3e38f ? 127.0f / largest : 0.0f;
    *scale = largest / 127.0f + largest * 0.0f;
    vi all_sum = vi{};
    for (int64_t group = 0; group < depth / GROUP; group++) {
        vi sum = vi{};
        int8_t quads[GROUP];
        for (int i = 0; i < GROUP; i += WIDTH) {
            const vf shifter = all(12582912.0f);
            const vf shifted = load(from + group * GROUP + i) * inverse + shifter;
            vi bits;
            memcpy(&bits, &shifted, sizeof bits);
            bits -= 0x4b400000;
            sum += bits;
            const vb bytes = __builtin_convertvector(bits, vb);
            memcpy(quads + i, &bytes, sizeof bytes);
        }
        char *const out = to + group * GROUP / 4 * QUAD_BYTES;
        if (QUAD_BYTES == 4) {
            memcpy(out, quads, GROUP);
        } else {
            int16_t wide[GROUP];
            for (int i = 0; i < GROUP; i += 4) {
                wide[i] = quads[i], wide[i + 1] = quads[i + 2];
                wide[i + 2] = quads[i + 1], wide[i + 3] = quads[i + 3];
            }
            memcpy(out, wide, GROUP * 2);
        }
        if (sums) sums[group] = -8 * total_int(sum);
        all_sum += sum;
    }
    return total_int(all_sum);
}

void quantise_row(const float *from, int64_t depth, const LlmMatrix &matrix, const Input &to, int64_t row) {
    const int64_t span = matrix.grouped ? ROW_GROUP : depth;
    float *const scales = to.scales + row * to.scales_stride;
    int32_t *const sums = to.sums + row * to.sums_stride;
    char *const out = to.data + row * to.stride;
    for (int64_t begin = 0; begin < depth; begin += span) {
        const int64_t count = depth - begin < span ? depth - begin : span, at = begin / span;
        const bool int4 = matrix.kind == LLM_INT4;
        const int32_t sum = quantise_span(from + begin, count, scales + at, int4 ? sums + begin / GROUP : nullptr,
                                          out + begin / 4 * QUAD_BYTES);
        if (!int4) sums[at] = -BYTE_OFFSET * sum;
    }
}

INLINE void narrow_row(const float *from, int64_t depth, char *to) {
    for (int64_t i = 0; i < depth; i += WIDTH) store_bf16((uint16_t *)to + i, load(from + i));
}

// A row of floats as input of the matrix.
INLINE void prepare_row(const float *from, const LlmMatrix &matrix, const Input &to, int64_t row) {
    const int64_t depth = matrix.depth;
    if (matrix.kind == LLM_INT8 || matrix.kind == LLM_INT4) {
        quantise_row(from, depth, matrix, to, row);
    } else if (matrix.kind == LLM_BFLOAT16 && BF16_INPUT) {
        narrow_row(from, depth, to.data + row * to.stride);
    } else {
        memcpy(to.data + row * to.stride, from, depth * sizeof(float));
    }
}

// RMS norm over `width` values of a row that is `depth` long.
INLINE void norm_row(const float *from, const float *weight, float eps, int64_t width, int64_t depth, float *to) {
    vf squares = vf{};
    for (int64_t i = 0; i < depth; i += WIDTH) {
        const vf value = load(from + i);
        squares += value * value;
    }
    const float inverse = 1.0f / __builtin_sqrtf(total(squares) / (float)width + eps);
    for (int64_t i = 0; i < depth; i += WIDTH) store(to + i, load(from + i) * inverse * load(weight + i));
}

// The same of the row through a norm, where there is one; `normed` has room for it.
INLINE void prepare_row(const float *from, const LlmModel &model, const float *norm, const LlmMatrix &matrix,
                        float *normed, const Input &to, int64_t row) {
    if (norm) norm_row(from, norm, model.norm_eps, model.hidden, matrix.depth, normed);
    prepare_row(norm ? normed : from, matrix, to, row);
}

// By how much the halves of a head are turned at a position.
INLINE void turn_angles(const LlmModel &model, int64_t position, float *cosines, float *sines) {
    for (int64_t i = 0; i < model.head_dim / 2; i++) {
        const float angle = (float)position * model.frequencies[i];
        cosines[i] = __builtin_cosf(angle) * model.rope_scale;
        sines[i] = __builtin_sinf(angle) * model.rope_scale;
    }
}

// A head in place: norm where the model has one, then rotation of its two halves against each other.
INLINE void turn_head(float *head, const LlmModel &model, const float *weight, const float *cosines,
                      const float *sines) {
    const int dims = model.head_dim, half = dims / 2;
    if (weight) {
        // One accumulator for every sixteenth value, whatever the width of the vectors.
        float squares[16] = {};
        for (int i = 0; i < dims; i++) squares[i % 16] += head[i] * head[i];
        float sum = 0;
        for (int i = 0; i < 16; i++) sum += squares[i];
        const float inverse = 1.0f / __builtin_sqrtf(sum / (float)dims + model.norm_eps);
        for (int i = 0; i < dims; i++) head[i] = head[i] * inverse * weight[i];
    }
    for (int i = 0; i < half; i++) {
        const float first = head[i], second = head[i + half];
        head[i] = first * cosines[i] - second * sines[i];
        head[i + half] = second * cosines[i] + first * sines[i];
    }
}

// Where value `depth` of column `column` stands in a packed matrix whose steps take `depths`.
INLINE int64_t packed_at(int64_t matrix_depth, int64_t column, int64_t depth, int depths) {
    const int64_t panel = column / PANEL, half = column % PANEL / HALF, lane = column % HALF;
    const int64_t step = panel * (matrix_depth / depths) + depth / depths;
    return (step * 2 + half) * HALF * depths + lane * depths + depth % depths;
}

// The embedding of a token; where head and embedding are one matrix, out of the packed head.
void embed_row(const LlmModel &model, int64_t token, float *to) {
    const int64_t width = model.hidden;
    if (model.embedding) {
        if (model.kind == LLM_BFLOAT16) {
            const uint16_t *from = (const uint16_t *)model.embedding + token * width;
            for (int64_t i = 0; i < width; i++) to[i] = from_bf16(from[i]);
        } else {
            memcpy(to, (const float *)model.embedding + token * width, width * sizeof(float));
        }
        return;
    }
    const LlmMatrix &head = model.head;
    for (int64_t i = 0; i < width; i++) {
        if (head.kind == LLM_BFLOAT16)
            to[i] = from_bf16(((const uint16_t *)head.data)[packed_at(head.depth, token, i, 2)]);
        else if (head.kind == LLM_FLOAT32)
            to[i] = ((const float *)head.data)[packed_at(head.depth, token, i, 1)];
        else
            to[i] = ((int)((const uint8_t *)head.data)[packed_at(head.depth, token, i, 4)] - 128) * head.scales[token];
    }
}

} // namespace
