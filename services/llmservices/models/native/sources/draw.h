// Drawing tokens from rows of logits by the rule of the executor's `sampler.py`, where the outcome
// is beyond doubt.
//
// The rule itself stands there, in single precision by torch.  Here the same numbers are bounded or
// found in double precision; where two outcomes are nearer to each other than the rounding of either
// way may reach, no token is given and the rule decides.  So the tokens are the same by both ways.
#pragma once
#include "engine.h"
#include "vectors.h"

#include <algorithm>

namespace {

constexpr double DOUBT = 1e-4;         // of a value with its noise, beside DOUBT_RELATIVE of it
constexpr double DOUBT_RELATIVE = 1e-6;
constexpr double DOUBT_MASS = 1e-5;    // of a share of the probability
constexpr float NEVER = -__builtin_inff();

struct Candidate {
    float value; // logit over temperature
    int32_t token;
    bool doubtful; // whether the filters leave it
    bool operator<(const Candidate &other) const { // ahead in the ranking
        return value > other.value || (value == other.value && token < other.token);
    }
};

// MurmurHash3's finaliser.
template <class T> INLINE T mixed(T word) {
    word ^= word >> 16;
    word *= 0x85ebca6bu;
    word ^= word >> 13;
    word *= 0xc2b2ae35u;
    return word ^ (word >> 16);
}
template <class T> INLINE T noise_bits(T hashed, const LlmDraw &draw) {
    return mixed((mixed(hashed) ^ draw.first) * (draw.second | 1u)) ^ 0x80000000u;
}

double noise(int32_t token, const LlmDraw &draw) {
    const double uniform = (noise_bits((uint32_t)token * 0x9e3779b1u, draw) + 0.5) * 0x1p-32;
    return -__builtin_log(-__builtin_log1p(-(uniform < 1 - 0x1p-24 ? uniform : 1 - 0x1p-24)));
}

// The best of what was looked at, and by how much.
struct Winner {
    double best = -__builtin_inf(), second = -__builtin_inf();
    int32_t token = -1;
    bool doubtful = false;
    void look(double value, int32_t candidate, bool doubt) {
        if (value > best) {
            second = best, best = value, token = candidate, doubtful = doubt;
        } else if (!(value <= second)) {
            second = value;
        }
    }
    double margin() const { return DOUBT + DOUBT_RELATIVE * __builtin_fabs(best); }
    int32_t surely() const { return best - second > 2 * margin() && !doubtful ? token : -1; }
};

struct Drawing {
    const LlmDraw &draw;
    const int64_t vocab;
    Candidate *const held;
    const float inverse; // of the temperature
    int64_t count = 0;
    float top_logit = NEVER, top = NEVER; // the greatest, and it over temperature

    // Logits from a token on; behind the last token there is none.
    MEMBER vf logits(int64_t token) const {
        const vf value = load(draw.logits + token);
        if (token + WIDTH <= vocab) return value;
        vi lanes;
        for (int i = 0; i < WIDTH; i++) lanes[i] = i;
        return lanes < all_int((int32_t)(vocab - token)) ? value : all(NEVER);
    }
    // How far below the greatest, in natural logarithms of the chance.
    MEMBER vf below_top(int64_t token) const { return (logits(token) - top_logit) * inverse; }
    // Holds those of the next WIDTH tokens that `wanted` takes, by logit over temperature and by how far below.
    template <class Wanted> MEMBER void hold(int64_t token, const Wanted &wanted) {
        for (int64_t id = token; id < token + WIDTH && id < vocab; id++) {
            const float value = draw.logits[id] / draw.temperature;
            if (wanted(value, (draw.logits[id] - top_logit) * inverse)) held[count++] = {value, (int32_t)id, false};
        }
    }
    // A logit below this is below `value` when it is divided by the temperature.
    vf logit_of(float value) const {
        const float product = value * draw.temperature;
        return all(product - __builtin_fabsf(product) * 1e-6f - 1e-30f);
    }
    INLINE bool any(vi mask) {
#if defined(HAS_VNNI)
        return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#else
        int32_t found = 0;
        for (int i = 0; i < WIDTH; i++) found |= mask[i];
        return found;
#endif
    }

