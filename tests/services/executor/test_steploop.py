"""The step thread's bookkeeping, one turn at a time and without a thread."""

from pathlib import Path

from libllm.crashnotes import CrashNote
from llmproto import limits
from llmproto.errors import ErrorKind
from llmproto.generation import Sampling
from llmservices.executor.contract import Admission, EngineConfig
from llmservices.executor.core import Engine
from llmservices.executor.costs import PromptCosts, StepCosts
from llmservices.executor.steploop import Add, Drop, Mark, Report, Resend, StepLoop
from llmservices.models.decoder import Decoder


class Table:
    """A step loop whose thread is the test."""

    def __init__(
        self,
        model: Decoder,
        tmp_path: Path,
        costs: StepCosts | None = None,
        *,
        mixed_step_ms: int | None = None,
    ) -> None:
        note = CrashNote(tmp_path / "note")
        self.engine = Engine(
            model,
            EngineConfig(
                blocks=80,
                block_tokens=4,
                residents_max=2,
                step_tokens=16,
                mixed_step_ms=mixed_step_ms,
                exact=True,
            ),
            on_plan=note.write,
        )
        self.reports: list[Report] = []
        self.working: list[int] = []
        self.broke: list[BaseException] = []
        known = StepCosts()
        known.add(32, 0.001)
        self.loop = StepLoop(
            self.engine,
            note,
            costs or known,
            report=self.reports.append,
            broke=self.broke.append,
            working=self.working.append,
        )

    def turn(self) -> list[Report]:
        """Obey, and step once if there is something to do."""
        self.reports.clear()
        self.loop._obey()
        if self.engine.runnable():
            self.loop._step()
        return self.reports

    def add(self, residency: int, prompt: int = 3, output: int = 4) -> None:
        self.loop.order(
            Add(
                Admission(
                    thread=residency.to_bytes(8),
                    residency=residency,
                    tokens=[1] * prompt,
                    prompt_tokens=prompt,
                    output_tokens_max=output,
                    sampling=Sampling(temperature=0.0, ignore_eos=True),
                )
            )
        )


def test_chunks_of_a_prefill_are_reported_though_they_propose_nothing(
    tiny: Decoder, tmp_path: Path
) -> None:
    table = Table(tiny, tmp_path)
    table.add(1, prompt=40)
    (first,) = table.turn()
    assert (first.rows, first.counters.steps) == ([], 1)
    table.turn()
    (third,) = table.turn()
    assert [row.position for row in third.rows] == [40]
    assert third.counters.rows == 40
    assert first.counters.rows == 16  # a copy, not the engine's own


def test_an_end_is_dropped_when_it_is_committed(tiny: Decoder, tmp_path: Path) -> None:
    table = Table(tiny, tmp_path)
    table.add(1, output=1)
    (report,) = table.turn()
    assert [row.end for row in report.rows] == [2]
    table.loop.order(Mark([1], [2]))
    table.turn()
    assert table.engine.residencies() == [1]
    table.loop.order(Mark([1], [3]))
    table.turn()
    assert table.engine.residencies() == []
    assert (table.loop._proposed, table.loop._ends) == ({}, {})


def test_what_failed_is_not_waited_for(poisoned: Decoder, tmp_path: Path) -> None:
    """Otherwise the thread would wake every second, for ever, to say nothing again."""
    table = Table(poisoned, tmp_path)
    admission = Admission(
        thread=bytes(8),
        residency=1,
        tokens=[1, 99],
        prompt_tokens=2,
        output_tokens_max=4,
        sampling=Sampling(temperature=0.0),
    )
    table.loop.order(Add(admission))
    (report,) = table.turn()
    assert [failure.residency for failure in report.failed] == [1]
    assert (table.loop._proposed, table.loop._prefilling) == ({}, {})


def test_refusals_are_reported(tiny: Decoder, tmp_path: Path) -> None:
    table = Table(tiny, tmp_path)
    for residency in (1, 2, 3):
        table.add(residency)
    refused, _ = table.turn()
    assert [failure.error.kind for failure in refused.failed] == [ErrorKind.EXHAUSTED]


def test_resending_says_what_is_beyond_the_watermark(tiny: Decoder, tmp_path: Path) -> None:
    table = Table(tiny, tmp_path)
    table.add(1)
    table.turn()
    table.turn()
    table.loop.order(Mark([1], [3]))
    table.loop.order(Resend())
    first, *_ = table.turn()
    assert [row.position for row in first.rows] == [4]
    table.loop.order(Drop([1]))
    table.loop.order(Resend(1, 0))
    assert table.turn() == []


def test_only_steps_that_may_take_long_are_announced(tiny: Decoder, tmp_path: Path) -> None:
    slow = StepCosts()
    slow.add(1, 0.1)
    slow.add(16, 1.6)
    table = Table(tiny, tmp_path, slow)
    table.add(1, prompt=60)
    table.turn()
    (first,) = table.working
    assert first > limits.STEP_BUDGET_MS
    table.turn()
    assert len(table.working) == 1  # what was announced covers the next one too
    assert Table(tiny, tmp_path).working == []
    quick = Table(tiny, tmp_path)
    quick.add(1, prompt=60)
    quick.turn()
    assert quick.working == []


def test_a_long_prompt_holds_up_answers_no_longer_than_wished(
    tiny: Decoder, tmp_path: Path
) -> None:
    table = Table(tiny, tmp_path, mixed_step_ms=20)
    table.add(1, output=30)
    table.turn()
    table.loop._pace = PromptCosts()
    table.loop._pace.add(0, 0.002)
    table.loop._pace.add(10, 0.022)  # 2 ms a row
    table.add(2, prompt=40)
    before = table.engine.counters.rows
    table.turn()
    assert table.engine.counters.rows - before == 1 + 9
