"""What the monitor says is read back by the parser of the format's own library."""

from llmproto.metrics import Distribution, Metrics, Sample
from llmproto.operation import (
    DeviceRow,
    Lease,
    Processes,
    ProcessRow,
    ProcessState,
    Status,
)
from llmservices.monitor.core import TEXT_BYTES_MAX, Totals
from llmservices.monitor.exposition import render
from llmservices.monitor.service import committed
from prometheus_client.parser import text_string_to_metric_families

Line = tuple[str, frozenset[tuple[str, str]]]


def lines(text: str) -> dict[Line, float]:
    """Every sample of a text."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def line(name: str, **labels: str) -> Line:
    """The key of one sample."""
    return name, frozenset(labels.items())


STATUS = Status(
    ready=True,
    version="1.0",
    kernel_epoch=3,
    uptime_ms=1500,
    journal_bytes=77,
    threads_running=2,
    tokens_committed=10,
    devices=[DeviceRow("cpu", "cpu", [0, 1], 100, 40)],
)
PROCESSES = Processes(
    [
        ProcessRow(
            "tokenizer", "tokenizer", 9, ProcessState.READY, 4, 20, Lease("cpu", [0], 5), threads=2
        )
    ]
)


def test_kernel_numbers() -> None:
    found = lines(render(Totals(), STATUS, PROCESSES))
    assert found[line("llmos_kernel_up")] == 1
    assert found[line("llmos_threads", state="running")] == 2
    assert found[line("llmos_journal_bytes")] == 77
    assert found[line("llmos_process_up", process="tokenizer", role="tokenizer")] == 1
    assert found[line("llmos_process_restarts_total", process="tokenizer", role="tokenizer")] == 3
    assert found[line("llmos_device_memory_granted_bytes", device="cpu", kind="cpu")] == 40


def test_committed_tokens_survive_the_kernel() -> None:
    totals = Totals()
    totals.take(0, committed(STATUS))
    totals.take(0, committed(Status(True, "1.0", 4, 10, tokens_committed=1)))
    found = lines(render(totals, None, None))
    assert found[line("llmos_tokens_committed_total", process="kernel")] == 11
    assert found[line("llmos_kernel_up")] == 0


def test_reports_carry_their_process() -> None:
    totals = Totals()
    totals.take(
        0,
        Metrics(
            "gateway-1",
            1,
            counters=[Sample("llmos_requests", 3.0, {"route": 'a"\\\n'})],
            gauges=[Sample("llmos_open", 1.0)],
            histograms=[Distribution("llmos_wait_seconds", [0.5], [2, 1], 4.0)],
        ),
    )
    found = lines(render(totals, None, None))
    assert found[line("llmos_requests_total", process="gateway-1", route='a"\\\n')] == 3
    assert found[line("llmos_open", process="gateway-1")] == 1
    assert found[line("llmos_wait_seconds_bucket", process="gateway-1", le="0.5")] == 2
    assert found[line("llmos_wait_seconds_bucket", process="gateway-1", le="+Inf")] == 3
    assert found[line("llmos_wait_seconds_sum", process="gateway-1")] == 4


def test_a_family_has_one_type() -> None:
    totals = Totals()
    totals.take(0, Metrics("a", 1, gauges=[Sample("x", 1.0)]))
    totals.take(0, Metrics("b", 1, counters=[Sample("x_total", 1.0)]))
    found = lines(render(totals, None, None))
    assert found[line("llmos_monitor_conflicts")] == 1
    assert line("x_total", process="b") not in found


def test_a_line_has_one_value() -> None:
    totals = Totals()
    totals.take(0, Metrics("a", 1, counters=[Sample("x", 1.0), Sample("x_total", 2.0)]))
    found = lines(render(totals, None, None))
    assert found[line("x_total", process="a")] == 1
    assert found[line("llmos_monitor_conflicts")] == 1


def test_the_text_stays_within_its_bound() -> None:
    totals = Totals()
    for process in ("a", "b", "c"):
        samples = [Sample(f"name_{process}_{i}", 1e300 / 3, {"k": "\\" * 99}) for i in range(4096)]
        bounds = [float(i) + 1 / 3 for i in range(64)]
        histograms = [Distribution(f"h_{process}_{i}", bounds, [1] * 65, 1.0) for i in range(50)]
        totals.take(0, Metrics(process, 1, counters=samples, histograms=histograms))
    totals.check()
    assert totals.refused > 0
    assert len(render(totals, None, None).encode()) <= TEXT_BYTES_MAX + 1000
