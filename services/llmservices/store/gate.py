"""Whether a version is good enough to be deployed: `accuracy>=0.87,loss<1.5` against its metrics.

Pure.  Every condition must hold; a metric that the version lacks is a refusal, never a pass.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Final

from llmproto.errors import invalid

COMPARISONS: Final[dict[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION: Final = re.compile(r"\s*([A-Za-z0-9_][A-Za-z0-9_./@-]*)\s*(>=|<=|>|<)\s*(\S+)\s*")


def check_gate(gate: str, metrics: Mapping[str, float], *, of: str) -> None:
    """INVALID, with both numbers, unless all of the gate holds of these metrics."""
    for condition in gate.split(",") if gate.strip() else ():
        name, comparison, wanted = _parse(condition)
        found = metrics.get(name)
        if found is None:
            there = ", ".join(sorted(metrics)) or "none: evaluate it first"
            raise invalid(f"{of} has no metric {name!r} to judge it by; there is: {there}")
        if not COMPARISONS[comparison](found, wanted):
            raise invalid(f"{of} is not deployed: {name} is {found:g}, not {comparison} {wanted:g}")


def _parse(condition: str) -> tuple[str, str, float]:
    match = _CONDITION.fullmatch(condition)
    if match is not None:
        try:
            number = float(match[3])
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return match[1], match[2], number
    raise invalid(
        f"{condition.strip()!r} is no condition: write metric>=number, several joined by commas"
    )
