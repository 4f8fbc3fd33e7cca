"""`python -m llmservices.tokenizer`: the tokenizer's process."""

from pathlib import Path

from libllm.config import ProcessEnvironment
from libllm.service import Serving, run

from llmservices import models
from llmservices.tokenizer.service import Tokenizer

EMBEDDED = "llmos-mini"


def main(serving: type[Serving] = Serving) -> None:
    """Serve until told to end."""
    embedded = Path(models.__file__).with_name("embedded")
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
