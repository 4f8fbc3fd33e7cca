"""What the installation does beside copying files: it compiles the native step.

Without a compiler the installation goes on, and steps are computed in torch.
"""

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD = "services/llmservices/models/native/build.py"


class NativeHook(BuildHookInterface):
    """Runs for wheels and editable installations alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        path = Path(self.root, BUILD)
        spec = importlib.util.spec_from_file_location("native_build", path)
        assert spec is not None
        assert spec.loader is not None
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        try:
            native.build()
        except native.BuildError as error:
            self.app.display_warning(f"the native step was not built: {error}")
            return
        build_data["artifacts"].append(f"/{native.LIBRARY.relative_to(self.root).as_posix()}")
        # The library runs on this system and architecture, with any Python.
        build_data["pure_python"] = False
        build_data["infer_tag"] = False
        build_data["tag"] = f"py3-none-{_platform()}"


def _platform() -> str:
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
