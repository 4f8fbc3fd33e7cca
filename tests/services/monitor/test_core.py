"""Totals over incarnations: they never fall, and never outgrow their bound."""

from hypothesis import given
from hypothesis import strategies as st
from llmproto.limits import PROCESSES_MAX
from llmproto.metrics import Distribution, Metrics, Sample
from llmservices.monitor.core import SILENT_NS, SeriesName, Totals

TOKENS = SeriesName("llmos_tokens_total", ())
WAIT = SeriesName("llmos_wait_seconds", ())


def tokens(totals: Totals, process: str = "executor-1") -> float:
    """The total of one counter."""
    return totals.reporters[process].counters[TOKENS].value


def report(value: float, incarnation: int = 1, process: str = "executor-1") -> Metrics:
    """One counter's report."""
    return Metrics(process, incarnation, counters=[Sample(TOKENS.name, value)])


def histogram(counts: list[int], total: float, incarnation: int = 1) -> Metrics:
    """One histogram's report."""
    return Metrics(
        "gateway-1", incarnation, histograms=[Distribution(WAIT.name, [0.1, 1.0], counts, total)]
    )


def test_incarnations_add_up() -> None:
    totals = Totals()
    for metrics in (report(5), report(9), report(2, incarnation=2), report(3, incarnation=2)):
        totals.take(0, metrics)
    assert tokens(totals) == 12


def test_late_report_of_an_ended_incarnation_counts_nothing() -> None:
    totals = Totals()
    totals.take(0, report(2, incarnation=2))
    totals.take(0, report(9, incarnation=1))
    assert tokens(totals) == 2


def test_fall_within_an_incarnation_is_a_restart_nobody_numbered() -> None:
    totals = Totals()
    totals.take(0, report(9, incarnation=0))
    totals.take(0, report(4, incarnation=0))
    assert tokens(totals) == 13


def test_histograms_add_up_over_incarnations() -> None:
    totals = Totals()
    totals.take(0, histogram([1, 2, 0], 1.5))
    totals.take(0, histogram([0, 1, 1], 3.0, incarnation=2))
    found = totals.reporters["gateway-1"].histograms[WAIT]
    assert (found.counts, found.sum) == ([1, 3, 1], 4.5)


def test_histogram_that_contradicts_itself_is_refused() -> None:
    totals = Totals()
    totals.take(0, histogram([1, 2], 1.5))
    assert (totals.refused, totals.reporters["gateway-1"].histograms) == (1, {})


def test_levels_are_those_of_the_last_report_and_end_with_silence() -> None:
    totals = Totals()
    level = Sample("llmos_blocks_free", 7.0, {"device": "cpu"})
    totals.take(0, Metrics("executor-1", 1, gauges=[level]))
    gauges = totals.reporters["executor-1"].gauges
    assert gauges == {SeriesName("llmos_blocks_free", (("device", "cpu"),)): 7.0}
    totals.silence(SILENT_NS)
    assert totals.reporters["executor-1"].gauges == {}


def test_invalid_names_are_refused_and_counted() -> None:
    totals = Totals()
    samples = [Sample("no spaces", 1.0), Sample("a", 1.0, {"process": "x"}), Sample("b", 1.0)]
    totals.take(0, Metrics("p", 1, counters=samples))
    assert totals.refused == 2
    assert list(totals.reporters["p"].counters) == [SeriesName("b", ())]


def test_processes_are_bounded_and_the_silent_make_room() -> None:
    totals = Totals()
    for index in range(PROCESSES_MAX + 1):
        totals.take(0, report(1, process=f"p{index}"))
    assert (len(totals.reporters), totals.refused) == (PROCESSES_MAX, 1)
    totals.take(SILENT_NS, report(1, process="late"))
    assert "late" in totals.reporters
    totals.check()


def test_series_are_bounded() -> None:
    totals = Totals()
    for index in range(8):
        samples = [Sample(f"series_{index}_{i}", 1.0) for i in range(4096)]
        totals.take(0, Metrics("p", 1, counters=samples))
    totals.check()
    assert totals.refused > 0


@given(
    st.lists(
        st.builds(
            report,
            st.integers(0, 100),
            incarnation=st.integers(0, 3),
            process=st.sampled_from(["a", "b"]),
        )
    )
)
def test_a_counter_never_falls(reports: list[Metrics]) -> None:
    totals = Totals()
    seen: dict[str, float] = {}
    for metrics in reports:
        totals.take(0, metrics)
        value = tokens(totals, metrics.process)
        assert value >= seen.get(metrics.process, 0.0)
        seen[metrics.process] = value
        totals.check()
