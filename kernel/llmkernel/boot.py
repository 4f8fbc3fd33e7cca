"""From the home's configuration to the core's: which processes run, and what the machine has."""

import os
import sys
from importlib.metadata import entry_points
from typing import Final

from libllm.config import Home, SystemConfig, read_key
from libllm.version import __version__
from llmproto import limits
from llmproto.init import Spec
from llmproto.operation import DeviceRow

from llmkernel.events import KernelConfig

MODULES: Final = {
    "tokenizer": "llmservices.tokenizer",
    "monitor": "llmservices.monitor",
    "gateway": "llmservices.gateway",
    "data": "llmservices.data",
    "store": "llmservices.store",
}
ON_DEMAND: Final = (Spec(name="data", role="data", module="llmservices.data"),)
"""Started when they are first asked."""
PLUGINS: Final = "llmos.services"
"""Entry-point group: a plug-in's name, and the module that `python -m` runs."""
KV_BYTES_DEFAULT: Final = 1 << 30
WORKING_BYTES: Final = 512 << 20
"""An executor beside its weights and its KV cache: torch, activations, logits."""
CORES_A_WORKER: Final = 8
"""One HTTP worker for so many cores."""


def core_config(home: Home, config: SystemConfig, devices: tuple[DeviceRow, ...]) -> KernelConfig:
    """What the core must know."""
    executor = config.executor
    kv_bytes = executor.kv_bytes if executor.kv_bytes is not None else KV_BYTES_DEFAULT
    idle_ms = executor.idle_ms if executor.idle_ms is not None else limits.MODEL_IDLE_MS
    return KernelConfig(
        services=tuple(_services(config, devices)),
        on_demand=tuple(spec for spec in ON_DEMAND if spec.name not in config.services.run),
        executor_cores=executor.threads,
        job_cores=config.trainer.cores,
        job_share=config.trainer.share_while_serving,
        run_folder=str(home.run),
        executor_memory_bytes=kv_bytes + WORKING_BYTES,
        default_model=config.models.default,
        preload=config.models.preload or None,
        model_idle_ms=idle_ms,
        operator_proof=read_key(home.operator_key),
        service_proof=read_key(home.service_key),
        uid=os.getuid(),
        version=f"{__version__} (Python {sys.version.split()[0]})",
    )


def _services(config: SystemConfig, devices: tuple[DeviceRow, ...]) -> list[Spec]:
    specs: list[Spec] = []
    for name in config.services.run:
        module = MODULES.get(name) or _plugin(name)
        if name != "gateway":
            specs.append(Spec(name=name, role=name, module=module))
            continue
        cores = max((len(d.cores) for d in devices if d.kind == "cpu"), default=1)
        workers = config.gateway.workers or max(1, cores // CORES_A_WORKER)
        if config.gateway.port == 0:
            workers = 1  # several workers can share a port only if it is known beforehand
        specs.extend(
            Spec(
                name=f"gateway-{number}" if workers > 1 else "gateway",
                role="gateway",
                module=module,
            )
            for number in range(1, workers + 1)
        )
    return specs


def _plugin(name: str) -> str:
    """Its module as an installed distribution declares it, else the name itself, taken for a
    module's; neither is imported here."""
    found = [entry.module for entry in entry_points(group=PLUGINS, name=name)]
    return found[0] if found else name
