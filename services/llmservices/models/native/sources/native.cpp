// The library's doors: choosing the instruction set, owning buffers, starting steps.
#include "abi.h"

#include <new>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "engine.h"

#ifndef LLM_DIGEST
#define LLM_DIGEST "unknown"
#endif

namespace {

#if defined(__aarch64__)
// What a processor may have beyond NEON.  Bits: Linux, Documentation/arch/arm64/elf_hwcaps.rst.
struct Extensions {
    bool dot = false, bf16 = false;
    Extensions() {
#if defined(__linux__)
        dot = getauxval(AT_HWCAP) >> 20 & 1;
        bf16 = getauxval(AT_HWCAP2) >> 14 & 1;
#elif defined(__APPLE__)
        dot = says("hw.optional.arm.FEAT_DotProd");
        bf16 = says("hw.optional.arm.FEAT_BF16");
#endif
    }
#if defined(__APPLE__)
    static bool says(const char *name) {
        int value = 0;
        size_t size = sizeof value;
        return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
    }
#endif
};
#endif

bool runs_here(const Kernels *kernels) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    if (kernels == &kernels_avx512_bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
    if (kernels == &kernels_avx512_vnni) return avx512;
    if (kernels == &kernels_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__aarch64__)
    const Extensions has;
    if (kernels == &kernels_neon_bf16) return has.dot && has.bf16;
    if (kernels == &kernels_neon_dot) return has.dot;
    if (kernels == &kernels_neon) return true;
#endif
    return kernels == &kernels_baseline;
}

const Kernels *const CHOICES[] = {
#if defined(__x86_64__)
    &kernels_avx512_bf16,
    &kernels_avx512_vnni,
    &kernels_avx2,
#elif defined(__aarch64__)
    &kernels_neon_bf16,
    &kernels_neon_dot,
    &kernels_neon,
#endif
    &kernels_baseline,
};

// Cuts one allocation into buffers.  A first pass with no memory counts.
struct Cutter {
    char *memory = nullptr;
    int64_t used = 0;
    template <class T> T *take(int64_t count) {
        T *at = memory ? (T *)(memory + used) : nullptr;
        used += rounded(count * (int64_t)sizeof(T), 64);
        return at;
    }
};

int64_t deepest(const LlmEngine *engine) {
    int64_t most = engine->model.head.depth;
    for (int i = 0; i < engine->model.layer_count; i++) {
        const LlmLayer &layer = engine->layers[i];
        const LlmMatrix *const matrices[] = {&layer.qkv, &layer.out, &layer.up, &layer.down};
        for (const LlmMatrix *matrix : matrices) most = matrix->depth > most ? matrix->depth : most;
    }
    return most;
}

Input cut_input(Cutter &cutter, int64_t rows, int64_t depth) {
    // A stride that is no power of two spreads the rows over the sets of the caches.
    const int64_t stride = rounded(depth * 4, 64) + 64, groups = depth / GROUP;
    const int64_t scales = rounded(depth, ROW_GROUP) / ROW_GROUP;
    return {
        cutter.take<char>(rows * stride), stride,
        cutter.take<float>(rows * scales), scales,
        cutter.take<int32_t>(rows * groups), groups,
    };
}

void cut_decode(LlmEngine *engine, Cutter &cutter) {
    const LlmModel &model = engine->model;
    const int64_t rows = DECODE_ROWS, phases = (int64_t)DECODE_PHASES * (model.layer_count + 1);
    const LlmLayer &layer = model.layers[0]; // all have the same sizes
    engine->phases = cutter.take<Phase>(phases);
    // By phase, in turns: rows of an input, panels of qkv, heads of rows, panels of out, up, down.
    const int64_t product_pieces = (layer.qkv.columns + layer.out.columns + layer.up.columns + layer.down.columns) / PANEL;
    const int64_t layer_pieces = 4 * rows + product_pieces + rows * model.kv_heads;
    engine->mark_bytes = layer_pieces * model.layer_count + rows + model.head.columns / PANEL;
    engine->marks = cutter.take<uint8_t>(engine->mark_bytes);
    for (LayerResults &results : engine->results) {
        results.qkv_input = cut_input(cutter, rows, layer.qkv.depth);
        results.out_input = cut_input(cutter, rows, layer.out.depth);
        results.up_input = cut_input(cutter, rows, layer.up.depth);
        results.down_input = cut_input(cutter, rows, layer.down.depth);
        results.qkv = cutter.take<float>(rows * layer.qkv.columns);
        results.mixed = cutter.take<float>(rows * layer.out.depth);
        results.attended = cutter.take<float>(rows * layer.out.columns);
        results.added = cutter.take<float>(rows * layer.down.columns);
        results.inner = cut_input(cutter, rows, layer.down.depth);
    }
    engine->head_input = cut_input(cutter, rows, model.head.depth);
    if (!cutter.memory) return;
    uint8_t *marks = engine->marks;
    for (int64_t i = 0; i < phases; i++) {
        const bool head = i >= (int64_t)DECODE_PHASES * model.layer_count;
        const int64_t pieces[DECODE_PHASES] = {
            rows, (head ? model.head : layer.qkv).columns / PANEL, rows * model.kv_heads,
            rows, layer.out.columns / PANEL,
            rows, layer.up.columns / PANEL,
            rows, layer.down.columns / PANEL,
        };
        engine->phases[i].marks = marks;
        if (!head || i % DECODE_PHASES < 2) marks += pieces[i % DECODE_PHASES];
    }
}

void cut(LlmEngine *engine, Cutter &cutter) {
    const LlmModel &model = engine->model;
    const int64_t rows = engine->rows_max, depth = deepest(engine);
    const int64_t queries = model.heads / model.kv_heads > QUERY_ROWS ? model.heads / model.kv_heads : QUERY_ROWS;
    const int64_t wide = rounded(model.head_dim, HALF), chunk = CHUNK_BLOCKS * HALF;
    engine->x = cutter.take<float>(rows * rounded(model.hidden, GROUP));
    engine->qkv = cutter.take<float>(rows * model.layers[0].qkv.columns);
    engine->mixed = cutter.take<float>(rows * rounded(model.heads * model.head_dim, GROUP));
    engine->inner = cutter.take<float>(rows * model.layers[0].down.depth);
    engine->input = cut_input(cutter, rows, depth);
    engine->inner_input = cut_input(cutter, rows, model.layers[0].down.depth);
    engine->cosines = cutter.take<float>(rows * (model.head_dim / 2));
    engine->sines = cutter.take<float>(rows * (model.head_dim / 2));
    engine->positions = cutter.take<int32_t>(rows);
    engine->counters = cutter.take<int64_t>((int64_t)PHASES_A_LAYER * (model.layer_count + 1));
    cut_decode(engine, cutter);
    for (int thread = 0; thread < pool_threads(engine->pool); thread++) {
        Scratch &scratch = engine->scratch[thread];
        scratch.alone = cut_input(cutter, ALONE_ROWS, depth);
        scratch.x = cutter.take<float>(DECODE_ROWS * rounded(model.hidden, GROUP));
        scratch.turned = cutter.take<float>((model.heads / model.kv_heads + 1) * (int64_t)model.head_dim);
        scratch.cosines = cutter.take<float>(DECODE_ROWS * (model.head_dim / 2));
        scratch.sines = cutter.take<float>(DECODE_ROWS * (model.head_dim / 2));
        scratch.rows = cutter.take<float>(depth);
        scratch.sums = cutter.take<float>(rows * PANEL * SHARE_PANELS);
        scratch.queries = cutter.take<char>(queries * wide * 4);
        scratch.scores = cutter.take<float>(queries * chunk);
        scratch.weights = cutter.take<char>(queries * chunk * 4);
        scratch.mixed = cutter.take<float>(queries * wide);
        scratch.maxima = cutter.take<float>(queries);
        scratch.totals = cutter.take<float>(queries);
        scratch.factors = cutter.take<float>(queries);
        scratch.best_value = cutter.take<float>(rows);
        scratch.best_token = cutter.take<int32_t>(rows);
        scratch.candidates = cutter.take<char>(LLM_CANDIDATES * 12);
        cutter.take<char>(128); // two threads never write to one pair of cache lines
    }
}

// The best that any thread has seen of each row.
void take_best(LlmEngine *engine) {
    const LlmPlan &plan = *engine->plan;
    for (int64_t row = 0; row < plan.wanted_count; row++) {
        float value = engine->scratch[0].best_value[row];
        int32_t token = engine->scratch[0].best_token[row];
        for (int other = 1; other < pool_threads(engine->pool); other++) {
            const float theirs = engine->scratch[other].best_value[row];
            const int32_t candidate = engine->scratch[other].best_token[row];
            if (theirs > value || (theirs == value && candidate < token)) value = theirs, token = candidate;
        }
        plan.best_value[row] = value;
        plan.best_token[row] = token;
    }
}

} // namespace

