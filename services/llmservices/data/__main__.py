"""The data service's process."""

from libllm.config import ProcessEnvironment, SystemConfig
from libllm.service import run

from llmservices.data.service import DataService


def main() -> None:
    """Serve."""
    environment = ProcessEnvironment.read()
    config = SystemConfig.read(environment.home.config).data
    run(
        lambda port: DataService(port, environment.home, config),
        role="data",
        environment=environment,
    )


if __name__ == "__main__":
    main()
