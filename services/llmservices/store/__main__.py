"""`python -m llmservices.store`: the store's process."""

from libllm.config import ProcessEnvironment, SystemConfig
from libllm.service import run

from llmservices.store.archive import Archive
from llmservices.store.service import Store


def main() -> None:
    """Serve until told to end."""
    environment = ProcessEnvironment.read()
    config = SystemConfig.read(environment.home.config)
    run(
        lambda port: Store(port, Archive(environment.home.store, bytes_max=config.store.bytes_max)),
        role="store",
        environment=environment,
    )


if __name__ == "__main__":
    main()
