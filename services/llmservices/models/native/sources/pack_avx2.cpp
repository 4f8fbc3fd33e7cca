// Packing for AVX2.
#define WIDTH 8
#include "pack.h"

extern "C" void pack_avx2(void *packing, int thread) { pack_on_thread(packing, thread); }
