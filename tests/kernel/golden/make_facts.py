"""Writes `facts-format-1.bin`: a journal segment of facts as a kernel of format 1 writes them; and
one more such file for every set of facts that came later.

Run once, when a format or a set is new; later versions of the code must read the file, not make it
again:

    python tests/kernel/golden/make_facts.py SET FOLDER
"""

import sys
from collections.abc import Callable
from pathlib import Path

from llmkernel import facts, turns
from llmkernel.facts import AnyFact
from llmkernel.journal import Journal, Options
from llmproto.errors import ErrorKind
from llmproto.generation import Sampling, TokenScore
from llmproto.jobs import JobKind, JobState, StepReport
from llmproto.models import DeploymentState, ModelEntry
from llmproto.wire import pack_tokens
from msgspec import structs

MODEL = ModelEntry(
    name="small",
    path="/models/small",
    digest=b"m" * 16,
    architecture="LlamaForCausalLM",
    context_tokens=4096,
    vocabulary=32_000,
    weight_bytes=1_000_000,
    end_tokens=[2],
    chat=True,
    created_s=1_790_000_000,
)


def admitted(number: int, **changes: object) -> facts.ThreadAdmitted:
    """A thread with a prompt of three tokens."""
    values: dict[str, object] = {
        "thread": b"\0\0\0\1" + number.to_bytes(4),
        "tenant": 1,
        "session": b"s" * 16,
        "key": number.to_bytes(16),
        "index": 0,
        "digest": b"d" * 16,
        "model": "small",
        "tokens": pack_tokens([1, 300, 31_999]),
        "prompt_tokens": 3,
        "output_tokens_max": 100,
        "sampling": Sampling(temperature=0.7, seed=number, stop_tokens=[2], logprobs=1),
        "sink": "tokenizer",
        "sink_state": b"opaque",
        "service_class": 1,
        "priority": -2,
        "deadline_ns": 10**15,
        "resumable": True,
        "admitted_ns": 1_000 + number,
    }
    return facts.ThreadAdmitted(**(values | changes))  # type: ignore[arg-type]  # checked above


def all_facts() -> list[list[AnyFact]]:
    """One of each kind at least, event by event."""
    names = [b"\0\0\0\1" + number.to_bytes(4) for number in range(4)]
    score = TokenScore(7, -0.5, [7, 8], [-0.5, -1.5])
    return [
        [facts.Booted(1, 500, 1_790_000_000_000_000_000)],
        [facts.TenantSeen(1, "uid:1000")],
        [
            facts.TenantSeen(2, "key:alice"),
            facts.KeyAdded("alice", b"k" * 32, False, 1_790_000_001),
        ],
        [facts.KeyAdded("bob", b"b" * 32, True, 1_790_000_002)],
        [facts.KeyRemoved("bob")],
        [facts.ModelRegistered(MODEL, True)],
        [facts.ModelRegistered(_named("gone"), False)],
        [facts.ModelRemoved("gone")],
        [admitted(0)],
        [admitted(1)],
        [admitted(2)],
        [admitted(3)],
        [facts.TokensCommitted(names[:3], [3, 3, 3], [7, 9, 2], [score, None, None])],
        [
            facts.TokensCommitted([names[2]], [4], [11]),
            facts.ThreadEnded(names[2], 1, 4, 2_000),
        ],
        [facts.ThreadEnded(names[1], 4, 4, 2_100, ErrorKind.INTERNAL, "it died of it")],
        [facts.ThreadsForgotten([names[1]], 2_200)],
        [facts.ThreadChanged(names[3], b"t" * 16, True, 3, 7)],
        [facts.KeySpent(1, b"z" * 16, 0, b"d" * 16, 10**12, names[0])],
        [facts.Booted(2, 3_000, 1_790_000_001_000_000_000)],
    ]


def job_facts() -> list[list[AnyFact]]:
    """Jobs: one of each kind at least, event by event."""
    first, second, gone = (b"\0\0\0\1\0\0\0" + bytes([n]) for n in (5, 6, 7))
    rows = [StepReport(1, 2.5, 64, 1e-3, 0.7, 12.5), StepReport(2, 2.25, 64, metrics={"acc": 0.5})]

    def admitted_job(job: bytes, name: str) -> facts.JobAdmitted:
        key = job + bytes(8)
        return facts.JobAdmitted(
            *(job, 1, key, JobKind.TRAIN, name, b"recipe", 2, 1 << 30, None, "cpu", 3, -1, 4_000)
        )

    return [
        [facts.TenantSeen(1, "uid:1000")],
        [admitted_job(first, "bot"), facts.AttemptBegun(first, 1)],
        [facts.StepsReported(first, rows, 100)],
        [facts.CheckpointTaken(first, b"v" * 32, 1, 8)],
        [facts.AttemptLost(first, 1, 2)],
        [facts.AttemptBegun(first, 2)],
        [facts.JobChanged(first, True, 2, 4)],
        [admitted_job(second, "judge")],
        [
            facts.JobOver(
                *(second, JobState.FAILED, 5_000, None, ErrorKind.INVALID, "line 3", {"loss": 1.5})
            )
        ],
        [admitted_job(gone, "gone")],
        [facts.JobOver(gone, JobState.DONE, 5_500, b"w" * 32)],
        [facts.JobsForgotten([gone], 6_000)],
    ]


def deployment_facts() -> list[list[AnyFact]]:
    """Names that serve entries of the model table."""
    proved = ["bot@0000aaaa"]
    rolling = facts.Deployed(
        *("bot", "bot@0000bbbb", "bot@0000aaaa", proved, 2, "cuda:0"),
        *(DeploymentState.ROLLING, "", 1_790_000_003),
    )
    failed = structs.replace(rolling, state=DeploymentState.FAILED, detail="it is damaged")
    return [
        [facts.Booted(1, 500, 1_790_000_000_000_000_000)],
        [facts.ModelRegistered(_named(f"bot@0000{four}"), False) for four in ("aaaa", "bbbb")],
        [facts.ModelRegistered(_named("bot@0000cccc"), False)],
        [rolling],
        [admitted(0, model="bot@0000bbbb", deployment="bot")],
        [failed, facts.ThreadMoved(b"\0\0\0\1\0\0\0\0", "bot@0000aaaa")],
        [structs.replace(rolling, name="gone"), facts.Undeployed("gone")],
        [facts.ModelRetired("bot@0000cccc")],
    ]


SETS: dict[str, Callable[[], list[list[AnyFact]]]] = {
    "facts-format-1": all_facts,
    "jobs-format-1": job_facts,
    "deployments-format-1": deployment_facts,
}
"""By the name of the file."""


def _named(name: str) -> ModelEntry:
    return ModelEntry(name, "/models/gone", b"g" * 16, "GPT2LMHeadModel", 1024, 50_257, 5)


def main() -> None:
    """The command."""
    made, folder = SETS[sys.argv[1]](), Path(sys.argv[2])
    journal, records = Journal.open(folder, Options(bytes_max=1 << 22, segment_bytes=1 << 16))
    assert list(records) == []
    for together in made:
        for record in turns.encode(together):
            journal.append(record)
    journal.close()


if __name__ == "__main__":
    main()
