// NEON, which every 64-bit ARM processor has.  The sets of ARM were run by an emulator: their results
// are compared with those of other sets, their tiles follow from the number of registers, untimed.
#define HAS_NEON
#define WIDTH 4
#include "peaks.h"
#include "draw.h"
#include "step.h"

extern "C" const Kernels kernels_neon = {"neon", DECODES, step_on_thread, read_on_thread, dots_on_thread, pack_baseline, draw_on_thread};
