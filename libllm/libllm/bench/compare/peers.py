"""The engines that are compared: each can be started, asked for the time of a case, and stopped."""

import asyncio
import json
import os
import re
import shutil
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Final, Protocol

from llmproto.errors import ErrorKind, RemoteError, invalid

from libllm.bench.compare.cases import Case
from libllm.bench.compare.weights import BITS, Weights, config_of
from libllm.bench.processes import used
from libllm.bench.system import generate, prompt_of, system
from libllm.client import AsyncClient
from libllm.config import child_environment

LINE_S: Final = 900.0
"""The slowest answer that is waited for: an engine that loads and compiles."""
ANSWER: Final = b"{"
"""Engines and their processes print beside the driver's answers, while they are imported too."""
WARM_TOKENS: Final = 4
WARM_SALT: Final = 0
NAME: Final = "measured"


class Peer(Protocol):
    """One engine with one model."""

    @property
    def name(self) -> str: ...

    @property
    def bits(self) -> int:
        """Of a weight."""

    async def start(self) -> str:
        """Load; gives its version.  RemoteError(UNAVAILABLE) says why it is not here."""

    async def warm(self, case: Case) -> None:
        """Compute something of that shape, unmeasured."""

    async def rate(self, case: Case, salt: int) -> float:
        """Tokens a second, measured once."""

    async def stop(self) -> None:
        """End it."""


class Ours:
    """The whole system, asked through libllm."""

    def __init__(self, folder: Path, config: str, weights: Weights, *, own_bits: int) -> None:
        """`own_bits` are the checkpoint's."""
        self.name = "llmos" if weights == "auto" else f"llmos-{weights}"
        self.bits = BITS.get(weights, own_bits)
        self.first_token_s = 0.0
        """From a request for the model that is not loaded to its first token."""
        self.tokens = 0
        """Of prompts and answers, so far."""
        self._folder = folder
        self._config = config_of(config, weights)
        self._stack = AsyncExitStack()
        self._client: AsyncClient | None = None

    async def start(self) -> str:
        """Boot, add the model, load it."""
        client, _, _ = await self._stack.enter_async_context(system(self._config))
        self._client = client
        await client.add_model(self._folder, NAME)
        await asyncio.to_thread(_read_once, self._folder)
        self.first_token_s, _ = await generate(client, prompt_of(16, 1), 2, NAME)
        rows = [row for row in await client.models() if row.model.name == NAME]
        return rows[0].path

    async def warm(self, case: Case) -> None:
        """As Peer says."""
        await self._seconds(case, min(case.output, WARM_TOKENS), WARM_SALT)

    async def rate(self, case: Case, salt: int) -> float:
        """As Peer says."""
        whole = 0.0 if case.is_prefill else await self._seconds(case, case.output, salt)
        return case.rate(whole, await self._seconds(case, 1, salt))

    async def resident_bytes(self) -> int:
        """Of the executor's process."""
        assert self._client is not None
        rows = await self._client.ps()
        pids = [row.pid for row in rows if row.role == "executor" and row.pid is not None]
        return max((used(pid).resident_bytes for pid in pids), default=0)

    async def _seconds(self, case: Case, output: int, salt: int) -> float:
        assert self._client is not None
        loop = asyncio.get_running_loop()
        seed = seed_of(case, output, salt)
        prompts = [prompt_of(case.prompt, f"{seed}/{n}") for n in range(case.streams)]
        began = loop.time()
        done = await asyncio.gather(
            *(generate(self._client, prompt, output, NAME) for prompt in prompts)
        )
        assert all(tokens == output for _, tokens in done)
        self.tokens += case.streams * (case.prompt + output)
        return loop.time() - began

    async def stop(self) -> None:
        """Shut the system down."""
        await self._stack.aclose()


def seed_of(case: Case, output: int, salt: int) -> str:
    """Of the prompts of one measurement: no other begins with them, in whatever case, so no cache
    holds a part of them."""
    return f"{case.name}/{output}/{salt}"


