// AVX-512 with integer dot products.
#define HAS_VNNI
#define WIDTH 16
#include "step.h"

extern "C" const Kernels kernels_avx512_vnni = {"avx512_vnni", step_on_thread};
