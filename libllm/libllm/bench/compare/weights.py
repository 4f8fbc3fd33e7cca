"""The precisions in which this system is compared: by configuration alone.  Pure."""

import argparse
import re
from typing import Final, Literal, get_args

Weights = Literal["auto", "int8", "int4"]
BITS: Final[dict[str, int]] = {"int8": 8, "int4": 4}
"""Of a weight; `auto`: the checkpoint's own."""


def weights_of(text: str) -> list[Weights]:
    """Precisions of ours, joined by commas."""
    known: tuple[Weights, ...] = get_args(Weights)
    found = [one for name in text.split(",") for one in known if one == name]
    if len(found) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: there is {', '.join(known)}")
    return found


def config_of(text: str, weights: Weights) -> str:
    """The configuration with these weights."""
    return text if weights == "auto" else config_with(text, f'weights = "{weights}"')


def config_with(text: str, line: str) -> str:
    """The configuration with one line more in its table [executor]."""
    table = re.compile(r"^\[executor\][^\S\n]*$", re.MULTILINE)
    if table.search(text):
        return table.sub(lambda _: f"[executor]\n{line}", text)
    return f"{text}\n[executor]\n{line}\n"
