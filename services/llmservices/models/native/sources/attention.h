// Attention over paged keys and values where they lie.
//
// A block holds, for every key-value head, the keys as 16 columns of a product with the queries,
// and the values as columns of a product with the weights: both run through the same tiles as the
// matrices do.  Keys are reduced in chunks of CHUNK_BLOCKS blocks, cut at multiples from position
// zero, with the running maximum and sum of online softmax; a row's bits depend on its own
// positions alone.
//
// Source: online softmax, Milakov and Gimelshein 2018 (arXiv 1805.02867); tiling, Dao 2023
// (arXiv 2307.08691), section 3.
#pragma once
#include "engine.h"
#include "rows.h"

namespace {

template <class Dot> struct Paged {
    static constexpr int DEPTHS = Dot::DEPTHS;
    static constexpr int VALUE = Dot::DEPTHS == 1 ? 4 : 2;            // bytes of a key's or value's number
    static constexpr int QUERY = Dot::A_BYTES / Dot::DEPTHS;          // bytes of a query's or weight's
    static constexpr int CHUNK = CHUNK_BLOCKS * HALF;
    static constexpr int DEGREE = VALUE == 2 ? 5 : 6; // of the exponential's polynomial

    const LlmEngine &engine;
    const LlmLayer &layer;
    const int64_t dims;        // of a head
    const int64_t wide;        // the same, a multiple of 16
    const int64_t part_bytes;  // keys, or values, of one head in a block
    const int64_t kv_heads;

    Paged(const LlmEngine &e, const LlmLayer &l)
        : engine(e), layer(l), dims(e.model.head_dim), wide(rounded(e.model.head_dim, HALF)),
          part_bytes(wide * HALF * VALUE), kv_heads(e.model.kv_heads) {}

    INLINE void put(char *to, int64_t at, float value) {
        if (VALUE == 2)
            ((uint16_t *)to)[at] = to_bf16(value);
        else
            ((float *)to)[at] = value;
    }
    INLINE void put_query(char *to, int64_t at, float value) {
        if (QUERY == 2)
            ((uint16_t *)to)[at] = to_bf16(value);
        else
            ((float *)to)[at] = value;
    }
    void put_query(char *to, const float *from) const {
        int64_t d = 0;
        for (; QUERY == 2 && d + WIDTH <= dims; d += WIDTH) store_bf16((uint16_t *)to + d, load(from + d));
        for (; d < dims; d++) put_query(to, d, from[d]);
    }

    char *keys(int64_t block, int64_t head) const {
        return (char *)layer.cache + (block * 2 * kv_heads + head) * part_bytes;
    }
    char *values(int64_t block, int64_t head) const { return keys(block, kv_heads + head); }

    // Keep the key and the value of one row.
    void write(const float *key, const float *value, int64_t block, int64_t slot, int64_t head) const {
        char *k = keys(block, head), *v = values(block, head);
        for (int64_t d = 0; d < dims; d++) {
            put(k, (d / DEPTHS * HALF + slot) * DEPTHS + d % DEPTHS, key[d]);
            put(v, (d / HALF * HALF + slot / DEPTHS * DEPTHS) * HALF + d % HALF * DEPTHS + slot % DEPTHS, value[d]);
        }
    }

    template <int ROWS, int HALVES>
    MEMBER void score(const char *queries, const char *const *b, float *scores) const {
        vf sums[ROWS][HALVES * VECTORS] = {};
        dot_steps<Dot, ROWS, HALVES>(sums, queries, wide * QUERY, b, Dot::B_BYTES, wide / DEPTHS, {nullptr, 0});
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < HALVES * VECTORS; i++) store(scores + r * CHUNK + i * WIDTH, sums[r][i]);
    }
    // The first tile asks for what comes next: keys of the blocks after these, and their values.
    template <int ROWS> void score_chunk(const char *queries, const int32_t *blocks, int64_t count, int64_t head,
                                         float *scores, bool ask) const {
        if (ask)
            for (int64_t j = 0; j < count && j < TILE_HALVES; j++) ask_for(keys(blocks[j], head));
        int64_t j = 0;
        for (; j + TILE_HALVES <= count; j += TILE_HALVES) {
            if (ask)
                for (int64_t next = j; next < j + TILE_HALVES; next++) {
                    if (next + TILE_HALVES < count) ask_for(keys(blocks[next + TILE_HALVES], head));
                    ask_for(values(blocks[next], head));
                }
            const char *const b[2] = {keys(blocks[j], head), keys(blocks[j + TILE_HALVES - 1], head)};
            score<ROWS, TILE_HALVES>(queries, b, scores + j * HALF);
        }
        for (; j < count; j++) {
            const char *const b[1] = {keys(blocks[j], head)};
            score<ROWS, 1>(queries, b, scores + j * HALF);
        }
    }

