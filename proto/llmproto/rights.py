"""The one table of rights: which role may send which message, what right an HTTP route asks for.

Deny by default: a kind that is not listed is refused to everybody.  Rights belong to connections
(from the role proof said at Hello) and to API keys; nothing that a peer says of itself counts.
"""

import enum
from typing import Final

from llmproto import (
    connection,
    data,
    encoding,
    execution,
    generation,
    jobs,
    metrics,
    models,
    operation,
    tenants,
    threads,
    versions,
)
from llmproto.base import Message


class Right(enum.StrEnum):
    """What a connection or a key may do."""

    USE = "use"
    """Generate, look at own threads."""
    OPERATE = "operate"
    """Add models and keys, kill, shut down, see every tenant."""
    SINK = "sink"
    """Spawn threads for requests that were sent to it, deliver their text."""
    EXECUTE = "execute"
    """Run threads."""
    GATE = "gate"
    """Present API keys and act for their tenants."""
    SERVE = "serve"
    """Answer requests, report metrics and state."""
    WORK = "work"
    """Carry out a job: ask data and store on its behalf, report its steps."""
    KEEP = "keep"
    """Answer for versions, deploy them."""


ROLES: Final[dict[str, frozenset[Right]]] = {
    "client": frozenset({Right.USE}),
    "operator": frozenset({Right.USE, Right.OPERATE}),
    "gateway": frozenset({Right.USE, Right.GATE, Right.SERVE}),
    "tokenizer": frozenset({Right.SINK, Right.SERVE}),
    "executor": frozenset({Right.EXECUTE, Right.SERVE}),
    "monitor": frozenset({Right.SERVE}),
    "store": frozenset({Right.SERVE, Right.KEEP, Right.OPERATE}),
    "data": frozenset({Right.SERVE}),
    "trainer": frozenset({Right.SERVE, Right.WORK}),
    "evaluator": frozenset({Right.SERVE, Right.WORK, Right.USE}),
}
"""Rights of each role; any other role is a plug-in service."""

PLUGIN_RIGHTS: Final = frozenset({Right.USE, Right.SERVE})

_EVERYBODY: Final = frozenset(Right)
_USERS: Final = frozenset({Right.USE, Right.OPERATE})
_WORKERS: Final = frozenset({Right.WORK, Right.OPERATE})
_KEEPERS: Final = frozenset({Right.KEEP})
_SERVERS: Final = frozenset({Right.SERVE})

