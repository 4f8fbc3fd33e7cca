"""Which model a person means: a name in the table, a folder, or ORG/NAME on the hub."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llmproto.errors import ErrorKind, RemoteError, invalid
from llmproto.models import ModelRow
from msgspec import structs

if TYPE_CHECKING:
    from libllm.cli.system import Operator, System

HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_of(system: "System", operator: "Operator", meant: str, *, progress: bool) -> ModelRow:
    """The row of the table, made where the model stands elsewhere; INVALID names what there is."""
    rows = operator.models()
    found = _named(rows, meant)
    if found is not None:
        return found
    deployed = next((row for row in operator.deployments() if row.name == meant), None)
    serving = None if deployed is None else _named(rows, deployed.serving or "")
    if serving is not None:
        return structs.replace(serving, model=structs.replace(serving.model, name=meant))
    if looks_like_path(meant):
        folder, name = folder_of(meant), None
    elif HUB_NAME.fullmatch(meant):
        folder, name = system.fetch(meant, progress=progress), meant
    else:
        known = ", ".join(row.model.name for row in rows) or "none"
        raise invalid(
            f"no model {meant!r}: the table has {known}; a folder is written as a path (./{meant}),"
            " a model on the Hugging Face hub as ORG/NAME"
        )
    added = operator.add_model(folder, free_name(rows, folder, name or folder.name)).name
    found = _named(operator.models(), added)
    if found is None:
        raise RemoteError(ErrorKind.STALE, f"the model {added} was removed just now: try again")
    return found


def looks_like_path(meant: str) -> bool:
    """Written as a path, or a folder that exists."""
    return meant.startswith((".", "/", "~")) or meant.endswith("/") or Path(meant).is_dir()


def folder_of(meant: str) -> Path:
    """The folder as an absolute path; INVALID where there is none."""
    folder = Path(os.path.abspath(os.path.expanduser(meant)))
    if not folder.exists():
        raise invalid(f"there is no folder {folder}")
    if not folder.is_dir():
        raise invalid(f"{folder} is a file; a model is a folder with config.json and *.safetensors")
    return folder


def free_name(rows: Sequence[ModelRow], folder: Path, wanted: str) -> str:
    """The name under which this folder stands in the table, else the wanted one or a variant of it
    that is free."""
    names = {row.model.name for row in rows}
    for row in rows:
        if row.model.path == str(folder) and row.model.name.startswith(wanted):
            return row.model.name
    if wanted not in names:
        return wanted
    number = 2  # at most MODELS_MAX names are taken
    while f"{wanted}-{number}" in names:
        number += 1
    return f"{wanted}-{number}"


def _named(rows: Sequence[ModelRow], name: str) -> ModelRow | None:
    return next((row for row in rows if row.model.name == name), None)
