// NEON with integer dot products: ARM processors since about 2018.
#define HAS_NEON
#define HAS_NEON_DOT
#define WIDTH 4
#include "peaks.h"
#include "draw.h"
#include "step.h"

extern "C" const Kernels kernels_neon_dot = {"neon_dot", DECODES, step_on_thread, read_on_thread, dots_on_thread, pack_baseline, draw_on_thread};