const Kernels *kernels_named(const char *name) {
    for (const Kernels *kernels : CHOICES)
        if (runs_here(kernels) && (!name || !*name || !strcmp(name, kernels->name))) return kernels;
    return nullptr;
}

const char *llm_digest(void) { return LLM_DIGEST; }

const char *llm_isas(void) {
    static char names[128];
    if (!*names)
        for (const Kernels *kernels : CHOICES)
            if (runs_here(kernels)) {
                if (*names) strcat(names, " ");
                strcat(names, kernels->name);
            }
    return names;
}

int64_t llm_block_bytes(const LlmModel *model) {
    const int64_t value = model->kind == LLM_BFLOAT16 ? 2 : 4;
    return 2 * model->kv_heads * rounded(model->head_dim, HALF) * HALF * value;
}

LlmEngine *llm_open(const LlmModel *model, int32_t threads, int32_t rows_max, const char *isa) {
    const Kernels *kernels = kernels_named(isa);
    if (!kernels || threads < 1) return nullptr;
    LlmEngine *engine = new (std::nothrow) LlmEngine();
    if (!engine) return nullptr;
    engine->kernels = kernels;
    engine->rows_max = rows_max;
    engine->model = *model;
    engine->layers = (LlmLayer *)malloc(sizeof(LlmLayer) * model->layer_count);
    engine->scratch = (Scratch *)calloc(threads, sizeof(Scratch));
    engine->pool = pool_open(threads);
    if (engine->layers && engine->scratch && engine->pool) {
        memcpy(engine->layers, model->layers, sizeof(LlmLayer) * model->layer_count);
        engine->model.layers = engine->layers;
        Cutter counting;
        cut(engine, counting);
        // Pages that no step of so many rows has touched are never made.
        engine->memory = (char *)calloc(counting.used + 64, 1);
        if (engine->memory) {
            Cutter cutting;
            cutting.memory = (char *)rounded((int64_t)engine->memory, 64);
            cut(engine, cutting);
            return engine;
        }
    }
    llm_close(engine);
    return nullptr;
}

