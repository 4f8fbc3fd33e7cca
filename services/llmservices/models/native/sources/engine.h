// What an engine owns between steps: the model's description and the buffers that a step fills.
#pragma once
#include "abi.h"
#include "pool.h"

constexpr int PANEL = 32;       // columns of a matrix that lie together
constexpr int HALF = 16;        // keys of a block, and values of one row, that lie together
constexpr int GROUP = 32;       // int4: weights that share a scale
constexpr int ALONE_ROWS = 4;   // up to so many rows every thread prepares its input by itself
constexpr int CHUNK_BLOCKS = 16; // blocks of keys that attention reduces at a time
constexpr int QUERY_ROWS = 64;  // queries (rows times heads of a group) of one piece of attention
constexpr int SHARE_PANELS = 4; // panels that are computed from one reading of the input
constexpr int LLM_CANDIDATES = 4096; // tokens that drawing looks at more closely
constexpr int PHASES_A_LAYER = 12;
constexpr int FEW_PHASES = 5; // a layer: qkv, attention, out, up, down

// The input of a matrix: rows in the format that its kind wants.
struct Input {
    char *data;
    int64_t stride;  // bytes a row
    float *scales;   // int8, int4: one a row
    int32_t *sums;   // int8: minus BYTE_OFFSET times a row's sum; int4: minus 8 times each group's
    int64_t sums_stride;
};

// Pieces of work that depend on each other's results no earlier than all are done (few.h).
struct Phase {
    int64_t taken;    // pieces claimed
    int64_t finished; // pieces whose result stands
    uint8_t *marks;   // by piece: 1 once its result stands
    char unused[40];  // one cache line each
};

// What the phases of one layer give, kept until the step ends; ALONE_ROWS rows each.
struct FewLayer {
    float *qkv, *mixed, *attended, *added; // the last two: what is added to the residual stream
    Input inner;                           // floats, where the down projection is quantised
};

struct Scratch {
    Input alone;
    float *x;              // a few rows: this thread's own residual stream
    float *turned;         // rotated queries of one key-value head, and its key
    float *cosines, *sines;
    float *rows;     // unrolled row of floats
    float *sums;     // accumulators between blocks of the depth
    char *queries;
    float *scores;
    char *weights;
    float *mixed;    // attention's output before it is divided
    float *maxima, *totals, *factors;
    float *best_value;
    int32_t *best_token;
    char *candidates; // of drawing
};

// Whether every row is the next of a thread of its own, and they are few.
inline bool is_few(const LlmPlan &plan) {
    return plan.rows <= ALONE_ROWS && plan.segment_count == plan.rows && plan.wanted_count == plan.rows;
}

struct Kernels;

struct LlmEngine {
    LlmModel model;
    LlmLayer *layers;
    Pool *pool;
    const Kernels *kernels;
    int rows_max;
    float *x;     // (rows, hidden) residual stream
    float *qkv;   // (rows, qkv columns)
    float *mixed; // (rows, heads * head_dim)
    float *inner; // (rows, inner), where the down projection is quantised
    Input input;
    Input inner_input;
    float *cosines, *sines; // (rows, head_dim / 2)
    int32_t *positions;
    Scratch *scratch;
    int64_t *counters; // work handed out, one a phase
    FewLayer *few;
    Phase *phases; // FEW_PHASES a layer, and the head's
    uint8_t *marks;
    int64_t mark_bytes;
    char *memory;
    const LlmPlan *plan;
    LlmDraw *draws;
    int32_t draw_count;
};

// A matrix that threads lay out together, panel by panel.
struct Packing {
    const LlmSource *source;
    const LlmMatrix *to;
    int64_t taken;
};

constexpr int64_t READING_PIECE = 1 << 16; // bytes

// Memory that threads read together, once.
struct Reading {
    const char *start;
    int64_t bytes;
    int threads;
    int64_t taken;
};

// Dot products that every thread computes by itself.
struct Dots {
    int32_t kind;
    int64_t rounds;
    int64_t operations; // of one thread, when they are done
};

struct Kernels {
    const char *name;
    void (*step)(void *engine, int thread);
    void (*read)(void *reading, int thread);
    void (*dots)(void *dots, int thread);
    void (*pack)(void *packing, int thread);
    void (*draw)(void *engine, int thread);
};

// The best that runs here and has this name, or any where none is given; null where there is none.
const Kernels *kernels_named(const char *name);

extern "C" {
void pack_baseline(void *packing, int thread);
extern const Kernels kernels_baseline;
#if defined(__x86_64__)
void pack_avx2(void *packing, int thread);
void pack_avx512(void *packing, int thread);
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512_vnni;
extern const Kernels kernels_avx512_bf16;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
extern const Kernels kernels_neon_dot;
extern const Kernels kernels_neon_bf16;
#endif
}

inline int64_t rounded(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
