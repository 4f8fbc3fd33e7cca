// What crosses between Python and the library: plain C structs of pointers and numbers.
//
// Python owns every buffer that a struct here points to and keeps it for as long as the engine
// lives; the library owns the engine.  `bindings.py` declares the same structs for ctypes; the two
// are kept together by the digest of all sources, which the library carries.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LLM_API __attribute__((visibility("default")))

enum LlmKind { LLM_FLOAT32 = 0, LLM_BFLOAT16 = 1, LLM_INT8 = 2, LLM_INT4 = 3 };

// y = x W^T + b in panels of 32 columns (outputs); columns and depth are padded with zeros to
// multiples of 32.
typedef struct {
    const void *data;
    const float *scales; // int8: one a column
    const float *bias;   // or null
    int32_t kind;
    int32_t columns;
    int32_t depth;
    int32_t grouped; // int8: its rows have a scale for each 128 depths; else one each
} LlmMatrix;

typedef struct {
    LlmMatrix qkv, out, up, down;
    const float *attention_norm;
    const float *mlp_norm;
    const float *q_norm; // or null, as k_norm
    const float *k_norm;
    void *cache;
    int32_t window; // positions that a token attends to, its own included; 0: all
    int32_t unused;
} LlmLayer;

typedef struct {
    const LlmLayer *layers;
    const void *embedding; // rows of `hidden` values of kind `kind`, or null: those of the head
    const float *final_norm;
    const float *frequencies; // head_dim / 2
    LlmMatrix head;
    int32_t layer_count;
    int32_t kind; // of the keys, the values and the embedding: float32 or bfloat16
    int32_t hidden;
    int32_t heads;
    int32_t kv_heads;
    int32_t head_dim;
    int32_t inner;
    int32_t vocab;
    int32_t block_tokens; // at most 16
    int32_t unused;
    float norm_eps;
    float attention_scale;
    float rope_scale;
    float unused_float;
} LlmModel;

// Rows of `depth` values, one a column of the matrix that is made of them.
typedef struct {
    const void *data;
    int64_t rows;
} LlmPart;

typedef struct {
    const LlmPart *parts;
    int32_t part_count;
    int32_t kind;     // of the values: float32 or bfloat16
    int32_t depth;
    int32_t in_turns; // 16 columns of the first of two parts, 16 of the second; else one part after another
} LlmSource;

// Rows of one thread: positions start .. start + rows - 1, in the blocks that
// plan.blocks[first_block ...] names.
typedef struct {
    int32_t start;
    int32_t rows;
    int32_t first_block;
    int32_t unused;
} LlmSegment;

typedef struct {
    const int32_t *tokens; // one a row, rows in the order of the segments
    const LlmSegment *segments;
    const int32_t *blocks;
    const int32_t *wanted; // rows whose logits are needed, ascending
    float *logits;         // (wanted, head.columns)
    float *best_value;     // of each wanted row, NaN aside; -inf where all are
    int32_t *best_token;   // the first that has it
    int32_t rows;
    int32_t segment_count;
    int32_t wanted_count;
    int32_t unused;
} LlmPlan;

// A row of logits from which a token is drawn.
typedef struct {
    const float *logits; // as long as the vocabulary, and readable to the next multiple of 16
    double top_p;        // 1: off
    double min_p;        // 0: off, as top_k
    float temperature;   // above 0
    int32_t top_k;
    uint32_t first; // two words that the noise of this position comes from
    uint32_t second;
    int32_t token; // is set; -1: in doubt
    int32_t unused;
} LlmDraw;

typedef struct LlmEngine LlmEngine;

// Digest of the sources that it was built from.
LLM_API const char *llm_digest(void);
// Names of the instruction sets that this processor can run, best first, separated by spaces.
LLM_API const char *llm_isas(void);
// Bytes of one layer's keys and values in a block.
LLM_API int64_t llm_block_bytes(const LlmModel *model);
// Null where memory is short or `isa` cannot run here.
LLM_API LlmEngine *llm_open(const LlmModel *model, int32_t threads, int32_t rows_max, const char *isa);
// 0, or -1 where the plan has more rows than `rows_max`.
LLM_API int32_t llm_step(LlmEngine *engine, const LlmPlan *plan);
// Draws the token of each row where the outcome is beyond doubt.
LLM_API void llm_draw(LlmEngine *engine, LlmDraw *draws, int32_t count);
LLM_API void llm_close(LlmEngine *engine);
// Fills `to`, whose buffers the caller owns: panels, and for int8 their scales; of a float kind it
// must be the source's.  0, or -1 where memory is short or `isa` cannot run here.
LLM_API int32_t llm_pack(const LlmSource *source, const LlmMatrix *to, int32_t threads, const char *isa);
// Gives back the memory behind what is never read again; a file's is read anew if it is.
LLM_API void llm_forget_pages(void *start, int64_t bytes);
// Asks for large pages under a buffer that is about to be filled.
LLM_API void llm_prefer_large_pages(void *start, int64_t bytes);
// Bytes a second at which so many threads read a buffer once, or 0 where `isa` cannot run here.
LLM_API double llm_read_bandwidth(const void *start, int64_t bytes, int32_t threads, const char *isa);
// Operations a second (a product and a sum are two) of dot products of a kind, out of registers, on
// so many threads; 0 where `isa` cannot run here.  A round takes some nanoseconds.
LLM_API double llm_dot_peak(int32_t kind, int64_t rounds, int32_t threads, const char *isa);
// Gives freed memory back to the system, where the allocator keeps it.
LLM_API void llm_trim(void);

#ifdef __cplusplus
}
#endif
