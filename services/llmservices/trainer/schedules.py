"""How the learning rate moves: pure functions of the step.

The formulas are those of transformers' schedulers, counted alike: step 0 is the first optimiser
step, and warm-up starts at rate 0 there.
"""

import math

from llmproto.recipes import TrainingRecipe

INVERSE_SQRT_STEPS = 10_000
"""Time scale of `inverse_sqrt` without warm-up."""


def rate(recipe: TrainingRecipe, step: int, steps_total: int) -> float:
    """The rate of optimiser step `step`, counted from 0."""
    warmup, peak = recipe.warmup_steps, recipe.learning_rate
    if step < warmup:
        return peak * step / max(1, warmup)
    left = max(1, steps_total - warmup)
    lowest = recipe.learning_rate_min
    match recipe.schedule:
        case "constant":
            return peak
        case "linear":
            return lowest + (peak - lowest) * max(0.0, (steps_total - step) / left)
        case "cosine":
            done = min(1.0, (step - warmup) / left)
            return lowest + (peak - lowest) * (1.0 + math.cos(math.pi * done)) / 2
        case "inverse_sqrt":
            scale = warmup or INVERSE_SQRT_STEPS
            return float(peak / math.sqrt((step - warmup + scale) / scale))
