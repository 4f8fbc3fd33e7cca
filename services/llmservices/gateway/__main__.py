"""The gateway's process."""

from libllm.config import ProcessEnvironment, SystemConfig
from libllm.service import run

from llmservices.gateway.service import GatewayService

if __name__ == "__main__":
    environment = ProcessEnvironment.read()
    config = SystemConfig.read(environment.home.config).gateway
    run(
        lambda port: GatewayService(port, environment=environment, config=config),
        role="gateway",
        environment=environment,
    )
