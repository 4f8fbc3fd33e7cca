"""Jobs for programs without an event loop: the same methods as the asynchronous ones."""

from collections.abc import Generator

from llmproto.jobs import JobFound, JobRow, StepReport

from libllm.jobs import AsyncJob, JobResult
from libllm.loopthread import LoopThread


class Job:
    """One job.  Leaving it, or the program, does not end it: `cancel` does."""

    def __init__(self, loop: LoopThread, job: AsyncJob) -> None:
        """Made by `train`, `evaluate` and `job` of the client."""
        self._loop = loop
        self._job = job

    def __repr__(self) -> str:
        return f"<Job {self.id.hex()}>"

    @property
    def id(self) -> bytes:
        """Names it, also for other programs and `llmos attach`."""
        return self._job.id

    def row(self) -> JobRow:
        """Where it stands."""
        return self._loop.run(self._job.row())

    def result(self) -> JobResult:
        """Its end, waited for; RemoteError where it failed or was cancelled."""
        return self._loop.run(self._job.result())

    def watch(self, after_step: int = 0) -> Generator[JobFound, None, None]:
        """What is new, as it comes: `reports` of later steps, each step once, and the `row`; the
        last one tells the end."""
        watching = self._job.watch(after_step)

        async def following() -> JobFound | None:
            return await anext(watching, None)

        while (found := self._loop.run(following())) is not None:
            yield found

    def reports(self) -> list[StepReport]:
        """The steps that the kernel still keeps."""
        return self._loop.run(self._job.reports())

    def stop(self) -> None:
        """Save what it has, and leave the device, until `resume`."""
        self._loop.run(self._job.stop())

    def resume(self) -> None:
        """Undo `stop`."""
        self._loop.run(self._job.resume())

    def cancel(self) -> None:
        """End it for good; its versions stay."""
        self._loop.run(self._job.cancel())

    def renice(self, priority: int, *, service_class: int | None = None) -> None:
        """Change its priority, -8 to 7: higher runs first within its class."""
        self._loop.run(self._job.renice(priority, service_class=service_class))
