"""From `rollback` to the first token of the version that was served before."""

import shutil
import tempfile
import time
from pathlib import Path

from libllm.bench.system import Figures, median, system
from libllm.client import AsyncClient

CONFIG = '[services]\nrun = ["tokenizer", "store"]\n'
NAME = "bench"


async def measure_rollback(repeat: int) -> Figures:
    """Two versions of the default model, swapped back and forth; nothing of the other one is
    loaded beforehand."""
    async with system(CONFIG) as (client, _, _):
        await deploy_two(client)
        taken: list[float] = []
        for _ in range(repeat):
            before = (await client.deployments())[0].previous
            await _until_alone(client)
            began = time.monotonic()
            await client.rollback(NAME)
            found = await client.generate("Once", model=NAME, max_tokens=1)
            taken.append(time.monotonic() - began)
            assert found.model == before, (found.model, before)
    return {"rollback_to_token_s": round(median(taken), 3), "worst_s": round(max(taken), 3)}


async def deploy_two(client: AsyncClient) -> None:
    """Two versions of the default model under one name, the second one serving."""
    folder = Path((await client.model()).path)
    with tempfile.TemporaryDirectory(prefix="llmos-") as beside:
        other = Path(beside) / "other"
        shutil.copytree(folder, other)
        config = other / "config.json"
        text = config.read_text()
        config.unlink()
        config.write_text(text + "\n")  # another version, with the same weights
        for path in (folder, other):
            await client.import_version(path, NAME)
            await client.deploy(NAME)


async def _until_alone(client: AsyncClient) -> None:
    """Until the version that was replaced is unloaded."""
    while sum(row.model.startswith(f"{NAME}@") for row in await client.ps()) > 1:
        pass
