"""What people read of a running job."""

import msgspec
from libllm.cli.progress import Following
from llmproto.jobs import JobFound, JobState, StepReport

from .conftest import JOB_ROW


def test_the_line() -> None:
    following = Following()
    assert following.line() == ""
    reports = [StepReport(step, 2.0 / step, tokens=500, ms=50.0) for step in (1, 2)]
    row = msgspec.structs.replace(JOB_ROW, share=0.25, doing="saving", steps_total=202)
    assert following.take(JobFound(row, reports)) == []
    assert following.line() == (
        "bot  step 2/202  loss 1.0000  10,000 tokens/s  ETA 10s  share 25%  saving"
    )


def test_a_job_that_waits() -> None:
    following = Following()
    following.take(JobFound(msgspec.structs.replace(JOB_ROW, state=JobState.WAITING, step=0), []))
    assert following.line() == "bot  waiting  step 0/4"


def test_remarks() -> None:
    following = Following()
    following.take(JobFound(JOB_ROW, []))
    row = msgspec.structs.replace(JOB_ROW, attempts=2, checkpoint_step=1)
    reports = [StepReport(3, 1.0, metrics={"b": 2.0, "a": 1.0}, difference=1e-6)]
    assert following.take(JobFound(row, reports)) == [
        "attempt 2: goes on from step 1",
        "step 3: a 1.0000, b 2.0000",
        "step 3: differs by 1e-06 from what was reported before",
    ]
