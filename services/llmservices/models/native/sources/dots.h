// How one step of a product is computed for each kind of matrix: some depths of a row, broadcast,
// against the same depths of 16 columns.
//
// Each column of each row has one accumulator that takes the depths in ascending order: its bits
// depend on that row and that column alone, whatever is computed beside them.
#pragma once
#include "vectors.h"

namespace {

constexpr int VECTORS = 16 / WIDTH; // that 16 columns take

// Tiles of rows times half panels that fit the registers.
#if WIDTH == 16
constexpr int TILE_HALVES = 2, TILE_ROWS = 12, TILE_ROWS_INT4 = 6;
#elif WIDTH == 8
constexpr int TILE_HALVES = 1, TILE_ROWS = 4, TILE_ROWS_INT4 = 2;
#elif defined(HAS_NEON) // 32 registers
constexpr int TILE_HALVES = 1, TILE_ROWS = 5, TILE_ROWS_INT4 = 2;
#else
constexpr int TILE_HALVES = 1, TILE_ROWS = 2, TILE_ROWS_INT4 = 1;
#endif

struct DotFloat32 {
    static constexpr int DEPTHS = 1, A_BYTES = 4, B_BYTES = 64;
    typedef vf Sum;
    typedef float A;
    typedef vf B;
    INLINE A broadcast(const char *from) {
        float value;
        memcpy(&value, from, 4);
        return value;
    }
    INLINE B fetch(const char *from, int vector) { return load((const float *)from + vector * WIDTH); }
    INLINE void add(Sum &sum, A a, B b) { sum += a * b; }
};

#if defined(HAS_BF16_DOT)
constexpr bool BF16_INPUT = true;
struct DotBfloat16 {
    static constexpr int DEPTHS = 2, A_BYTES = 4, B_BYTES = 64;
    typedef vf Sum;
    typedef __m512i A;
    typedef __m512i B;
    INLINE A broadcast(const char *from) {
        int32_t value;
        memcpy(&value, from, 4);
        return _mm512_set1_epi32(value);
    }
    INLINE B fetch(const char *from, int) { return _mm512_loadu_si512(from); }
    INLINE void add(Sum &sum, A a, B b) {
        sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
};
#elif defined(HAS_NEON_BF16)
constexpr bool BF16_INPUT = true;
struct DotBfloat16 {
    static constexpr int DEPTHS = 2, A_BYTES = 4, B_BYTES = 64;
    typedef vf Sum;
    typedef vi A;
    typedef vi B;
    INLINE A broadcast(const char *from) {
        int32_t value;
        memcpy(&value, from, 4);
        return all_int(value);
    }
    INLINE B fetch(const char *from, int vector) {
        vi value;
        memcpy(&value, from + vector * WIDTH * 4, sizeof value);
        return value;
    }
    INLINE void add(Sum &sum, A a, B b) {
        sum = (vf)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)b, (bfloat16x8_t)a);
    }
};
#else
constexpr bool BF16_INPUT = false; // rows stay float32, which loses less
struct DotBfloat16 {
    static constexpr int DEPTHS = 2, A_BYTES = 8, B_BYTES = 64;
    typedef vf Sum;
    struct A {
        float even, odd;
    };
    struct B {
        vf even, odd;
    };
    INLINE A broadcast(const char *from) {
        A a;
        memcpy(&a, from, sizeof a);
        return a;
    }
    INLINE B fetch(const char *from, int vector) {
        vu pairs;
        memcpy(&pairs, from + vector * WIDTH * 4, sizeof pairs);
        const vu even = pairs << 16, odd = pairs & 0xffff0000u;
        B b;
        memcpy(&b.even, &even, sizeof even);
        memcpy(&b.odd, &odd, sizeof odd);
        return b;
    }
    INLINE void add(Sum &sum, A a, B b) {
        sum += a.even * b.even;
        sum += a.odd * b.odd;
    }
};
#endif

// Weights against signed rows, four depths a lane; sums are exact, so that every instruction set
// gives the same.  Weights of 8 bits are stored with 128 added.  Where the processor multiplies
// unsigned by signed, the sums begin with what that adds; where signed by signed, it is taken off
// as they are loaded, by turning the highest bit.  Weights of 4 bits are 0 to 15 for both.
#if defined(HAS_NEON)
constexpr int BYTE_OFFSET = 0;
#else
constexpr int BYTE_OFFSET = 128;
#endif
#if defined(HAS_NEON)
constexpr int QUAD_BYTES = 4;
typedef vi QuadA;
typedef vi QuadB;
INLINE QuadA quad_broadcast(const char *from) {
    int32_t value;
    memcpy(&value, from, 4);
    return all_int(value);
}
INLINE void quad_add(vi &sum, QuadA a, QuadB b) {
    const int8x16_t row = (int8x16_t)a, weights = (int8x16_t)b;
#if defined(HAS_NEON_DOT)
    sum = (vi)vdotq_s32((int32x4_t)sum, weights, row);
#else
    // Products of 8 bits have 16; two of them together may have more.
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(weights), vget_low_s8(row)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(weights, row));
    sum += (vi)vpaddq_s32(low, high);
