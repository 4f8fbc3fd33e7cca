"""vLLM: `PYTHON -m libllm.bench.compare.drivers.vllm FOLDER DTYPE`, in an environment that has it.

Its processes are started by `spawn`, which runs this file again: nothing happens on import.
"""

import sys

import vllm

from libllm.bench.compare.drivers.lines import Prompts, serve, vocabulary_of

CONTEXT_TOKENS = 4096


def main() -> None:
    """Load and serve."""
    folder, dtype = sys.argv[1:3]
    engine = vllm.LLM(
        model=folder,
        dtype=dtype,
        max_model_len=CONTEXT_TOKENS,
        max_num_seqs=64,
        max_num_batched_tokens=CONTEXT_TOKENS,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def compute(prompts: Prompts, output: int) -> None:
        wanted = vllm.SamplingParams(
            temperature=0, max_tokens=output, min_tokens=output, ignore_eos=True, detokenize=False
        )
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        answers = engine.generate(asked, wanted, use_tqdm=False)
        assert all(len(one.outputs[0].token_ids) == output for one in answers)

    serve("vllm", vllm.__version__, compute, vocabulary=vocabulary_of(folder))


if __name__ == "__main__":
    main()
