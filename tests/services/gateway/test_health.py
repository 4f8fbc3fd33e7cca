"""Progress, as the kernel's numbers show it."""

import msgspec
from llmproto.models import ModelRow, Models, ModelState
from llmproto.operation import Status
from llmservices.gateway.health import STILL_NS, Health

from .conftest import entry

MODELS = Models([ModelRow(entry(), ModelState.READY, 1, 0, True)])
FINE = Status(True, "1", 1, 1, threads_running=2, tokens_committed=5)


def test_fine() -> None:
    assert Health().reasons(0, FINE, MODELS) == []


def test_no_models() -> None:
    assert Health().reasons(0, FINE, Models([])) == ["there is no model"]


def test_full_journal() -> None:
    full = msgspec.structs.replace(FINE, journal_full=True, journal_bytes=9)
    assert "9 bytes" in Health().reasons(0, full, MODELS)[0]


def test_nothing_moves() -> None:
    health = Health()
    assert health.reasons(0, FINE, MODELS) == []
    assert health.reasons(STILL_NS - 1, FINE, MODELS) == []
    assert "60 s" in health.reasons(STILL_NS, FINE, MODELS)[0]
    moved = msgspec.structs.replace(FINE, tokens_committed=6)
    assert health.reasons(STILL_NS + 1, moved, MODELS) == []


def test_nothing_to_do_is_no_standstill() -> None:
    health = Health()
    idle = msgspec.structs.replace(FINE, threads_running=0)
    assert health.reasons(0, idle, MODELS) == []
    assert health.reasons(9 * STILL_NS, idle, MODELS) == []
    assert health.reasons(9 * STILL_NS, FINE, MODELS) == []