#endif
}
#elif defined(HAS_VNNI)
constexpr int QUAD_BYTES = 4; // of a row's four depths
typedef __m512i QuadA;
typedef vi QuadB;
INLINE QuadA quad_broadcast(const char *from) {
    int32_t value;
    memcpy(&value, from, 4);
    return _mm512_set1_epi32(value);
}
INLINE void quad_add(vi &sum, QuadA a, QuadB b) {
    sum = (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, a);
}
#elif defined(HAS_AVX2)
constexpr int QUAD_BYTES = 8; // as int16 in the order 0, 2, 1, 3
struct QuadA {
    __m256i even, odd;
};
typedef vi QuadB;
INLINE QuadA quad_broadcast(const char *from) {
    int32_t halves[2];
    memcpy(halves, from, 8);
    return {_mm256_set1_epi32(halves[0]), _mm256_set1_epi32(halves[1])};
}
INLINE void quad_add(vi &sum, QuadA a, QuadB b) {
    const __m256i low = _mm256_set1_epi16(0xff);
    const __m256i even = _mm256_and_si256((__m256i)b, low);
    const __m256i odd = _mm256_srli_epi16((__m256i)b, 8);
    const __m256i pairs = _mm256_add_epi32(_mm256_madd_epi16(even, a.even), _mm256_madd_epi16(odd, a.odd));
    sum += (vi)pairs;
}
#else
constexpr int QUAD_BYTES = 8;
struct QuadA {
    int32_t depth[4];
};
typedef vi QuadB;
INLINE QuadA quad_broadcast(const char *from) {
    int16_t values[4];
    memcpy(values, from, 8);
    return {{values[0], values[2], values[1], values[3]}};
}
INLINE void quad_add(vi &sum, QuadA a, QuadB b) {
    vu bytes;
    memcpy(&bytes, &b, sizeof bytes);
    for (int i = 0; i < 4; i++) sum += (vi)((bytes >> (8 * i)) & 0xff) * a.depth[i];
}
#endif

struct DotInt8 {
    static constexpr int DEPTHS = 4, A_BYTES = QUAD_BYTES, B_BYTES = 64;
    typedef vi Sum;
    typedef QuadA A;
    typedef QuadB B;
    INLINE A broadcast(const char *from) { return quad_broadcast(from); }
    INLINE B fetch(const char *from, int vector) {
        vi value;
        memcpy(&value, from + vector * WIDTH * 4, sizeof value);
        return BYTE_OFFSET ? value : (vi)((vu)value ^ 0x80808080u);
    }
    INLINE void add(Sum &sum, A a, B b) { quad_add(sum, a, b); }
};

// What will be read soon, asked for a little at every step.
struct Soon {
    const char *at;
    int64_t step; // bytes a step: 0, or up to 128
};

// Asks for a line: to stay, or (ONCE) to be read a single time, past the outer caches where the
// processor can.
template <bool ONCE> INLINE void ask(const char *line) {
    __builtin_prefetch(line, 0, ONCE ? 0 : 3);
}

// ROWS rows against HALVES times 16 columns over `steps` steps; b[h] is the first step of half h.
template <class Dot, int ROWS, int HALVES, bool ONCE = false>
INLINE void dot_steps(typename Dot::Sum (&sums)[ROWS][HALVES * VECTORS], const char *a, int64_t a_stride,
                      const char *const *b, int64_t b_step, int64_t steps, Soon soon) {
    const char *at[HALVES];
    for (int half = 0; half < HALVES; half++) at[half] = b[half];
    for (int64_t step = 0; step < steps; step++) {
        typename Dot::B columns[HALVES * VECTORS];
        if (soon.step) {
            ask<ONCE>(soon.at);
            ask<ONCE>(soon.at + 64);
            soon.at += soon.step;
        }
#pragma GCC unroll 4
        for (int half = 0; half < HALVES; half++) {
#pragma GCC unroll 4
            for (int vector = 0; vector < VECTORS; vector++)
                columns[half * VECTORS + vector] = Dot::fetch(at[half], vector);
            at[half] += b_step;
        }
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++) {
            const typename Dot::A value = Dot::broadcast(a + row * a_stride);
#pragma GCC unroll 8
            for (int column = 0; column < HALVES * VECTORS; column++)
                Dot::add(sums[row][column], value, columns[column]);
        }
        a += Dot::A_BYTES;
    }
}

} // namespace
