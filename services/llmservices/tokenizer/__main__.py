"""`python -m llmservices.tokenizer`: the tokenizer's process."""

from importlib.resources import files
from pathlib import Path

from libllm.config import ProcessEnvironment
from libllm.service import Serving, run

from llmservices.tokenizer.service import Tokenizer

EMBEDDED = "llmos-mini"


def main(serving: type[Serving] = Serving) -> None:
    """Serve until told to end."""
    embedded = Path(str(files("llmservices.models") / "embedded"))
    environment = ProcessEnvironment.read()
    run(
        lambda port: Tokenizer(
            port,
            built_in=((EMBEDDED, embedded),),
            process=environment.process or "tokenizer",
            incarnation=environment.incarnation,
        ),
        role="tokenizer",
        environment=environment,
        serving=serving,
    )


if __name__ == "__main__":
    main()
