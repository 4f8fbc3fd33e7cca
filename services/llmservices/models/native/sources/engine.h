// What an engine owns between steps: the model's description and the buffers that a step fills.
#pragma once
#include "abi.h"
#include "pool.h"

constexpr int PANEL = 32;       // columns of a matrix that lie together
constexpr int HALF = 16;        // keys of a block, and values of one row, that lie together
constexpr int GROUP = 32;       // int4: weights that share a scale
constexpr int ROW_GROUP = 128;  // numbers of a row that share a scale where the matrix wants it
constexpr int ALONE_ROWS = 4;   // up to so many rows every thread prepares its input by itself
constexpr int CHUNK_BLOCKS = 16; // blocks of keys that attention reduces at a time
constexpr int QUERY_ROWS = 64;  // queries (rows times heads of a group) of one piece of attention
constexpr int SHARE_PANELS = 4; // panels that are computed from one reading of the input
constexpr int LLM_CANDIDATES = 4096; // tokens that drawing looks at more closely
constexpr int PHASES_A_LAYER = 12;
constexpr int DECODE_ROWS = 32;   // of a step that decode.h computes, at most
constexpr int DECODE_PHASES = 9; // a layer: qkv, attention, out, up, down, and before each product its input
constexpr int KEPT_LAYERS = 3;   // that the first of the threads may be ahead of the last, and one

// The input of a matrix: rows in the format that its kind wants.
struct Input {
    char *data;
    int64_t stride;  // bytes a row
    float *scales;   // int8, int4: one a row, or one for each ROW_GROUP
    int64_t scales_stride;
    int32_t *sums;   // int8: minus BYTE_OFFSET times the sum of what shares a scale; int4: minus 8
    int64_t sums_stride; // times each group's
};

// Pieces of work; what depends on one of them begins when all are done (decode.h).
struct Phase {
    int64_t taken;   // pieces claimed
    uint8_t *marks;  // by piece: 1 once its result stands
    char unused[48]; // one cache line each
};

// What the phases of one layer give.
struct LayerResults {
    Input qkv_input, out_input, up_input, down_input; // of more than ALONE_ROWS rows
    float *qkv, *mixed, *attended, *added;            // the last two are added to the residual stream
    Input inner;                                      // floats, where the down projection is quantised
};

struct Scratch {
    Input alone;
    float *x;      // decoding: this thread's own residual stream
    float *turned; // rotated queries of one key-value head, and its key
    float *cosines, *sines;
    int64_t layer; // that it is at; the others read it
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
    LayerResults results[KEPT_LAYERS]; // of layer l at l % KEPT_LAYERS
    Input head_input;
    Phase *phases;                     // DECODE_PHASES a layer and for the head
    uint8_t *marks;
    int64_t mark_bytes;
    char *memory;
    const LlmPlan *plan;
    bool decodes; // the plan is one for decode.h
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
    int decode_rows; // up to so many are computed by decode.h
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
