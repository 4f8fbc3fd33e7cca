// AVX-512 with dot products of integers and of bfloat16.
#define HAS_VNNI
#define HAS_BF16_DOT
#define WIDTH 16
#include "peaks.h"
#include "draw.h"
#include "step.h"

extern "C" const Kernels kernels_avx512_bf16 = {"avx512_bf16", DECODES, step_on_thread, read_on_thread, dots_on_thread, pack_avx512, draw_on_thread};
