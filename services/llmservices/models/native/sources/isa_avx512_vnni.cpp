// AVX-512 with integer dot products.
#define HAS_VNNI
#define WIDTH 16
#include "peaks.h"
#include "draw.h"
#include "step.h"

extern "C" const Kernels kernels_avx512_vnni = {"avx512_vnni", DECODES, step_on_thread, read_on_thread, dots_on_thread, pack_avx512, draw_on_thread};
