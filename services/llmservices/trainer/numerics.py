"""The numerics contract: under what circumstances two computations of one step are equal.

A run that goes on under another contract is not wrong, but its recomputed steps differ in their
last bits: they are then reported with their difference instead of ending the job.
"""

from typing import Any

import torch
from llmproto.recipes import TrainingRecipe

Contract = dict[str, str]


def fix(threads: int) -> None:
    """Make this process deterministic; once, before anything is computed."""
    torch.set_num_threads(max(1, threads))
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling every new tensor would only show bugs, and costs a pass over memory each.
    switches: Any = torch.utils.deterministic  # Any: its attributes are made at run time
    switches.fill_uninitialized_memory = False


def contract(recipe: TrainingRecipe, *, processes: int, device: torch.device) -> Contract:
    """Everything that decides about the last bits, beside recipe and data."""
    on_cpu = device.type == "cpu"
    return {
        "torch": str(torch.__version__),
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(device),
        "isa": str(torch.backends.cpu.get_cpu_capability()) if on_cpu else "",
        "threads": str(torch.get_num_threads()),
        "processes": str(processes),
        "precision": recipe.precision,
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
    }


def differences(then: Contract, now: Contract) -> str:
    """What changed, for people; empty where nothing did."""
    changed = [
        f"{key} {then.get(key, '?')} -> {now.get(key, '?')}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    return ", ".join(changed)