    // Looks at all that are not further below the greatest than `floor`, where there is one.
    // Gumbel noise is below -log(u), and that below what the bits of the float u say as they stand.
    template <bool FLOOR> void among_all(Winner &winner, float floor) const {
        vu hashed;
        for (int i = 0; i < WIDTH; i++) hashed[i] = (uint32_t)i * 0x9e3779b1u;
        const float log_2 = 0.693147180559945309f;
        float bar = NEVER;
        for (int64_t token = 0; token < vocab; token += WIDTH, hashed += WIDTH * 0x9e3779b1u) {
            const vf uniform = __builtin_convertvector(noise_bits(hashed, draw), vf) + 0.5f;
            vi bits;
            memcpy(&bits, &uniform, sizeof bits);
            const vf bound = load(draw.logits + token) * inverse - to_float(bits) * (log_2 * 0x1p-23f);
            vi wanted = ~(bound < all(bar));
            if (FLOOR) wanted &= below_top(token) >= all(floor);
            if (!any(wanted)) continue;
            for (int i = 0; i < WIDTH && token + i < vocab; i++)
                if (wanted[i] && !(bound[i] < bar)) {
                    const int32_t id = (int32_t)(token + i);
                    winner.look((double)(draw.logits[id] / draw.temperature) + noise(id, draw), id, false);
                    bar = (float)(winner.best - 4 * winner.margin()) - log_2 * (32 + 127);
                }
        }
    }

    // The `draw.top_k` first of the ranking.
    void keep_first() {
        float least = NEVER;
        for (int64_t token = 0; token < vocab; token += WIDTH) {
            if (!any(logits(token) >= logit_of(least))) continue;
            hold(token, [least](float value, float) { return value > least; });
            if (count > LLM_CANDIDATES - WIDTH) least = cut_first();
        }
        cut_first();
    }
    float cut_first() {
        if (count <= draw.top_k) return NEVER;
        std::nth_element(held, held + draw.top_k - 1, held + count);
        count = draw.top_k;
        return held[count - 1].value;
    }

    // The mass, relative to the greatest's, of all that are not further below it than `floor`, and how many they are.
    double mass_from(float floor, int64_t *tokens) const {
        double mass = 0;
        *tokens = 0;
        for (int64_t begin = 0; begin < vocab; begin += 64 * WIDTH) {
            vf sum = vf{};
            vi kept = vi{};
            for (int64_t token = begin; token < vocab && token < begin + 64 * WIDTH; token += WIDTH) {
                const vf below = below_top(token);
                const vi wanted = below >= all(floor);
                if (!any(wanted)) continue;
                const vf chance = power_of_two<6>(below * 1.44269504088896341f);
                sum += wanted ? chance : vf{};
                kept -= wanted;
            }
            mass += total(sum);
            *tokens += total_int(kept);
        }
        return mass;
    }

    // Holds what stands around the end of the nucleus; what is above `floor` is in it.
    struct Nucleus {
        double whole, before; // mass: of all, and above `floor`
        float floor;          // below zero, or infinite for none; zero: in doubt
    };
    Nucleus keep_nucleus() {
        int64_t above = 0, from = 0;
        Nucleus nucleus{mass_from(-80, &from), 0, __builtin_inff()};
        const double reached = nucleus.whole * (draw.top_p + 2 * DOUBT_MASS);
        const double within = nucleus.whole * (draw.top_p - 2 * DOUBT_MASS);
        float low = -80, step = 3;
        // Down in steps while the mass is not reached, then by halves while too many stand between.
        for (float next = -step; next > low; next -= step *= 2) {
            int64_t tokens;
            const double mass = mass_from(next, &tokens);
            if (mass > reached) {
                low = next, from = tokens;
                break;
            }
            if (tokens > LLM_CANDIDATES / 4 && mass < within) nucleus.floor = next, nucleus.before = mass, above = tokens;
        }
        while (from - above > LLM_CANDIDATES - WIDTH) {
            const float middle = ((nucleus.floor < 0 ? nucleus.floor : 0) + low) / 2;
            int64_t tokens;
            const double mass = mass_from(middle, &tokens);
            if (mass > reached && middle > low)
                low = middle, from = tokens;
            else if (mass < within && middle < nucleus.floor)
                nucleus.floor = middle, nucleus.before = mass, above = tokens;
            else
                return {nucleus.whole, 0, 0}; // too many equals
        }
        const float high = nucleus.floor;
        for (int64_t token = 0; token < vocab; token += WIDTH) {
            const vf below = below_top(token);
            if (any((below >= all(low)) & (below < all(high))))
                hold(token, [low, high](float, float below) { return below >= low && below < high; });
        }
        return nucleus;
    }
    double mass_held() const {
        double mass = 0;
        for (int64_t i = 0; i < count; i++) mass += __builtin_exp((double)held[i].value - top);
        return mass;
    }

