"""A trace replayed on servers in turn: a real system, and one that is not there."""

import asyncio
from pathlib import Path

import llmservices.models
import pytest
from libllm.bench.compare.load import (
    give_up_s,
    load,
    loads_of,
    parser,
    servers_of,
    speeds_of,
)
from libllm.bench.serve.drive import drive
from libllm.bench.serve.servers import Clock
from libllm.bench.serve.timeline import Limits, Timeline
from libllm.bench.serve.workload import Ask
from llmproto.errors import RemoteError

EMBEDDED = Path(llmservices.models.__file__).parent / "embedded"
ROWS = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.0000000,40,4
2023-11-16 18:15:46.0500000,2000,3
2023-11-16 18:15:46.1000000,20,2
2023-11-16 18:15:56.0000000,20,2
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "azure.csv"
    path.write_text(ROWS)
    return path


def test_speeds_are_numbers_above_zero() -> None:
    assert speeds_of("0.5,2") == [0.5, 2.0]
    for text in ("", "x", "0", "1,-1"):
        with pytest.raises(Exception, match="above 0"):
            speeds_of(text)


def test_a_load_is_what_arrives_in_its_time(trace: Path) -> None:
    said = parser().parse_args(
        ["folder", "--azure", str(trace), "--speeds", "1,2", "--seconds", "5", "--prompt-max", "64"]
    )
    loads = loads_of(said)
    assert [len(ask.prompt) for ask in loads[1.0]] == [40, 64, 20]
    assert len(loads[2.0]) == 3  # the fourth comes when the time is over
    said.azure.write_text(ROWS.splitlines()[0] + "\n")
    with pytest.raises(RemoteError, match="no row within"):
        loads_of(said)


def test_nothing_that_keeps_its_limits_is_given_up() -> None:
    asks = [Ask(0, 1.0, [1], 101), Ask(1, 5.0, [1], 1)]
    assert give_up_s(asks, Limits("both", 2000, 100)) == pytest.approx(1.0 + 2.0 + 10.0 + 1.0)


class Silent:
    """A server that answers the first request alone."""

    async def answer(self, ask: Ask, line: Timeline, clock: Clock) -> None:
        if ask.number:
            await asyncio.Event().wait()
        line.arrivals_s.append(clock())
        line.output_tokens = 1

    async def close(self) -> None:
        """Nothing is open."""


async def test_what_is_unanswered_in_the_end_has_failed() -> None:
    asks = [Ask(number, 0.0, [1], 1) for number in range(3)]
    begin_s = asyncio.get_running_loop().time()
    lines = await drive(Silent(), asks, concurrency=None, begin_s=begin_s, give_up_s=0.01)
    assert sorted((line.number, line.error) for line in lines) == [
        (0, ""),
        (1, "given up"),
        (2, "given up"),
    ]


async def test_a_real_system_and_a_server_that_is_not_there(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = parser().parse_args(
        [
            *(str(EMBEDDED), "--azure", str(trace), "--seconds", "1", "--speeds", "1"),
            *("--prompt-max", "64", "--vocabulary", "200", "--vllm", str(tmp_path / "python")),
        ]
    )
    (run,) = await load(servers_of(said), loads_of(said), said.seconds, said.vocabulary)
    assert "skipped: vllm" in capsys.readouterr().err
    assert (run.server, run.ours, run.speed, run.sent_per_s) == ("llmos", True, 1.0, 3.0)
    assert (run.summary.requests, run.summary.failed) == (3, 0)
    assert (run.summary.prompt_tokens, run.summary.output_tokens) == (124, 9)
