// What every processor of the architecture has: SSE2, or NEON.
#define WIDTH 4
#include "step.h"

extern "C" const Kernels kernels_baseline = {"baseline", step_on_thread};
