// What a processor can do at most: reading memory, and dot products out of registers.  Included
// once for each instruction set: what a step reaches is measured against the same instructions.
#pragma once
#include "dots.h"
#include "engine.h"
#include "linear.h"

namespace {

constexpr int PEAK_SUMS = 12; // enough to hide what one product takes, few enough for the registers

template <class B> INLINE void hide(B &value) { HIDE(value); }
#if !defined(HAS_BF16_DOT) && !defined(HAS_NEON_BF16)
INLINE void hide(DotBfloat16::B &value) {
    HIDE(value.even);
    HIDE(value.odd);
}
#endif

template <class Dot> void dots_of(Dots &dots) {
    char row[64] = {}, column[64] = {};
    __asm__ volatile("" : : "r"(row), "r"(column) : "memory"); // they may hold anything
    typename Dot::Sum sums[PEAK_SUMS] = {};
    for (int i = 0; i < PEAK_SUMS; i++) hide(sums[i]); // no two are known to be equal
    const typename Dot::A a = Dot::broadcast(row);
    typename Dot::B b = Dot::fetch(column, 0);
    for (int64_t round = 0; round < dots.rounds; round++) {
        hide(b); // as if it had been fetched
#pragma GCC unroll 12
        for (int i = 0; i < PEAK_SUMS; i++) Dot::add(sums[i], a, b);
    }
    for (int i = 0; i < PEAK_SUMS; i++) hide(sums[i]);
    dots.operations = dots.rounds * PEAK_SUMS * WIDTH * Dot::DEPTHS * 2;
}

void dots_on_thread(void *argument, int thread) {
    Dots own = *(Dots *)argument;
    switch (own.kind) {
    case LLM_FLOAT32: dots_of<DotFloat32>(own); break;
    case LLM_BFLOAT16: dots_of<DotBfloat16>(own); break;
    default: dots_of<DotInt8>(own);
    }
    if (thread == 0) ((Dots *)argument)->operations = own.operations;
}

// In pieces that threads take as they take a product's panels.
void read_on_thread(void *argument, int) {
    Reading &reading = *(Reading *)argument;
    const int64_t pieces = reading.bytes / READING_PIECE;
    vi sums[4] = {};
    Share share;
    while (claim(&reading.taken, pieces, reading.threads, pieces, &share)) {
        const char *at = reading.start + share.begin * READING_PIECE, *const end = reading.start + share.end * READING_PIECE;
        for (; at < end; at += 256) {
#pragma GCC unroll 4
            for (int line = 0; line < 256; line += 64) {
                __builtin_prefetch(at + line + AHEAD, 0, 3);
#pragma GCC unroll 4
                for (int i = 0; i < VECTORS; i++) {
                    vi value;
                    memcpy(&value, at + line + i * WIDTH * 4, sizeof value);
                    sums[line / 64] ^= value;
                }
            }
        }
    }
    for (vi &sum : sums) hide(sum);
}

} // namespace
