"""`llmos bench goals FILE...`: what the measurements come to, against what is wanted.

llmos bench compare -- FOLDER ... --json > llama.json
llmos bench goals -- llama.json vllm.json load.json prefixes.json

Ratios are taken within one record, round by round, our best precision that the goal admits over
each peer that it admits; over several records the peer counts that is hardest to beat.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
from llmproto.errors import RemoteError
from rich.console import Console
from rich.table import Table

from libllm.bench.compare.cases import Result, results
from libllm.bench.compare.record import Compared, Loaded, Mixed, Prefixes, Record, read

BANDWIDTH_SHARE: Final = 0.9
GAUGED_CASE: Final = "decode-1"
GAUGED_PEER: Final = "llmos"
"""Whose rate is compared with the speed at which memory is read."""
LOAD_RATIO: Final = 1.3
REUSED_SHARE: Final = 0.9
HIT_OVER_MISS: Final = 0.2
FIRST_TOKEN_S: Final = 3.0
RESIDENT_FACTOR: Final = 1.15
RESIDENT_EXTRA_BYTES: Final = 400_000_000


class Goal(msgspec.Struct, frozen=True):
    """One case at comparable precisions."""

    case: str
    bits_min: int
    bits_max: int
    must: float
    aim: float
    engines: tuple[str, ...] = ("llama.cpp", "vllm", "openvino", "transformers")

    @property
    def name(self) -> str:
        bits = f"{self.bits_min} bits" if self.bits_max == self.bits_min else "8 bits or more"
        return f"{self.case}, {bits}"

    def admits(self, peer: str, bits: int, *, ours: bool) -> bool:
        """Whether that peer's figure is comparable."""
        known = ours or peer.startswith(self.engines)
        return known and self.bits_min <= bits <= self.bits_max


GOALS: Final = (
    Goal("decode-1", 16, 16, 1.0, 1.05, ("llama.cpp", "vllm")),
    Goal("decode-1", 4, 4, 1.15, 1.15, ("llama.cpp",)),
    Goal("decode-8", 8, 32, 1.2, 1.5),
    Goal("decode-32", 8, 32, 1.15, 1.4),
    Goal("prefill-512", 8, 32, 1.0, 1.15),
    Goal("prefill-2048", 8, 32, 1.0, 1.15),
)


def wanted(case: str, peer: str, bits: int, *, ours: bool) -> bool:
    """Whether a goal compares it; a case of no goal is always wanted."""
    about = [goal for goal in GOALS if goal.case == case]
    return not about or any(goal.admits(peer, bits, ours=ours) for goal in about)


class Line(msgspec.Struct, frozen=True):
    """One goal and what was measured."""

    goal: str
    must: str
    measured: str
    kept: bool


def lines(records: Sequence[Record]) -> list[Line]:
    """Of every goal that was measured."""
    compared = [one for one in records if isinstance(one, Compared)]
    found = [line for goal in GOALS for line in _speed(goal, compared)]
    found += [line for one in compared for line in _beside(one)]
    for one in records:
        if isinstance(one, Mixed):
            found += _load(one.runs)
        elif isinstance(one, Prefixes):
            found += _prefixes(one)
    return found


def hardest(goal: Goal, record: Compared) -> tuple[str, str, Result] | None:
    """Our best, the peer that comes closest to it or passes it, and their ratio; None where the
    record does not hold both."""
    rates = {
        name: values
        for name, values in record.tokens_per_s.get(goal.case, {}).items()
        if values and goal.admits(name, record.bits[name], ours=name in record.ours)
    }
    mine = [name for name in rates if name in record.ours]
    if not mine or len(mine) == len(rates):
        return None
    best = max(mine, key=lambda name: statistics.median(rates[name]))
    theirs = {name: values for name, values in rates.items() if name not in mine}
    by_peer = results({best: rates[best], **theirs}, best)
    peer = min(theirs, key=lambda name: by_peer[name].ratio or 0.0)
    return best, peer, by_peer[peer]


def _speed(goal: Goal, records: Sequence[Compared]) -> Iterator[Line]:
    found = [best for record in records if (best := hardest(goal, record)) is not None]
    if not found:
        return
    ours, peer, one = min(found, key=lambda each: each[2].ratio or 0.0)
    assert one.ratio is not None
    yield Line(
        goal.name,
        f">= {goal.must:.2f} x (aim {goal.aim:.2f})",
        f"{one.ratio:.2f} x ({one.ratio_low:.2f}-{one.ratio_high:.2f}), {ours} over {peer}",
        one.ratio >= goal.must,
    )


