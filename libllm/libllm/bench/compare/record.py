"""What a comparison measured, as it is written to a file and read again.  Pure."""

from pathlib import Path

import msgspec
from llmproto.errors import invalid

from libllm.bench.serve.timeline import Summary


class Compared(msgspec.Struct, frozen=True, tag="compare"):
    """`llmos bench compare`."""

    bits: dict[str, int]
    """Of a weight, by peer."""
    versions: dict[str, str]
    ours: list[str]
    """Which of the peers are this system."""
    tokens_per_s: dict[str, dict[str, list[float]]]
    """By case and peer; what one round measured stands at the same place in every list."""
    weight_bytes: int
    """Of the model folder: what a step for one stream reads, at least."""
    read_bytes_per_s: list[float] = []
    """Measured right before and after one stream of `llmos`, round by round."""
    first_token_s: dict[str, float] = {}
    """Of ours: from a request for a model that is not loaded to its first token."""
    resident_bytes: dict[str, int] = {}
    """Of our executors, after the case of the most streams, in the first round."""
    kv_bytes: int = 0
    """What all tokens that `llmos` had computed by then take: no prompt comes twice, and a cache
    remembers them until somebody needs the room."""


class Loaded(msgspec.Struct, frozen=True):
    """One server under one load."""

    server: str
    ours: bool
    speed: float
    """Of the trace."""
    kept_per_s: float
    """Requests that kept both limits, for each second in which requests were sent."""
    sent_per_s: float
    summary: Summary


class Mixed(msgspec.Struct, frozen=True, tag="load"):
    """`llmos bench load`."""

    runs: list[Loaded]


class Prefixes(msgspec.Struct, frozen=True, tag="prefixes"):
    """`llmos bench prefixes`."""

    rows: int
    prompt_tokens: int
    cached_tokens: int
    """Not computed, as the executor counts."""
    reusable_tokens: int
    """By a cache without bounds."""
    reusable_here_tokens: int
    """By one of this cache's size that forgets what was not used for longest."""
    cache_tokens: int
    ttft_ms: dict[str, float]
    """Median, by the share of the prompt that could be reused."""
    counts: dict[str, int]
    """Rows of each share."""
    hit_over_miss: float | None
    failed: int = 0


Record = Compared | Mixed | Prefixes
_DECODER: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def read(path: Path) -> Record:
    """A file that one of them wrote with --json."""
    try:
        return _DECODER.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise invalid(f"{path}: no record of a measurement ({error})") from None
