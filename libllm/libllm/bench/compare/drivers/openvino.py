"""OpenVINO GenAI: `PYTHON -m libllm.bench.compare.drivers.openvino MODEL FOLDER`.

MODEL is what it reads (a GGUF file, or a folder in its own format), FOLDER has the config.json.
"""

import sys

import numpy
import openvino
import openvino_genai

from libllm.bench.compare.drivers.lines import Prompts, serve, vocabulary_of


def main() -> None:
    """Load and serve."""
    model, folder = sys.argv[1:3]
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.max_num_batched_tokens = 4096
    scheduler.max_num_seqs = 64
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU")

    def compute(prompts: Prompts, output: int) -> None:
        wanted = openvino_genai.GenerationConfig()
        wanted.max_new_tokens = wanted.min_new_tokens = output
        wanted.ignore_eos = True
        # A vocabulary that names no end would be taken to end with -1, which is refused.
        wanted.set_eos_token_id(0)
        wanted.do_sample = False
        tensors = [openvino.Tensor(numpy.array([ids], dtype=numpy.int64)) for ids in prompts]
        answers = pipeline.generate(tensors, [wanted] * len(tensors))
        assert all(len(one.m_generation_ids[0]) == output for one in answers)

    version = openvino_genai.__version__
    serve("openvino", version, compute, vocabulary=vocabulary_of(folder))


if __name__ == "__main__":
    main()
