// Packing for what every processor of the architecture has.
#define WIDTH 4
#include "pack.h"

extern "C" void pack_baseline(void *packing, int thread) { pack_on_thread(packing, thread); }
