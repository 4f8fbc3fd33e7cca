// Runs the library without Python: a small model of pseudo-random numbers, the same on every
// machine, through a prefill and steps of mixed rows, with each instruction set that runs here.
//
// `native_driver KIND WEIGHTS THREADS` prints for each set a line with its name, then the bits of
// the logits of every step, a line for each row, and in the end a digest of matrices of each kind
// that it has laid out.
#include "abi.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <vector>

namespace {

constexpr int LAYERS = 2, HIDDEN = 96, HEADS = 6, KV_HEADS = 2, HEAD_DIM = 24, INNER = 160, VOCAB = 100;
constexpr int BLOCKS = 12, BLOCK_TOKENS = 16, ROWS_MAX = 64;

uint64_t state = 1;
std::vector<std::vector<char>> held; // what the model points to

uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}
float between(float low, float high) { return low + (high - low) * ((float)(bits() >> 7) / (float)(1 << 24)); }

template <class T> T *room(int64_t count) {
    held.emplace_back(count * sizeof(T) + 64);
    return (T *)(((uintptr_t)held.back().data() + 63) / 64 * 64);
}

float *floats(int64_t count, float low, float high) {
    float *made = room<float>(count);
    for (int64_t i = 0; i < count; i++) made[i] = between(low, high);
    return made;
}

uint16_t upper(float value) {
    uint32_t whole;
    memcpy(&whole, &value, 4);
    return (uint16_t)(whole >> 16);
}

// Any numbers in a matrix's layout are a matrix: nothing is laid out here.
LlmMatrix matrix(int kind, int columns, int depth, bool biased) {
    const float size = 1.5f / (float)depth;
    LlmMatrix made{};
    made.kind = kind, made.columns = (columns + 31) / 32 * 32, made.depth = (depth + 31) / 32 * 32;
    const int64_t count = (int64_t)made.columns * made.depth;
    if (biased) made.bias = floats(made.columns, -0.1f, 0.1f);
    if (kind == LLM_FLOAT32) {
        made.data = floats(count, -16 * size, 16 * size);
    } else if (kind == LLM_BFLOAT16) {
        uint16_t *data = room<uint16_t>(count);
        for (int64_t i = 0; i < count; i++) data[i] = upper(between(-16 * size, 16 * size));
        made.data = data;
    } else if (kind == LLM_INT8) {
        uint8_t *data = room<uint8_t>(count);
        // The ends of the range too, where narrow sums would overflow.
        for (int64_t i = 0; i < count; i++) data[i] = bits() % 8 ? 1 + bits() % 255 : (bits() & 1 ? 255 : 0);
        made.data = data;
        made.scales = floats(made.columns, size / 16, size / 8);
    } else {
        const int64_t groups = count / 1024; // 32 columns by 32 depths
        uint8_t *data = room<uint8_t>(groups * 576);
        for (int64_t group = 0; group < groups; group++)
            for (int i = 0; i < 576; i++) {
                const bool high = i % 2; // of a half: sign, exponent, two bits
                data[group * 576 + i] = i >= 64 ? (uint8_t)bits() : high ? (bits() & 0x80) | 0x24 : (uint8_t)bits();
            }
        made.data = data;
    }
    return made;
}

void print(const float *logits, int rows, int columns) {
    for (int row = 0; row < rows; row++) {
        for (int column = 0; column < VOCAB; column++) {
            uint32_t word;
            memcpy(&word, logits + row * columns + column, 4);
            printf("%08x ", word);
        }
        printf("\n");
    }
}

// Rows of each segment from `start` on, in the order of the wanted rows.
void step(LlmEngine *engine, const LlmModel &model, std::vector<LlmSegment> segments) {
    static const int32_t blocks[] = {7, 2, 9, 4, 11, 0, 5, 1};
    std::vector<int32_t> tokens, wanted, best;
    for (LlmSegment &segment : segments)
        for (int row = 0; row < segment.rows; row++) {
            if (row % 3 == 0 || row == segment.rows - 1) wanted.push_back((int32_t)tokens.size());
            tokens.push_back((segment.first_block * 5 + (segment.start + row) * 7) % VOCAB);
        }
    const int count = (int)wanted.size();
    std::vector<float> logits(count * model.head.columns), value(count);
    best.resize(count);
    const LlmPlan plan{tokens.data(), segments.data(), blocks, wanted.data(), logits.data(), value.data(), best.data(),
                       (int32_t)tokens.size(), (int32_t)segments.size(), count, 0};
    if (llm_step(engine, &plan)) exit(1);
    print(logits.data(), count, model.head.columns);
}