class Driven:
    """An engine behind `libllm.bench.compare.drivers`, in an interpreter that has it.

    Between its turns it is stopped (SIGSTOP): some wait for work by spinning, on everybody's cores.
    """

    def __init__(
        self,
        name: str,
        python: Path,
        arguments: Sequence[str],
        environment: dict[str, str],
        *,
        bits: int,
    ) -> None:
        self.name = name
        self.bits = bits
        self._command = [
            *(str(python), "-m", f"libllm.bench.compare.drivers.{name.partition('-')[0]}"),
            *arguments,
        ]
        self._environment = environment
        self._process: Process | None = None

    async def start(self) -> str:
        """Load the model."""
        path = child_environment()["PYTHONPATH"]
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=PIPE,
                stdout=PIPE,
                env={**child_environment(), **self._environment, "PYTHONPATH": path},
                start_new_session=True,  # an engine's own processes end with it
            )
        except OSError as error:
            raise _absent(self.name, f"{self._command[0]}: {error.strerror}") from None
        return str((await self._answer())["version"])

    async def warm(self, case: Case) -> None:
        """As Peer says."""
        await self._seconds(case, min(case.output, WARM_TOKENS), WARM_SALT)

    async def rate(self, case: Case, salt: int) -> float:
        """As Peer says."""
        whole = 0.0 if case.is_prefill else await self._seconds(case, case.output, salt)
        return case.rate(whole, await self._seconds(case, 1, salt))

    async def _seconds(self, case: Case, output: int, salt: int) -> float:
        assert self._process is not None
        assert self._process.stdin is not None
        seed = seed_of(case, output, salt)
        asked = {"streams": case.streams, "prompt": case.prompt, "output": output, "salt": seed}
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        return float((await self._answer())["seconds"])

    def _signal(self, number: signal.Signals) -> None:
        """To all its processes; one that has ended is noticed when it does not answer."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    async def _answer(self) -> dict[str, float | str]:
        answer = await self._line()
        self._signal(signal.SIGSTOP)
        return answer

    async def _line(self) -> dict[str, float | str]:
        assert self._process is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(LINE_S):
            line = await self._process.stdout.readline()
            while line and not line.startswith(ANSWER):
                sys.stderr.write(line.decode(errors="replace"))
                line = await self._process.stdout.readline()
        if not line:
            code = await self._process.wait()
            raise _absent(self.name, f"it ended with exit code {code}")
        answer: dict[str, float | str] = json.loads(line)
        return answer

    async def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            await self._process.wait()


class LlamaCpp:
    """llama.cpp's own benchmarks, started anew for every figure: `llama-batched-bench` for decode,
    `llama-bench` for prefill."""

    def __init__(self, name: str, binaries: Path, model: Path, threads: int) -> None:
        self.name = name
        self.bits = bits_of_gguf(model)
        self._binaries = binaries
        self._model = model
        self._threads = threads

    async def start(self) -> str:
        """Look whether it is there."""
        for program in ("llama-bench", "llama-batched-bench"):
            if shutil.which(str(self._binaries / program)) is None:
                raise _absent(self.name, f"{self._binaries / program} is not there")
        if not self._model.is_file():
            raise _absent(self.name, f"{self._model} is not there")
        return self._model.name

    async def warm(self, case: Case) -> None:
        """Nothing: its programs warm themselves up, at each start."""

    async def rate(self, case: Case, salt: int) -> float:
        """As Peer says; every start is as cold as the other."""
        common = ("-m", str(self._model), "-t", str(self._threads))
        if case.is_prefill:
            output = await self._run(
                *("llama-bench", *common, "-p", str(case.prompt), "-n", "0", "-r", "1"),
                *("-fa", "1", "-o", "json"),
            )
            return float(json.loads(output)[0]["avg_ts"])
        context = case.streams * (case.prompt + case.output) + 64
        output = await self._run(
            *("llama-batched-bench", *common, "-c", str(context), "-b", "2048", "-ub", "512"),
            *("-npp", str(case.prompt), "-ntg", str(case.output), "-npl", str(case.streams)),
            *("-fa", "on", "--output-format", "jsonl"),
        )
        return speed_tg(output)

    async def _run(self, program: str, *arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            str(self._binaries / program),
            *arguments,
            stdout=PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        output, _ = await process.communicate()
        if process.returncode:
            raise _absent(self.name, f"{program} ended with exit code {process.returncode}")
        return output.decode()

    async def stop(self) -> None:
        """Nothing runs."""


def _read_once(folder: Path) -> None:
    """What is measured begins with the weights in the file cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def speed_tg(output: str) -> float:
    """Generated tokens a second, of the one line that llama-batched-bench printed as JSON."""
    found = re.search(r'"speed_tg":\s*([0-9.]+)', output)
    if found is None:
        raise RemoteError(
            ErrorKind.INTERNAL, f"llama-batched-bench printed no speed_tg: {output[-200:]!r}"
        )
    return float(found[1])


def transformers_peer(folder: Path, dtype: str) -> Driven:
    """In the interpreter that runs this."""
    arguments = [str(folder), dtype]
    bits = bits_of_folder(folder, dtype)
    return Driven("transformers", Path(sys.executable), arguments, {}, bits=bits)


def vllm_environment(preload: str, cores: str) -> dict[str, str]:
    """What vLLM is told beside its arguments, where it computes on CPU."""
    found = {
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return {**found, "LD_PRELOAD": preload} if preload else found


def bits_of_gguf(model: Path) -> int:
    """Of a weight, by the name that such files bear: `-bf16`, `-q8_0`, `-q4_0`."""
    found = re.search(r"(?:[.-]|^)(?:bf|f|q|iq)(\d+)(?:_\w+)?$", model.stem.lower())
    if found is None:
        raise invalid(f"{model.name}: its name does not end in -bf16, -q8_0 or the like")
    return int(found[1])


def bits_of_folder(folder: Path, dtype: str) -> int:
    """Of a weight, by config.json; `dtype` is what is not quantized, `auto` the checkpoint's."""
    try:
        said = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise invalid(f"{folder}/config.json: {error}") from None
    for group in said.get("quantization_config", {}).get("config_groups", {}).values():
        return int(group["weights"]["num_bits"])
    own = said.get("dtype", said.get("torch_dtype", "float32")) if dtype == "auto" else dtype
    return 32 if own == "float32" else 16


def _absent(name: str, why: str) -> RemoteError:
    return RemoteError(ErrorKind.UNAVAILABLE, f"{name}: {why}")
