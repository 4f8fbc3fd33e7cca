"""What an encoder's thread must look like to be admitted: pure checks of a ThreadSpawn.

Every refusal is INVALID and names both numbers (or both tasks).
"""

from llmproto.errors import invalid
from llmproto.models import ModelEntry
from llmproto.threads import ThreadSpawn


def check_task(spawn: ThreadSpawn, model: ModelEntry) -> None:
    """INVALID unless the model does what the thread wants."""
    generates = model.task == "generate"
    if generates and spawn.lengths:
        raise invalid(
            f"{spawn.model!r} generates text (its task is 'generate'); vectors and scores come "
            "from a model whose task is 'embed', 'classify' or 'regress'"
        )
    if not generates and not spawn.lengths:
        raise invalid(
            f"{spawn.model!r} generates no text: its task is {model.task!r}; text comes from a "
            "model whose task is 'generate'"
        )


def check_lengths(spawn: ThreadSpawn, context: int) -> None:
    """INVALID unless the inputs add up and each fits the model."""
    tokens, inputs = len(spawn.tokens) // 4, len(spawn.lengths)
    if sum(spawn.lengths) != tokens or spawn.output_tokens_max:
        raise invalid(
            f"{inputs} inputs of {sum(spawn.lengths)} tokens together, {tokens} tokens were sent, "
            f"{spawn.output_tokens_max} are to be generated: the first two must be equal, the last "
            "0"
        )
    longest = max(spawn.lengths)
    if longest > context:
        at = spawn.lengths.index(longest)
        raise invalid(
            f"input {at} has {longest} tokens; {spawn.model!r} takes {context} here: shorten it, "
            "or allow truncation"
        )
    pairs = spawn.pair_at
    if pairs and (
        len(pairs) != inputs or any(at > length for at, length in zip(pairs, spawn.lengths))
    ):
        raise invalid(f"pair_at names {len(pairs)} places for {inputs} inputs, or one outside")
