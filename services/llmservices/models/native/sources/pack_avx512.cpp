// Packing for AVX-512.
#define WIDTH 16
#include "pack.h"

extern "C" void pack_avx512(void *packing, int thread) { pack_on_thread(packing, thread); }
