// AVX2 with FMA: x86-64 processors since about 2013.
#define HAS_AVX2
#define WIDTH 8
#include "peaks.h"
#include "draw.h"
#include "step.h"

extern "C" const Kernels kernels_avx2 = {"avx2", DECODES, step_on_thread, read_on_thread, dots_on_thread, pack_avx2, draw_on_thread};
