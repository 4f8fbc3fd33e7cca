"""The monitor's process."""

from libllm.config import ProcessEnvironment
from libllm.service import run

from llmservices.monitor.service import MonitorService

if __name__ == "__main__":
    run(MonitorService, role="monitor", environment=ProcessEnvironment.read())