KIND_RIGHTS: Final[dict[type[Message], frozenset[Right]]] = {
    connection.Failed: _EVERYBODY,
    connection.Hello: _EVERYBODY,
    connection.Beat: _EVERYBODY,
    connection.Goodbye: _EVERYBODY,
    connection.Working: frozenset({Right.SERVE}),
    generation.Generate: _USERS,
    generation.Accepted: frozenset({Right.SINK}),
    generation.Text: frozenset({Right.SINK}),
    generation.StreamAcked: _USERS,
    generation.Attach: _USERS,
    generation.Attached: frozenset({Right.SINK}),
    generation.TokenizeAsk: _USERS,
    generation.Tokenized: frozenset({Right.SINK}),
    threads.ThreadSpawn: frozenset({Right.SINK}),
    threads.SinkAcked: frozenset({Right.SINK}),
    threads.ThreadEnd: frozenset({Right.SINK}),
    threads.ThreadAdopt: frozenset({Right.SINK}),
    threads.ThreadCancel: frozenset({Right.USE, Right.OPERATE, Right.SINK}),
    threads.ThreadSuspend: _USERS,
    threads.ThreadResume: _USERS,
    threads.ThreadRenice: _USERS,
    threads.Done: frozenset({Right.SERVE, Right.SINK}),
    execution.ExecutorReady: frozenset({Right.EXECUTE}),
    execution.Stepped: frozenset({Right.EXECUTE}),
    execution.GaveBack: frozenset({Right.EXECUTE}),
    execution.Refused: frozenset({Right.EXECUTE}),
    execution.LoadFailed: frozenset({Right.EXECUTE}),
    models.ModelAdd: frozenset({Right.OPERATE}),
    models.ModelAdded: frozenset({Right.SINK}),
    models.ModelRegister: frozenset({Right.SINK}),
    models.ModelAsk: _EVERYBODY,
    models.ModelsAsk: _EVERYBODY,
    models.ModelRemove: frozenset({Right.OPERATE}),
    models.ModelLoad: _USERS,
    models.ModelDeploy: _KEEPERS,
    models.ModelUndeploy: frozenset({Right.OPERATE}),
    models.DeploymentsAsk: _EVERYBODY,
    operation.ProcessesAsk: _EVERYBODY,
    operation.ThreadsAsk: _EVERYBODY,
    operation.StatusAsk: _EVERYBODY,
    operation.ProcessKill: frozenset({Right.OPERATE}),
    operation.ProcessStarted: frozenset({Right.SERVE}),
    operation.Shutdown: frozenset({Right.OPERATE}),
    operation.Note: frozenset({Right.SERVE}),
    tenants.KeyPresent: frozenset({Right.GATE}),
    tenants.KeyAdd: frozenset({Right.OPERATE}),
    tenants.KeyRemove: frozenset({Right.OPERATE}),
    tenants.KeysAsk: frozenset({Right.OPERATE}),
    metrics.Metrics: frozenset({Right.SERVE}),
    metrics.MetricsAsk: _EVERYBODY,
    metrics.MetricsText: frozenset({Right.SERVE}),
    jobs.JobSpawn: frozenset({Right.OPERATE}),
    jobs.StepsDone: frozenset({Right.WORK}),
    jobs.CheckpointCommitted: frozenset({Right.WORK}),
    jobs.JobEnded: frozenset({Right.WORK}),
    jobs.JobStopped: frozenset({Right.WORK}),
    jobs.JobAsk: _EVERYBODY,
    jobs.JobsAsk: _EVERYBODY,
    versions.Save: _WORKERS,
    versions.Saved: _KEEPERS,
    versions.Import: _WORKERS,
    versions.Export: frozenset({Right.OPERATE}),
    versions.VersionAsk: _EVERYBODY,
    versions.VersionFound: _KEEPERS,
    versions.VersionsAsk: _EVERYBODY,
    versions.Versions: _KEEPERS,
    versions.TagSet: _WORKERS,
    versions.TagRemove: frozenset({Right.OPERATE}),
    versions.VersionRemove: frozenset({Right.OPERATE}),
    versions.Verify: frozenset({Right.OPERATE}),
    versions.Verified: _KEEPERS,
    versions.Collect: frozenset({Right.OPERATE}),
    versions.Collected: _KEEPERS,
    versions.MetricsRecord: _WORKERS,
    versions.Deploy: _WORKERS,
    versions.Deploying: _KEEPERS,
    versions.Rollback: frozenset({Right.OPERATE}),
    encoding.Encode: _USERS,
    encoding.Encoded: frozenset({Right.SINK}),
    encoding.Vectors: frozenset({Right.EXECUTE}),
    data.Prepare: _WORKERS,
    data.Prepared: _SERVERS,
    data.SegmentAsk: _WORKERS,
    data.Segment: _SERVERS,
    data.RowsAsk: _WORKERS,
    data.Rows: _SERVERS,
    data.DataClean: frozenset({Right.OPERATE}),
    data.DataAugment: frozenset({Right.OPERATE}),
    data.DataInspect: frozenset({Right.OPERATE}),
    data.DataReport: _SERVERS,
    data.TokenizerMake: _WORKERS,
    data.TokenizerMade: _SERVERS,
}
"""A sender needs one of these.  What only the kernel sends stands nowhere here."""

ROUTE_RIGHTS: Final[dict[tuple[str, str], Right | None]] = {
    ("GET", "/health"): None,
    ("GET", "/openapi.json"): None,
    ("GET", "/metrics"): Right.USE,
    ("GET", "/v1/models"): Right.USE,
    ("GET", "/v1/models/{model}"): Right.USE,
    ("POST", "/v1/completions"): Right.USE,
    ("POST", "/v1/chat/completions"): Right.USE,
    ("POST", "/v1/embeddings"): Right.USE,
    ("POST", "/v1/classify"): Right.USE,
    ("GET", "/v1/streams/{stream}"): Right.USE,
    ("DELETE", "/v1/streams/{stream}"): Right.USE,
}
"""What an HTTP route asks of a key; `None`: open to everybody."""