int32_t llm_step(LlmEngine *engine, const LlmPlan *plan) {
    if (plan->rows > engine->rows_max || plan->wanted_count > engine->rows_max) return -1;
    engine->plan = plan;
    int64_t row = 0;
    for (int64_t i = 0; i < plan->segment_count; i++)
        for (int32_t r = 0; r < plan->segments[i].rows; r++) engine->positions[row++] = plan->segments[i].start + r;
    // Every row is the next of a thread of its own.
    engine->decodes = plan->rows <= engine->kernels->decode_rows && plan->segment_count == plan->rows &&
                      plan->wanted_count == plan->rows;
    if (engine->decodes) {
        memset(engine->marks, 0, engine->mark_bytes);
        for (int64_t i = 0; i < (int64_t)DECODE_PHASES * (engine->model.layer_count + 1); i++)
            engine->phases[i].taken = 0;
        for (int thread = 0; thread < pool_threads(engine->pool); thread++) engine->scratch[thread].layer = 0;
    } else {
        memset(engine->counters, 0, sizeof(int64_t) * PHASES_A_LAYER * (engine->model.layer_count + 1));
    }
    pool_run(engine->pool, engine->kernels->step, engine);
    take_best(engine);
    return 0;
}

void llm_draw(LlmEngine *engine, LlmDraw *draws, int32_t count) {
    engine->draws = draws;
    engine->draw_count = count;
    engine->counters[0] = 0;
    pool_run(engine->pool, engine->kernels->draw, engine);
}

void llm_close(LlmEngine *engine) {
    if (!engine) return;
    if (engine->pool) pool_close(engine->pool);
    free(engine->memory);
    free(engine->scratch);
    free(engine->layers);
    delete engine;
}

int32_t llm_pack(const LlmSource *source, const LlmMatrix *to, int32_t threads, const char *isa) {
    const Kernels *kernels = kernels_named(isa);
    Pool *pool = kernels && threads > 0 ? pool_open(threads) : nullptr;
    if (!pool) return -1;
    Packing packing = {source, to, 0};
    pool_run(pool, kernels->pack, &packing);
    pool_close(pool);
    return 0;
}

// The pages that lie in it as a whole: their neighbours' numbers stay.
void llm_forget_pages(void *start, int64_t bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t begin = rounded((int64_t)start, page), end = ((int64_t)start + bytes) / page * page;
    if (end > begin) madvise((void *)begin, end - begin, MADV_DONTNEED);
}

void llm_prefer_large_pages(void *start, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const int64_t page = 4096, begin = rounded((int64_t)start, page), end = ((int64_t)start + bytes) / page * page;
    if (end > begin) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)start;
    (void)bytes;
#endif
}

void llm_trim(void) {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
}
