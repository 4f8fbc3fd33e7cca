"""A run as a picture; needs matplotlib, which nothing else here does."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from libllm.bench.serve.timeline import Timeline


def plot(lines: Sequence[Timeline], path: Path) -> None:
    """Time to first token and time per output token over the run, and their distributions."""
    good = [line for line in lines if not line.error and line.arrivals_s]
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for row, (name, values) in enumerate(
        (
            ("time to first token, ms", [1000 * line.ttft_s for line in good]),
            ("time per output token, ms", [1000 * (line.tpot_s or 0.0) for line in good]),
        )
    ):
        axes[row][0].plot([line.due_s for line in good], values, ".", markersize=3)
        axes[row][0].set(xlabel="s", ylabel=name)
        shares = [(index + 1) / len(values) for index in range(len(values))]
        axes[row][1].plot(sorted(values), shares)
        axes[row][1].set(xlabel=name, ylabel="share of requests", ylim=(0, 1))
    figure.savefig(path)
