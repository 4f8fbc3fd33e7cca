// NEON with dot products of integers and of bfloat16: ARM processors since about 2021.
#define HAS_NEON
#define HAS_NEON_DOT
#define HAS_NEON_BF16
#define WIDTH 4
#include "peaks.h"
#include "draw.h"
#include "step.h"

extern "C" const Kernels kernels_neon_bf16 = {"neon_bf16", DECODES, step_on_thread, read_on_thread, dots_on_thread, pack_baseline, draw_on_thread};