// FNV-1a (Fowler, Noll, Vo).
uint32_t digest(const void *data, int64_t bytes) {
    uint32_t made = 2166136261u;
    for (int64_t i = 0; i < bytes; i++) made = (made ^ ((const uint8_t *)data)[i]) * 16777619u;
    return made;
}

// Two parts of rows in turns, no size a multiple of anything.
void lay_out(const char *isa, int threads) {
    constexpr int ROWS = 37, DEPTH = 75, COLUMNS = 128, WIDE = 96;
    const uint64_t before = state; // the same numbers for every set
    const float *rows = floats(2 * ROWS * DEPTH, -0.3f, 0.2f);
    state = before;
    const LlmPart parts[] = {{rows, ROWS}, {rows + ROWS * DEPTH, ROWS}};
    const LlmSource source{parts, 2, LLM_FLOAT32, DEPTH, 1};
    for (int kind : {LLM_FLOAT32, LLM_INT8, LLM_INT4}) {
        const int64_t bytes = COLUMNS * WIDE * (kind == LLM_FLOAT32 ? 4 : 1) / (kind == LLM_INT4 ? 2 : 1) +
                              (kind == LLM_INT4 ? COLUMNS * WIDE / 16 : 0);
        char *data = room<char>(bytes);
        float *scales = room<float>(COLUMNS);
        const LlmMatrix to{data, scales, nullptr, kind, COLUMNS, WIDE, 0};
        if (llm_pack(&source, &to, threads, isa)) exit(1);
        printf("%08x ", digest(data, bytes) ^ (kind == LLM_INT8 ? digest(scales, COLUMNS * 4) : 0));
    }
    for (int i = 3; i < VOCAB; i++) printf("%08x ", 0); // as long as the other rows
    printf("\n");
}

} // namespace

int main(int count, char **words) {
    if (count != 4) return 2;
    const int kind = atoi(words[1]), weights = atoi(words[2]), threads = atoi(words[3]);
    std::vector<LlmLayer> layers(LAYERS);
    LlmModel model{};
    for (LlmLayer &layer : layers) {
        layer.qkv = matrix(weights, (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, true);
        layer.out = matrix(weights, HIDDEN, HEADS * HEAD_DIM, false);
        layer.up = matrix(weights, 2 * INNER, HIDDEN, false);
        layer.down = matrix(weights, HIDDEN, INNER, false);
        layer.down.grouped = weights == LLM_INT8;
        layer.attention_norm = floats(HIDDEN, 0.5f, 1.5f);
        layer.mlp_norm = floats(HIDDEN, 0.5f, 1.5f);
        layer.q_norm = floats(32, 0.5f, 1.5f);
        layer.k_norm = floats(32, 0.5f, 1.5f);
    }
    layers[0].window = 21;
    model.layers = layers.data(), model.layer_count = LAYERS, model.kind = kind;
    model.hidden = HIDDEN, model.heads = HEADS, model.kv_heads = KV_HEADS, model.head_dim = HEAD_DIM;
    model.inner = INNER, model.vocab = VOCAB, model.block_tokens = BLOCK_TOKENS;
    model.norm_eps = 1e-5f, model.attention_scale = 0.2f, model.rope_scale = 1.0f;
    model.final_norm = floats(HIDDEN, 0.5f, 1.5f);
    model.frequencies = floats(HEAD_DIM / 2, 0.0f, 1.0f);
    model.head = matrix(weights == LLM_INT4 ? LLM_INT8 : weights, VOCAB, HIDDEN, false); // the embedding too
    const int64_t cache_bytes = llm_block_bytes(&model) * BLOCKS;
    std::string names = llm_isas();
    for (size_t at = 0; at < names.size();) {
        const size_t end = names.find(' ', at) == std::string::npos ? names.size() : names.find(' ', at);
        const std::string name = names.substr(at, end - at);
        at = end + 1;
        for (LlmLayer &layer : layers) {
            char *cache = room<char>(cache_bytes);
            memset(cache, 0, cache_bytes);
            layer.cache = cache;
        }
        LlmEngine *engine = llm_open(&model, threads, ROWS_MAX, name.c_str());
        if (!engine) return 1;
        printf("%s\n", name.c_str());
        step(engine, model, {{0, 37, 0, 0}, {0, 5, 4, 0}});
        step(engine, model, {{37, 1, 0, 0}, {5, 20, 4, 0}});
        step(engine, model, {{38, 1, 0, 0}, {25, 1, 4, 0}});
        llm_close(engine);
        lay_out(name.c_str(), threads);
    }
    return 0;
}
