"""A run for people: a table."""

from rich.table import Table

from libllm.bench.serve.timeline import Spread, Summary


def rates(summary: Summary) -> str:
    """What stands above the table."""
    return (
        f"{summary.requests} requests, {summary.failed} failed, {summary.seconds:.1f} s: "
        f"{summary.requests_per_s:.2f} requests/s, {summary.output_tokens_per_s:.1f} output "
        f"tokens/s, {summary.tokens_per_s:.1f} tokens/s"
    )


def table(summary: Summary) -> Table:
    """Latencies, a line each."""
    found = Table()
    for head in ("ms", "mean", "p50", "p90", "p95", "p99", "max"):
        found.add_column(head, justify="left" if head == "ms" else "right")
    for name, spread in (
        ("time to first token", summary.ttft_ms),
        ("time per output token", summary.tpot_ms),
        ("between pieces", summary.itl_ms),
        ("end to end", summary.end_to_end_ms),
    ):
        found.add_row(name, *_cells(spread))
    return found


def goodput(summary: Summary) -> str:
    """What stands below it."""
    kept = ", ".join(
        f"{name} {rate:.3f}/s ({100 * summary.goodput_share[name]:.0f} %)"
        for name, rate in summary.goodput_per_s.items()
    )
    errors = "".join(f"\n{count} x {what}" for what, count in summary.errors.items())
    return f"goodput: {kept}; the generator was late by {summary.late_ms_p99} ms (p99){errors}"


def _cells(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["-"] * 6
    values = (spread.mean, spread.p50, spread.p90, spread.p95, spread.p99, spread.max)
    return [f"{value:.1f}" for value in values]
