"""The unmodified lm-eval against the gateway: its own `hf` backend's scores on the same weights."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import libllm

from .conftest import ROOT, System

EMBEDDED = ROOT / "services/llmservices/models/embedded"
TASKS = ("tiny_choice", "tiny_text", "tiny_generation")
SUBJECTS = ("for", "if", "while", "try", "with", "return", "import", "def")
SENTENCE = "The for statement is used to iterate over the elements of a sequence. "
HEAD = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
"""
KINDS = {
    "tiny_choice": """\
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - metric: acc
""",
    "tiny_text": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
""",
    "tiny_generation": """\
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 24
  do_sample: false
metric_list:
  - metric: exact_match
""",
}


def write_tasks(folder: Path) -> None:
    choices = [" is used to", " banana sky", " of the list"]
    rows: dict[str, list[dict[str, object]]] = {
        "tiny_choice": [
            {"q": f"The {subject} statement", "choices": choices, "gold": 0} for subject in SUBJECTS
        ],
        # The last one is longer than the context: lm-eval cuts it into windows.
        "tiny_text": [{"text": SENTENCE * times + "A list is."} for times in (1, 2, 30, 90)],
        "tiny_generation": [{"q": f"The {subject} statement", "a": "x"} for subject in SUBJECTS],
    }
    for task in TASKS:
        file = folder / f"{task}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows[task]))
        (folder / f"{task}.yaml").write_text(HEAD.format(task=task, file=file) + KINDS[task])


def judge(folder: Path, model: str, arguments: dict[str, object]) -> dict[str, list[list[object]]]:
    """Each task's answers, as lm-eval logs them."""
    out = folder / model
    joined = ",".join(f"{key}={value}" for key, value in arguments.items())
    subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", model, "--model_args", joined),
            *("--tasks", ",".join(TASKS), "--include_path", str(folder), "--device", "cpu"),
            *("--output_path", str(out), "--log_samples"),
        ],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"),
        },
        cwd=folder,
        capture_output=True,
        check=True,
    )
    answers = {}
    for task in TASKS:
        (file,) = out.glob(f"*/samples_{task}_*.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        samples.sort(key=lambda sample: int(sample["doc_id"]))
        answers[task] = [answer for sample in samples for answer in sample["resps"]]
    return answers


@pytest.mark.long
@pytest.mark.timeout(600)
def test_lm_eval_gives_the_scores_of_its_own_backend(served: System, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    with libllm.connect(served.home.root) as llm:
        url = f"{llm.status().http}/v1/completions"
    same: dict[str, object] = {"add_bos_token": True}
    ours = judge(
        tmp_path,
        "local-completions",
        {
            **same,
            "model": "llmos-mini",
            "base_url": url,
            "tokenizer": EMBEDDED,
            "tokenizer_backend": "huggingface",
            "num_concurrent": 4,
            "max_length": 1024,
        },
    )
    # Its API models take windows of two tokens less, to leave room for an answer.
    theirs = judge(
        tmp_path, "hf", {**same, "pretrained": EMBEDDED, "dtype": "float32", "max_length": 1022}
    )
    assert ours["tiny_generation"] == theirs["tiny_generation"]
    assert any(answer != [""] for answer in ours["tiny_generation"])
    for task in ("tiny_choice", "tiny_text"):
        assert len(ours[task]) == len(theirs[task])
        for one, other in zip(ours[task], theirs[task]):
            first, second = scores(one), scores(other)
            assert first[1:] == second[1:]
            assert math.isclose(first[0], second[0], rel_tol=1e-5, abs_tol=1e-4), (one, other)


def scores(answer: list[object]) -> tuple[float, str]:
    """Log-likelihood, and whether it is what the model would say, from either shape of a log."""
    value = answer[0]
    if isinstance(value, list):
        return float(value[0]), str(value[1])
    return float(str(value)), ""