    // weights (ROWS, CHUNK) times the values, 16 (or 32) numbers of the heads at a time.
    template <int ROWS, int HALVES>
    MEMBER void mix(const char *weights, const int32_t *blocks, int64_t count, int64_t head, int64_t slice,
                    const float *factors, float *mixed) const {
        vf sums[ROWS][HALVES * VECTORS];
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < HALVES * VECTORS; i++)
                sums[r][i] = load(mixed + r * wide + slice * HALF + i * WIDTH) * factors[r];
        for (int64_t j = 0; j < count; j++) {
            const char *from = values(blocks[j], head) + slice * HALF * HALF * VALUE;
            const char *const b[2] = {from, from + HALF * HALF * VALUE};
            dot_steps<Dot, ROWS, HALVES>(sums, weights + j * HALF * QUERY, CHUNK * QUERY, b, Dot::B_BYTES, HALF / DEPTHS,
                                         {nullptr, 0});
        }
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < HALVES * VECTORS; i++) store(mixed + r * wide + slice * HALF + i * WIDTH, sums[r][i]);
    }
    template <int ROWS> void mix_chunk(const char *weights, const int32_t *blocks, int64_t count, int64_t head,
                                       const float *factors, float *mixed) const {
        const int64_t slices = wide / HALF;
        int64_t slice = 0;
        for (; slice + TILE_HALVES <= slices; slice += TILE_HALVES)
            mix<ROWS, TILE_HALVES>(weights, blocks, count, head, slice, factors, mixed);
        for (; slice < slices; slice++) mix<ROWS, 1>(weights, blocks, count, head, slice, factors, mixed);
    }

    template <int ROWS>
    MEMBER void score_of(int rows, const char *queries, const int32_t *blocks, int64_t count, int64_t head,
                         float *scores, bool ask) const {
        if constexpr (ROWS == 1) {
            score_chunk<1>(queries, blocks, count, head, scores, ask);
        } else {
            if (rows == ROWS)
                score_chunk<ROWS>(queries, blocks, count, head, scores, ask);
            else
                score_of<ROWS - 1>(rows, queries, blocks, count, head, scores, ask);
        }
    }
    template <int ROWS>
    MEMBER void mix_of(int rows, const char *weights, const int32_t *blocks, int64_t count, int64_t head,
                       const float *factors, float *mixed) const {
        if constexpr (ROWS == 1) {
            mix_chunk<1>(weights, blocks, count, head, factors, mixed);
        } else {
            if (rows == ROWS)
                mix_chunk<ROWS>(weights, blocks, count, head, factors, mixed);
            else
                mix_of<ROWS - 1>(rows, weights, blocks, count, head, factors, mixed);
        }
    }

    // What one query sees of a chunk: of block j the slots low(j) .. high(j).
    struct Seen {
        int64_t position, least, begin, tokens; // `begin`: position of the chunk's first key
        int32_t high(int64_t j) const { return (int32_t)between(-1, position - begin - j * tokens, tokens - 1); }
        int32_t low(int64_t j) const { return (int32_t)between(0, least - begin - j * tokens, HALF); }
        static int64_t between(int64_t low, int64_t value, int64_t high) {
            return value < low ? low : value > high ? high : value;
        }
        bool whole(int64_t count) const {
            return tokens == HALF && least <= begin && position >= begin + count * HALF - 1;
        }
    };

    // Scores of one query become weights; the running maximum and sum move on.  Exponents have base
    // two.  Most chunks are seen as a whole and need no masks.
    MEMBER void weigh(const float *scores, int64_t count, const Seen &seen, char *weights, float *maximum, float *mass,
                      float *factor) const {
        if (seen.whole(count))
            weigh_as<false>(scores, count, seen, weights, maximum, mass, factor);
        else
            weigh_as<true>(scores, count, seen, weights, maximum, mass, factor);
    }
    template <bool MASKED>
    MEMBER void weigh_as(const float *scores, int64_t count, const Seen &seen, char *weights, float *maximum,
                         float *mass, float *factor) const {
        const float scale = engine.model.attention_scale * 1.44269504088896341f;
        vi lanes[VECTORS], shown[CHUNK / WIDTH];
        for (int i = 0; i < HALF; i++) lanes[i / WIDTH][i % WIDTH] = i;
        const vf hidden = all(-__builtin_inff());
        vf top = hidden;
        for (int64_t j = 0; j < count; j++)
            for (int i = 0; i < VECTORS; i++) {
                vf value = load(scores + j * HALF + i * WIDTH);
                if (MASKED) {
                    const vi show = (lanes[i] <= all_int(seen.high(j))) & (lanes[i] >= all_int(seen.low(j)));
                    shown[j * VECTORS + i] = show;
                    value = show ? value : hidden;
                }
                top = greater(value, top);
            }
        const float before = *maximum, chunk = greatest(top) * scale;
        const float now = chunk > before ? chunk : before;
        const vf base = all(now > -__builtin_inff() ? now : 0.0f);
        *factor = power_of_two<DEGREE>(all(before) - base)[0];
        vf sum = vf{};
        for (int64_t i = 0; i < count * VECTORS; i++) {
            vf weight = power_of_two<DEGREE>(load(scores + i * WIDTH) * scale - base);
            if (MASKED) weight = shown[i] ? weight : vf{};
            sum += weight;
            if (QUERY == 2)
                store_bf16((uint16_t *)weights + i * WIDTH, weight);
            else
                store((float *)weights + i * WIDTH, weight);
        }
        *mass = *mass * *factor + total(sum);
        *maximum = now;
    }

    void ask_for(const char *part) const {
        for (int64_t i = 0; i < part_bytes; i += 64) __builtin_prefetch(part + i, 0, 3);
    }

    // Rows first .. last - 1 of a segment, for the queries of one key-value head: those of row
    // `first` begin at `from`, and what comes of them goes to `mixed`.
    void attend(const LlmSegment &segment, int64_t first, int64_t last, int64_t head, const float *from, float *mixed,
                const Scratch &scratch) const {
        const LlmModel &model = engine.model;
        const int64_t shared = model.heads / kv_heads, queries = (last - first) * shared;
        const int64_t qkv_stride = model.layers[0].qkv.columns, mixed_stride = rounded(model.heads * dims, GROUP);
        const int64_t tokens = model.block_tokens, chunk_tokens = CHUNK_BLOCKS * tokens;
        const int32_t *blocks = engine.plan->blocks + segment.first_block;
        for (int64_t a = 0; a < queries; a++) {
            char *to = scratch.queries + a * wide * QUERY;
            put_query(to, from + a / shared * qkv_stride + a % shared * dims);
            for (int64_t d = dims; d < wide; d++) put_query(to, d, 0.0f);
            scratch.maxima[a] = -__builtin_inff();
            scratch.totals[a] = 0.0f;
        }
        memset(scratch.mixed, 0, queries * wide * sizeof(float));
        const int64_t least = layer.window ? segment.start + first - layer.window + 1 : 0;
        const int64_t block_end = (segment.start + last - 1) / tokens + 1;
        for (int64_t begin = least > 0 ? least / chunk_tokens * CHUNK_BLOCKS : 0; begin < block_end; begin += CHUNK_BLOCKS) {
            const int64_t count = block_end - begin < CHUNK_BLOCKS ? block_end - begin : CHUNK_BLOCKS;
            const int64_t tiles = (queries + TILE_ROWS - 1) / TILE_ROWS;
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t a = queries * t / tiles, rows = queries * (t + 1) / tiles - a;
                score_of<TILE_ROWS>((int)rows, scratch.queries + a * wide * QUERY, blocks + begin, count, head,
                                    scratch.scores + a * CHUNK, t == 0);
                for (int64_t i = a; i < a + rows; i++) {
                    const int64_t position = segment.start + first + i / shared;
                    const Seen seen{position, layer.window ? position - layer.window + 1 : 0, begin * tokens, tokens};
                    weigh(scratch.scores + i * CHUNK, count, seen, scratch.weights + i * CHUNK * QUERY,
                          scratch.maxima + i, scratch.totals + i, scratch.factors + i);
                }
                mix_of<TILE_ROWS>((int)rows, scratch.weights + a * CHUNK * QUERY, blocks + begin, count, head,
                                  scratch.factors + a, scratch.mixed + a * wide);
            }
        }
        for (int64_t a = 0; a < queries; a++) {
            float *to = mixed + a / shared * mixed_stride + a % shared * dims;
            for (int64_t d = 0; d < dims; d++) to[d] = scratch.mixed[a * wide + d] / scratch.totals[a];
        }
    }
};

} // namespace