def bandwidth_shares(record: Compared) -> list[float]:
    """Of the read bandwidth measured beside it, what the checkpoint's own precision used to decode
    one stream, round by round."""
    rates = record.tokens_per_s.get(GAUGED_CASE, {}).get(GAUGED_PEER, [])
    return [
        rate * record.weight_bytes / bandwidth
        for rate, bandwidth in zip(rates, record.read_bytes_per_s)
    ]


def _beside(record: Compared) -> Iterator[Line]:
    shares = bandwidth_shares(record)
    if shares:
        share = statistics.median(shares)
        spread = f"({100 * min(shares):.0f}-{100 * max(shares):.0f})"
        read_gb = statistics.median(record.read_bytes_per_s) / 1e9
        measured = f"{100 * share:.0f} % {spread} of {read_gb:.1f} GB/s"
        wanted_share = f">= {100 * BANDWIDTH_SHARE:.0f} %"
        yield Line("decode-1, read bandwidth", wanted_share, measured, share >= BANDWIDTH_SHARE)
    if "llmos" in record.first_token_s:
        first_s = record.first_token_s["llmos"]
        yield Line(
            "first token, model not loaded",
            f"<= {FIRST_TOKEN_S:.1f} s",
            f"{first_s:.2f} s",
            first_s <= FIRST_TOKEN_S,
        )
    if "llmos" in record.resident_bytes:
        size = record.resident_bytes["llmos"]
        most = RESIDENT_FACTOR * (record.weight_bytes + record.kv_bytes) + RESIDENT_EXTRA_BYTES
        yield Line(
            "executor RSS, most streams",
            f"<= {most / 1e6:.0f} MB",
            f"{size / 1e6:.0f} MB",
            size <= most,
        )


def _load(runs: Sequence[Loaded]) -> Iterator[Line]:
    theirs = [run for run in runs if not run.ours]
    if not theirs:
        return
    peak = max(theirs, key=lambda run: run.kept_per_s)
    same = [run for run in runs if run.ours and run.speed == peak.speed]
    if not same or not peak.kept_per_s:
        return
    best = max(same, key=lambda run: run.kept_per_s)
    ratio = best.kept_per_s / peak.kept_per_s
    yield Line(
        f"mixed load, trace at {peak.speed:g} x",
        f">= {LOAD_RATIO:.2f} x",
        f"{ratio:.2f} x: {best.server} {best.kept_per_s:.3f}/s, "
        f"{peak.server} {peak.kept_per_s:.3f}/s of {peak.sent_per_s:.3f}/s",
        ratio >= LOAD_RATIO,
    )


def _prefixes(record: Prefixes) -> Iterator[Line]:
    for name, most in (
        ("all", record.reusable_tokens),
        (f"of a cache of {record.cache_tokens} tokens", record.reusable_here_tokens),
    ):
        share = record.cached_tokens / max(most, 1)
        yield Line(
            f"prefix tokens not computed again, {name}",
            f">= {100 * REUSED_SHARE:.0f} %",
            f"{100 * share:.1f} % of {most}",
            share >= REUSED_SHARE,
        )
    if record.hit_over_miss is not None:
        yield Line(
            "time to first token, hits over misses",
            f"<= {HIT_OVER_MISS:.2f}",
            f"{record.hit_over_miss:.3f}",
            record.hit_over_miss <= HIT_OVER_MISS,
        )


def table(found: Sequence[Line]) -> Table:
    """For people."""
    made = Table()
    for head in ("goal", "must", "measured", ""):
        made.add_column(head)
    for line in found:
        made.add_row(line.goal, line.must, line.measured, "kept" if line.kept else "missed")
    return made


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="llmos bench goals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("records", type=Path, nargs="+", metavar="FILE")
    try:
        found = lines([read(path) for path in parser.parse_args().records])
    except RemoteError as error:
        sys.exit(f"llmos bench goals: {error.kind.value}: {error.detail}")
    Console().print(table(found))


if __name__ == "__main__":
    main()
