// Vectors of WIDTH floats by the compiler's own extension, so that one source serves every
// instruction set; WIDTH and what the processor has beyond it come from the file that includes this.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(HAS_BF16_DOT) || defined(HAS_VNNI) || defined(HAS_AVX2)
#include <immintrin.h>
#elif defined(HAS_NEON)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define MEMBER inline __attribute__((always_inline))

// The compiler must not know the value, nor keep a second copy.
#if defined(__AVX512F__)
#define HIDE(value) __asm__ volatile("" : "+v"(value))
#elif defined(__x86_64__)
#define HIDE(value) __asm__ volatile("" : "+x"(value))
#elif defined(__aarch64__)
#define HIDE(value) __asm__ volatile("" : "+w"(value))
#else
#define HIDE(value) __asm__ volatile("" : "+m"(value))
#endif

namespace {

typedef float vf __attribute__((vector_size(WIDTH * 4)));
typedef int32_t vi __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t vu __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t vh __attribute__((vector_size(WIDTH * 2)));
typedef int8_t vb __attribute__((vector_size(WIDTH)));

INLINE vf load(const float *from) {
    vf value;
    memcpy(&value, from, sizeof value);
    return value;
}
INLINE void store(float *to, vf value) { memcpy(to, &value, sizeof value); }
INLINE vf all(float value) { return value - vf{}; }
INLINE vi all_int(int32_t value) { return value - vi{}; }
// A value that is rounded as it stands: no product in it becomes one operation with a sum behind it.
INLINE vf settled(vf value) {
    HIDE(value);
    return value;
}
INLINE vf greater(vf a, vf b) { return a > b ? a : b; }
INLINE vf to_float(vi value) { return __builtin_convertvector(value, vf); }

// Halves are added until one is left: an order that depends on WIDTH alone.
INLINE float total(vf value) {
#if WIDTH == 16 && defined(HAS_VNNI)
    return _mm512_reduce_add_ps((__m512)value);
#else
    float parts[WIDTH];
    memcpy(parts, &value, sizeof value);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
#endif
}
INLINE int32_t total_int(vi value) {
    int32_t sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += value[i];
    return sum;
}
INLINE float greatest(vf value) {
#if WIDTH == 16 && defined(HAS_VNNI)
    return _mm512_reduce_max_ps((__m512)value);
#else
    float parts[WIDTH];
    memcpy(parts, &value, sizeof value);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) parts[i] = parts[i] > parts[i + half] ? parts[i] : parts[i + half];
    return parts[0];
#endif
}

// e^x to the last bit or two; zero below e^-87, and of what is not a number.
// e^x = 2^n e^r with |r| <= log(2) / 2, and the Taylor series of e^r to the seventh power.
INLINE vf exponential(vf given) {
    vf x = given > all(-87.0f) ? given : all(-87.0f);
    x = x < all(88.0f) ? x : all(88.0f);
    const vf scaled = x * 1.44269504088896341f;
    const vf shifter = all(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
    const vf shifted = scaled + shifter;
    const vf whole = shifted - shifter;
    // The rest in two steps, so that x near an integer keeps its low bits.
    vf rest = x - whole * 0.693359375f;
    rest = rest - whole * -2.12194440e-4f;
    vf power = all(1.0f / 5040);
    power = power * rest + all(1.0f / 720);
    power = power * rest + all(1.0f / 120);
    power = power * rest + all(1.0f / 24);
    power = power * rest + all(1.0f / 6);
    power = power * rest + all(0.5f);
    power = power * rest + all(1.0f);
    power = power * rest + all(1.0f);
    vu bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23; // the integer stands in the low bits of `shifted`
    vf scale;
    memcpy(&scale, &bits, sizeof scale);
    return given >= all(-87.0f) ? power * scale : vf{};
}

// 2^x for x <= 0, with a relative error of 3e-6 (DEGREE 5) or 2e-7 (6); what is not a number stays so.
// The Taylor series of 2^r with |r| <= 1/2, multiplied by a power of two.
template <int DEGREE> INLINE vf power_of_two(vf given) {
    constexpr float LOG_2 = 0.693147180559945309f;
    const vf x = given < all(-126.0f) ? all(-126.0f) : given;
    const vf shifter = all(12582912.0f);
    const vf shifted = x + shifter;
    const vf rest = x - (shifted - shifter);
    vf power = all(DEGREE == 6 ? 1.54035303933816e-4f : 0.0f);
    power = power * rest + all(1.33335581464284e-3f);
    power = power * rest + all(9.61812910762848e-3f);
    power = power * rest + all(5.55041086648216e-2f);
    power = power * rest + all(LOG_2 * LOG_2 / 2);
    power = power * rest + all(LOG_2);
    power = power * rest + all(1.0f);
    vu bits, whole;
    memcpy(&whole, &shifted, sizeof whole);
    memcpy(&bits, &power, sizeof bits);
    bits += whole << 23; // the integer stands in the low bits of `shifted`
    memcpy(&power, &bits, sizeof power);
    return given < all(-126.0f) ? vf{} : power;
}

INLINE vf silu(vf x) { return x / (all(1.0f) + exponential(-x)); }

INLINE float from_bf16(uint16_t value) {
    const uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

// To nearest, ties to even; not-a-number stays one.
INLINE uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE void store_bf16(uint16_t *to, vf value) {
#if defined(HAS_BF16_DOT)
    const __m256i packed = (__m256i)_mm512_cvtneps_pbh((__m512)value);
    memcpy(to, &packed, sizeof packed);
#else
    vu bits;
    memcpy(&bits, &value, sizeof bits);
    const vu nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vu chosen = (value == value) ? nearest : (vu{} + 0x7fc0u);
    const vh packed = __builtin_convertvector(chosen, vh);
    memcpy(to, &packed, sizeof packed);
#endif
}

} // namespace
