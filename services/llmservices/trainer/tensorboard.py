"""Event files for TensorBoard, by torch's own writer."""

from pathlib import Path
from typing import Any

from llmproto.jobs import StepReport
from torch.utils.tensorboard import SummaryWriter


class Board:
    """One run's curves.  Steps that an earlier attempt wrote beyond the checkpoint are taken
    back."""

    def __init__(self, folder: Path, step: int) -> None:
        # Any: the writer has no types
        writer: Any = SummaryWriter
        self._writer: Any = writer(log_dir=str(folder), purge_step=step + 1 if step else None)

    def add(self, report: StepReport) -> None:
        """One step."""
        self._writer.add_scalar("train/loss", report.loss, report.step)
        self._writer.add_scalar("train/learning_rate", report.learning_rate, report.step)
        if report.gradient_norm is not None:
            self._writer.add_scalar("train/gradient_norm", report.gradient_norm, report.step)
        for name, value in report.metrics.items():
            self._writer.add_scalar(f"validation/{name}", value, report.step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
