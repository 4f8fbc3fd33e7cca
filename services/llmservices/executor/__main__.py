"""`python -m llmservices.executor`: one executor's process, forked by init from its own image."""

import argparse
from pathlib import Path

from libllm.config import ProcessEnvironment, SystemConfig
from libllm.service import Serving, run

from llmservices.executor.loader import Settings
from llmservices.executor.service import Executor


def main(serving: type[Serving] = Serving, service: type[Executor] = Executor) -> None:
    """Serve one model until told to end."""
    parser = argparse.ArgumentParser(prog="llmservices.executor")
    for name in ("model", "path", "digest", "device", "cores", "memory"):
        parser.add_argument(f"--{name}", required=True)
    said = parser.parse_args()
    environment = ProcessEnvironment.read()
    settings = Settings(
        model=said.model,
        path=Path(said.path),
        digest=bytes.fromhex(said.digest),
        device=said.device,
        cores=[int(core) for core in said.cores.split(",") if core],
        config=SystemConfig.read(environment.home.config).executor,
    )
    process = environment.process or "executor"
    note = environment.home.crash_note(process, environment.incarnation)
    incarnation = environment.incarnation
    run(
        lambda port: service(port, settings, note, process=process, incarnation=incarnation),
        role="executor",
        environment=environment,
        serving=serving,
    )


if __name__ == "__main__":
    main()
