"""generate() of transformers: `... -m libllm.bench.compare.drivers.transformers FOLDER DTYPE`."""

import sys
from typing import Any

import torch
import transformers

from libllm.bench.compare.drivers.lines import Prompts, serve, vocabulary_of


def main() -> None:
    """Load and serve."""
    folder, dtype = sys.argv[1:3]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Any: the library's decorators hide the types of its own methods.
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device)

    def compute(prompts: Prompts, output: int) -> None:
        ids = torch.tensor(list(prompts), device=device)
        with torch.inference_mode():
            answers = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output,
                min_new_tokens=output,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert answers.shape[1] == ids.shape[1] + output

    version = transformers.__version__
    serve("transformers", version, compute, vocabulary=vocabulary_of(folder))


if __name__ == "__main__":
    main()
