"""What may be given beside the tests."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known where this folder, or a file in it, is named on the command line."""
    parser.addoption("--nanogpt", type=Path, help="a checkout of it, to be compared with")


@pytest.fixture
def nanogpt(request: pytest.FixtureRequest) -> Path | None:
    """The checkout, where one is given."""
    found = request.config.getoption("--nanogpt", default=None)
    return found if isinstance(found, Path) else None
