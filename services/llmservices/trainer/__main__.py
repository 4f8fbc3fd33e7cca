"""`python -m llmservices.trainer`: one rank of one attempt, forked by init from its own image."""

import argparse

from libllm.config import ProcessEnvironment
from libllm.service import run

from llmservices.trainer.service import Settings, Trainer


def main() -> None:
    """Carry out one job until it is over."""
    parser = argparse.ArgumentParser(prog="llmservices.trainer")
    for name in ("job", "attempt", "rank", "processes", "device", "cores", "memory"):
        parser.add_argument(f"--{name}", required=True)
    said = parser.parse_args()
    environment = ProcessEnvironment.read()
    settings = Settings(
        job=bytes.fromhex(said.job),
        attempt=int(said.attempt),
        device=said.device,
        cores=[int(core) for core in said.cores.split(",") if core],
        home=environment.home,
        process=environment.process or "trainer",
    )
    run(lambda port: Trainer(port, settings), role="trainer", environment=environment)


if __name__ == "__main__":
    main()
