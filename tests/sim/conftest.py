"""Options and limits of the simulated world."""

import gc
from collections.abc import Iterator

import pytest
from llmproto import limits


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="run this seed of the simulation alone")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int | None:
    """The seed that somebody asked for."""
    found = request.config.getoption("--seed", default=None)
    assert found is None or isinstance(found, int)
    return found


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small enough that short streams reach them, and that the end of waiting comes soon."""
    monkeypatch.setattr(limits, "CREDIT_TOKENS", 24)
    monkeypatch.setattr(limits, "LINGER_MS", 3_000)
    monkeypatch.setattr(limits, "RESUME_MS_MAX", 15_000)
    gc.disable()  # thousands of short worlds: collected by chunk
    yield
    gc.enable()
    gc.collect()
