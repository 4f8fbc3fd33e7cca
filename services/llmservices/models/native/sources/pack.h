// Matrices from rows as a checkpoint has them into the panels that `linear.h` reads.
//
// A panel's unit is 32 bits of one column: a float32, two bfloat16 or four bytes, neighbours along
// the depth.  Units of 16 columns are transposed in tiles of 16, and what is computed of them is
// computed for columns side by side, along the depth: with no product and sum made one operation
// (`build.py` forbids it here) every instruction set gives the same bytes.
#pragma once
#include "engine.h"
#include "vectors.h"

namespace {

constexpr int TILE_UNITS = 16;
constexpr float ROUNDER = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer, ties to even
constexpr int64_t SCALES_BYTES = PANEL * 2;
constexpr int64_t GROUP_BYTES = SCALES_BYTES + PANEL * GROUP / 2;

// 16 columns: where their values begin (null: zeros).
struct Columns {
    const char *from[HALF];
    int64_t bytes; // that each has
};

// Units first .. first + 15 of each column, zeros behind its end; the columns side by side.
INLINE void transposed(const Columns &columns, int64_t first, uint32_t (&to)[TILE_UNITS][HALF]) {
    constexpr int64_t whole = TILE_UNITS * 4;
    uint32_t rows[HALF][TILE_UNITS];
    const int64_t offset = first * 4, left = columns.bytes - offset;
    for (int column = 0; column < HALF; column++) {
        const char *from = columns.from[column];
        if (from && left >= whole) {
            memcpy(rows[column], from + offset, whole);
            continue;
        }
        memset(rows[column], 0, whole);
        if (from && left > 0) memcpy(rows[column], from + offset, left);
    }
    for (int unit = 0; unit < TILE_UNITS; unit++)
        for (int column = 0; column < HALF; column++) to[unit][column] = rows[column][unit];
}

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Depths first .. first + 31 of 16 columns as numbers.
INLINE void widened(const Columns &columns, int kind, int64_t first, float (&to)[GROUP][HALF]) {
    uint32_t units[TILE_UNITS][HALF];
    if (kind == LLM_BFLOAT16) {
        transposed(columns, first / 2, units);
        for (int unit = 0; unit < TILE_UNITS; unit++)
            for (int column = 0; column < HALF; column++) {
                to[2 * unit][column] = as_float(units[unit][column] << 16);
                to[2 * unit + 1][column] = as_float(units[unit][column] & 0xffff0000u);
            }
        return;
    }
    for (int64_t part = 0; part < GROUP; part += TILE_UNITS) {
        transposed(columns, first + part, units);
        memcpy(to[part], units, sizeof units);
    }
}

INLINE void magnitudes(const float (&values)[GROUP][HALF], float (&most)[HALF]) {
    for (int depth = 0; depth < GROUP; depth++)
        for (int column = 0; column < HALF; column++) {
            const float size = __builtin_fabsf(values[depth][column]);
            most[column] = size > most[column] ? size : most[column];
        }
}

// float32 or bfloat16: the source's own bits.
void pack_plain(const Columns (&halves)[2], int64_t units, char *to) {
    for (int64_t unit = 0; unit < units; unit += TILE_UNITS)
        for (int half = 0; half < 2; half++) {
            uint32_t tile[TILE_UNITS][HALF];
            transposed(halves[half], unit, tile);
            for (int i = 0; i < TILE_UNITS; i++) memcpy(to + ((unit + i) * 2 + half) * 64, tile[i], 64);
        }
}

// Symmetric, one scale a column; stored with 128 added, since the processor multiplies unsigned by
// signed.
void pack_int8(const Columns &columns, int kind, int64_t depth, char *to, float *scales) {
    float values[GROUP][HALF], most[HALF] = {}, divisors[HALF];
    for (int64_t first = 0; first < depth; first += GROUP) {
        widened(columns, kind, first, values);
        magnitudes(values, most);
    }
    for (int column = 0; column < HALF; column++) {
        scales[column] = most[column] / 127;
        divisors[column] = scales[column] > 0 ? scales[column] : 1.0f;
    }
    for (int64_t first = 0; first < depth; first += GROUP) {
        widened(columns, kind, first, values);
        for (int quad = 0; quad < GROUP / 4; quad++) {
            uint32_t units[HALF] = {};
            for (int i = 0; i < 4; i++)
                for (int column = 0; column < HALF; column++) {
                    const float number = values[quad * 4 + i][column] / divisors[column];
                    units[column] |= ((as_bits(number + ROUNDER) + 128) & 0xff) << (8 * i);
                }
            memcpy(to + (first / 4 + quad) * 128, units, sizeof units);
        }
    }
}

INLINE vu bits_of(vf value) {
    vu bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE vf with_bits(vu bits) {
    vf value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE vf size_of(vf value) { return with_bits(bits_of(value) & 0x7fffffffu); }

// To the nearest number of half precision, ties to even; one beyond it becomes infinite.
INLINE vf to_half_grid(vf value) {
    const vu least = vu{} + (113u << 23); // below 2^-14 the steps no longer shrink
    vu exponent = bits_of(value) & 0x7f800000u;
    exponent = exponent > least ? exponent : least;
    const vf coarse = with_bits((exponent + (13u << 23)) | 0x400000u); // its last bit is half's
    const vf rounded = (value + coarse) - coarse;
    const vf bounded = size_of(rounded) < all(65520.0f) ? size_of(rounded) : all(__builtin_inff());
    return with_bits(bits_of(bounded) | (bits_of(value) & 0x80000000u));
}

// Of a number that half precision has.
INLINE uint16_t half_bits(float value) {
    const uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
    const uint32_t small = as_bits(__builtin_fabsf(value) * 16777216.0f + 8388608.0f) & 0x7fffffu;
    const uint32_t large = size < 0x7f800000u ? (size - (112u << 23)) >> 13 : 0x7c00u;
    return (uint16_t)(sign | (size < (113u << 23) ? small : large));
}

INLINE vf inverse_of(vf scale) { return scale != vf{} ? 1.0f / scale : vf{}; }

INLINE vf number_of(vf value, vf inverse) {
    const vf wide = value * inverse;
    const vf low = wide > all(-8.0f) ? wide : all(-8.0f);
    return ((low < all(7.0f) ? low : all(7.0f)) + ROUNDER) - ROUNDER;
}

// What the widest number of a group is divided by for the scales that are tried.  The first is the
// rule of q4_0 of llama.cpp, so that the squared error is never above that rule's; the others are
// refined by least squares.
constexpr float DIVISORS[] = {-8.0f, -9.0f, -8.5f, -7.5f, 7.5f};

// Of the groups of WIDTH columns.
INLINE vf best_scale(const float *values) {
    vf widest = load(values), most = size_of(widest), best{}, least = all(__builtin_inff());
    for (int depth = 1; depth < GROUP; depth++) {
        const vf value = load(values + depth * HALF), size = size_of(value);
        widest = size > most ? value : widest;
        most = greater(size, most);
    }
    for (const float divisor : DIVISORS) {
        vf scale = to_half_grid(widest / divisor), inverse = inverse_of(scale), error{};
        if (divisor != DIVISORS[0]) {
            vf product{}, power{};
            for (int depth = 0; depth < GROUP; depth++) {
                const vf value = load(values + depth * HALF), number = number_of(value, inverse);
                product += value * number;
                power += number * number;
            }
            scale = to_half_grid(product / (power > vf{} ? power : all(1.0f)));
            inverse = inverse_of(scale);
        }
        for (int depth = 0; depth < GROUP; depth++) {
            const vf value = load(values + depth * HALF), rest = value - number_of(value, inverse) * scale;
            error += rest * rest;
        }
        best = error < least ? scale : best;
        least = error < least ? error : least;
    }
    return best;
}

// WIDTH columns of one group: where their scales go, and the first of their 32-bit units.
INLINE void pack_group(const float *values, char *scales, char *to) {
    const vf scale = best_scale(values), inverse = inverse_of(scale);
    for (int i = 0; i < WIDTH; i++) {
        const uint16_t half = half_bits(scale[i]);
        memcpy(scales + 2 * i, &half, sizeof half);
    }
    for (int pair = 0; pair < 4; pair++) {
        vu units{};
        for (int i = 0; i < 8; i++) {
            const vf number = number_of(load(values + (pair * 8 + i) * HALF), inverse);
            units |= ((bits_of(number + ROUNDER) + 8) & 15) << (i % 4 * 8 + i / 4 * 4);
        }
        memcpy(to + pair * 128, &units, sizeof units);
    }
}

// Groups of 32 depths: scales in half precision, then four pairs of quads, the first of a pair in
// the low halves of the bytes.
void pack_int4(const Columns &columns, int kind, int64_t depth, int half, char *to) {
    for (int64_t first = 0; first < depth; first += GROUP, to += GROUP_BYTES) {
        float values[GROUP][HALF];
        widened(columns, kind, first, values);
        for (int i = 0; i < HALF; i += WIDTH) {
            char *units = to + SCALES_BYTES + half * 64 + i * 4;
            pack_group(values[0] + i, to + (half * HALF + i) * 2, units);
        }
    }
}

// Where a column's values are.
const char *row_of(const LlmSource &source, int64_t column) {
    const int64_t bytes = (int64_t)source.depth * (source.kind == LLM_BFLOAT16 ? 2 : 4);
    if (source.in_turns) {
        const LlmPart &part = source.parts[column / HALF % 2];
        const int64_t row = column / PANEL * HALF + column % HALF;
        return row < part.rows ? (const char *)part.data + row * bytes : nullptr;
    }
    for (int i = 0; i < source.part_count; i++) {
        if (column < source.parts[i].rows) return (const char *)source.parts[i].data + column * bytes;
        column -= source.parts[i].rows;
    }
    return nullptr;
}

void pack_panel(const LlmSource &source, const LlmMatrix &to, int64_t panel) {
    const int64_t value_bytes = source.kind == LLM_BFLOAT16 ? 2 : 4;
    Columns halves[2];
    for (int64_t i = 0; i < PANEL; i++) halves[i / HALF].from[i % HALF] = row_of(source, panel * PANEL + i);
    for (Columns &half : halves) half.bytes = source.depth * value_bytes;
    char *data = (char *)to.data;
    if (to.kind == LLM_INT8) {
        data += panel * PANEL * to.depth;
        float *scales = (float *)to.scales + panel * PANEL;
        for (int half = 0; half < 2; half++)
            pack_int8(halves[half], source.kind, to.depth, data + half * 64, scales + half * HALF);
    } else if (to.kind == LLM_INT4) {
        data += panel * (to.depth / GROUP) * GROUP_BYTES;
        for (int half = 0; half < 2; half++) pack_int4(halves[half], source.kind, to.depth, half, data);
    } else {
        pack_plain(halves, to.depth * value_bytes / 4, data + panel * PANEL * to.depth * value_bytes);
    }
}

void pack_on_thread(void *argument, int) {
    Packing &packing = *(Packing *)argument;
    const int64_t panels = packing.to->columns / PANEL;
    for (;;) {
        const int64_t panel = __atomic_fetch_add(&packing.taken, 1, __ATOMIC_RELAXED);
        if (panel >= panels) return;
        pack_panel(*packing.source, *packing.to, panel);
    }
}

} // namespace
