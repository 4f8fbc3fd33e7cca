"""How the ranks of a job add up their gradients: torch.distributed, or nothing where one is alone.

Invariant: with equal global batches, n ranks compute what one does, up to the order of additions.
Source: Li et al. 2020, PyTorch Distributed (arXiv 2006.15704).
"""

import contextlib
import datetime
from pathlib import Path
from typing import Any, Final, Protocol, cast

import torch
import torch.distributed
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

PATIENCE: Final = datetime.timedelta(hours=1)
"""For the slowest rank: it may be saving or validating.  A dead one is the kernel's affair, which
kills the others."""


class Ranks(Protocol):
    """What the step needs of the others."""

    rank: int
    processes: int

    def wrap(self, learner: nn.Module, *, bf16: bool) -> nn.Module:
        """The module whose backward pass also adds up."""

    def unsynchronised(self, wrapped: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Backward passes inside it only add to this rank's gradient."""

    def summed(self, value: float) -> float:
        """Over all ranks, the same on each."""

    def told(self, value: int) -> int:
        """Rank 0's value, on each."""


class Alone:
    """One rank."""

    rank = 0
    processes = 1

    def wrap(self, learner: nn.Module, *, bf16: bool) -> nn.Module:
        return learner

    def unsynchronised(self, wrapped: nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def summed(self, value: float) -> float:
        return value

    def told(self, value: int) -> int:
        return value


class Together:
    """One of several, joined through a file."""

    def __init__(self, rendezvous: Path, rank: int, processes: int, device: torch.device) -> None:
        self.rank, self.processes = rank, processes
        self._device = device
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=FileStore(str(rendezvous), processes),
            rank=rank,
            world_size=processes,
            timeout=PATIENCE,
        )

    def wrap(self, learner: nn.Module, *, bf16: bool) -> nn.Module:
        devices = [self._device] if self._device.type == "cuda" else None
        wrapped = DistributedDataParallel(learner, device_ids=devices)
        if bf16:
            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped

    def unsynchronised(self, wrapped: nn.Module) -> contextlib.AbstractContextManager[None]:
        assert isinstance(wrapped, DistributedDataParallel)
        # Any: torch leaves no_sync unannotated
        return cast(contextlib.AbstractContextManager[None], cast(Any, wrapped).no_sync())

    def summed(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(total)
        return float(total.item())

    def told(self, value: int) -> int:
        said = torch.tensor(value, device=self._device)
        torch.distributed.broadcast(said, src=0)
        return int(said.item())

    def close(self) -> None:
        """Leave the group."""
        torch.distributed.destroy_process_group()
