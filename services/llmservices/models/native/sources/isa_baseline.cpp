// What every processor of the architecture has, as the compiler finds it.
#define WIDTH 4
#include "peaks.h"
#include "draw.h"
#include "step.h"

extern "C" const Kernels kernels_baseline = {"baseline", DECODES, step_on_thread, read_on_thread, dots_on_thread, pack_baseline, draw_on_thread};