    // The first of those held that reach `draw.top_p` of the mass, `before` being ahead of them.
    void cut_nucleus(double mass, double before) {
        int64_t kept = 0;
        for (; kept < count && before < mass * (draw.top_p + DOUBT_MASS); kept++) {
            held[kept].doubtful = before > mass * (draw.top_p - DOUBT_MASS) && before > 0;
            before += __builtin_exp((double)held[kept].value - top);
        }
        count = kept;
    }

    void cut_unlikely() {
        const double least = (double)top + __builtin_log(draw.min_p);
        int64_t kept = 0;
        for (int64_t i = 0; i < count; i++) {
            if (held[i].value < least - DOUBT) continue;
            held[kept] = held[i];
            held[kept++].doubtful |= held[i].value < least + DOUBT;
        }
        count = kept;
    }

    void find_top() {
        vf most = all(NEVER);
        for (int64_t token = 0; token < vocab; token += WIDTH) most = greater(logits(token), most);
        top_logit = greatest(most);
        top = top_logit / draw.temperature;
    }

    int32_t token() {
        const bool some = draw.top_k > 0 && draw.top_k < vocab, nucleus = draw.top_p < 1, likely = draw.min_p > 0;
        Winner winner;
        if (!some && !nucleus && !likely) {
            among_all<false>(winner, 0);
            return winner.surely();
        }
        find_top();
        if (!(__builtin_fabsf(top) < 1e30f) || (some && draw.top_k > LLM_CANDIDATES / 2)) return -1;
        float floor = __builtin_inff();
        if (some) {
            keep_first();
        } else if (!nucleus) {
            floor = (float)(__builtin_log(draw.min_p) - DOUBT);
        }
        if (nucleus) {
            const Nucleus all_of = some ? Nucleus{mass_held(), 0, floor} : keep_nucleus();
            floor = all_of.floor;
            if (floor == 0) return -1;
            std::sort(held, held + count);
            cut_nucleus(all_of.whole, all_of.before);
        }
        if (floor <= 0) among_all<true>(winner, floor);
        if (likely) {
            cut_unlikely();
            // The winner of more than the filter leaves wins among those, if it is one of them.
            if (winner.token >= 0 && draw.logits[winner.token] / draw.temperature < top + __builtin_log(draw.min_p) + DOUBT)
                winner.doubtful = true;
        }
        for (int64_t i = 0; i < count; i++)
            winner.look(held[i].value + noise(held[i].token, draw), held[i].token, held[i].doubtful);
        return winner.surely();
    }
};

void draw_on_thread(void *argument, int thread) {
    LlmEngine *engine = (LlmEngine *)argument;
    for (;;) {
        const int64_t at = __atomic_fetch_add(engine->counters, 1, __ATOMIC_RELAXED);
        if (at >= engine->draw_count) return;
        LlmDraw &draw = engine->draws[at];
        Drawing drawing{draw, engine->model.vocab, (Candidate *)engine->scratch[thread].candidates,
                        1.0f / draw.temperature};
        draw.token = drawing.token();
    }
}

} // namespace
