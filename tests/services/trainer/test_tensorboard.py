"""Curves for people, read by TensorBoard's own reader."""

from pathlib import Path
from typing import Any

from llmproto.jobs import StepReport
from llmservices.trainer.tensorboard import Board
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def report(step: int, **metrics: float) -> StepReport:
    norm = None if step == 1 else 0.5
    return StepReport(step, 2.0 / step, learning_rate=1e-3, gradient_norm=norm, metrics=metrics)


def curves(folder: Path) -> dict[str, dict[int, float]]:
    reader: Any = EventAccumulator  # Any: the library has no types
    found = reader(str(folder)).Reload()
    return {
        name: {each.step: each.value for each in found.Scalars(name)}
        for name in found.Tags()["scalars"]
    }


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    board = Board(tmp_path, 0)
    for each in (report(1), report(2, accuracy=0.75)):
        board.add(each)
    board.close()
    found = curves(tmp_path)
    assert found["train/loss"] == {1: 2.0, 2: 1.0}
    assert found["train/gradient_norm"] == {2: 0.5}
    assert found["validation/accuracy"] == {2: 0.75}
    assert found["train/learning_rate"].keys() == {1, 2}


def test_steps_that_are_computed_again_stand_there_once(tmp_path: Path) -> None:
    first = Board(tmp_path, 0)
    for step in (1, 2, 3):
        first.add(report(step))
    first.close()
    again = Board(tmp_path, 1)  # from the checkpoint of step 1
    again.add(report(2))
    again.close()
    assert curves(tmp_path)["train/loss"] == {1: 2.0, 2: 1.0}
