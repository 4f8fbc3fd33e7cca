"""A job on the screen: what its reports come to, and the live view.

`Following` is pure: rows and reports in, text out.
"""

import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from llmproto.jobs import JobFound, JobKind, JobRow, JobState, StepReport

from libllm.cli.output import console, duration, print_json

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from libllm.cli.system import Running

RECENT: Final = 50
"""Steps that rates are taken from: some seconds, so that they are steady and not stale."""
PLAIN_S: Final = 2.0
"""Between two lines where the output is no terminal."""


class Following:
    """What is known of a job from its reports so far."""

    def __init__(self) -> None:
        self._recent: deque[StepReport] = deque(maxlen=RECENT)
        self.row: JobRow | None = None

    def take(self, found: JobFound) -> list[str]:
        """The next look; gives the remarks that stay on the screen."""
        remarks = []
        known, self.row = self.row, found.row
        if known is not None and found.row.attempts > known.attempts > 0:
            remarks.append(
                f"attempt {found.row.attempts}: goes on from step {found.row.checkpoint_step}"
            )
        for report in found.reports:
            self._recent.append(report)
            if report.metrics:
                remarks.append(f"step {report.step}: {metrics_line(report.metrics)}")
            if report.difference:
                remarks.append(
                    f"step {report.step}: differs by {report.difference:.3g} from what was "
                    "reported before"
                )
        return remarks

    @property
    def tokens_per_second(self) -> float | None:
        """Of the recent steps."""
        ms = sum(report.ms for report in self._recent)
        tokens = sum(report.tokens for report in self._recent)
        return tokens / ms * 1000 if ms > 0 and tokens else None

    @property
    def eta_ms(self) -> int | None:
        """At the recent steps' pace."""
        row = self.row
        if row is None or not self._recent or row.steps_total <= row.step:
            return None
        pace_ms = sum(report.ms for report in self._recent) / len(self._recent)
        return round((row.steps_total - row.step) * pace_ms)

    def line(self) -> str:
        """Where it stands: step, loss, tokens/s, ETA, share."""
        row = self.row
        if row is None:
            return ""
        parts = [row.name]
        if row.state is not JobState.RUNNING:
            parts.append(row.state.value)
        total = f"/{row.steps_total}" if row.steps_total else ""
        parts.append(f"step {row.step}{total}")
        if self._recent and row.kind is JobKind.TRAIN:
            parts.append(f"loss {self._recent[-1].loss:.4f}")
        rate = self.tokens_per_second
        if rate is not None:
            parts.append(f"{rate:,.0f} tokens/s")
        if self.eta_ms is not None and row.state not in OVER:
            parts.append(f"ETA {duration(self.eta_ms)}")
        if row.share < 1.0:
            parts.append(f"share {row.share:.0%}")
        if row.doing:
            parts.append(row.doing)
        return "  ".join(parts)


OVER: Final = (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


def metrics_line(metrics: dict[str, float]) -> str:
    """`accuracy 0.8750, loss 0.4312`."""
    return ", ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))


def follow(job: "Running", *, json: bool) -> JobRow:
    """Show the job until its end; gives its last row.  Ctrl-C comes out as KeyboardInterrupt."""
    looks = job.watch()
    if json:
        return _follow_json(looks)
    if sys.stdout.isatty():
        return _follow_live(looks)
    return _follow_plain(looks)


def _follow_json(looks: "Iterable[JobFound]") -> JobRow:
    row = None
    for found in looks:
        row = found.row
        print_json(found)
    assert row is not None
    return row


def _follow_plain(looks: "Iterable[JobFound]") -> JobRow:
    following = Following()
    shown_s: float | None = None
    for found in looks:
        remarks = following.take(found)
        for remark in remarks:
            print(remark, flush=True)
        now_s = time.monotonic()
        if shown_s is None or now_s - shown_s >= PLAIN_S or found.row.state in OVER:
            shown_s = now_s
            print(following.line(), flush=True)
    assert following.row is not None
    return following.row


def _follow_live(looks: "Iterable[JobFound]") -> JobRow:
    from rich.progress import BarColumn, Progress, TextColumn

    following = Following()
    columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console(), transient=False) as progress:
        task = progress.add_task("starting", total=None)
        for found in looks:
            for remark in following.take(found):
                progress.print(remark)
            _draw(progress, task, following, found.row)
    assert following.row is not None
    return following.row


def _draw(progress: "Progress", task: "TaskID", following: Following, row: JobRow) -> None:
    progress.update(
        task,
        description=following.line(),
        total=row.steps_total or None,
        completed=row.step,
    )
