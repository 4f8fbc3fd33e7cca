"""The one table of message kinds.

One number range a conversation; numbers are never reused.  0x8000 and above belong to plug-in
services: their kinds are scoped by the service name in the header's target and are routed by
the kernel without being decoded.
"""

from typing import Final

from llmproto import (
    connection,
    execution,
    generation,
    init,
    metrics,
    models,
    operation,
    tenants,
    threads,
)
from llmproto.base import Message, Opaque

PLUGIN_KIND_FIRST: Final = 0x8000

KINDS: Final[dict[int, type[Message]]] = {
    0x0001: connection.Failed,
    0x0002: connection.Hello,
    0x0003: connection.Welcome,
    0x0004: connection.Unknown,
    0x0005: connection.Beat,
    0x0006: connection.Working,
    0x0007: connection.Goodbye,
    0x0101: generation.Generate,
    0x0102: generation.Accepted,
    0x0103: generation.Text,
    0x0104: generation.StreamAcked,
    0x0105: generation.Attach,
    0x0106: generation.Attached,
    0x0107: generation.TokenizeAsk,
    0x0108: generation.Tokenized,
    0x0201: threads.ThreadSpawn,
    0x0202: threads.ThreadSpawned,
    0x0203: threads.SinkOpen,
    0x0204: threads.Committed,
    0x0205: threads.SinkAcked,
    0x0206: threads.ThreadEnd,
    0x0207: threads.ThreadCancel,
    0x0208: threads.ThreadSuspend,
    0x0209: threads.ThreadResume,
    0x020A: threads.ThreadRenice,
    0x020B: threads.Done,
    0x020C: threads.SinkDrop,
    0x020D: threads.ThreadAdopt,
    0x0301: execution.ExecutorReady,
    0x0302: execution.Run,
    0x0303: execution.Stepped,
    0x0304: execution.Resync,
    0x0305: execution.Drop,
    0x0306: execution.GaveBack,
    0x0307: execution.Refused,
    0x0308: execution.LoadFailed,
    0x0401: models.ModelAdd,
    0x0402: models.ModelAdded,
    0x0403: models.ModelRegister,
    0x0404: models.ModelAsk,
    0x0405: models.ModelFound,
    0x0406: models.ModelsAsk,
    0x0407: models.Models,
    0x0408: models.ModelRemove,
    0x0409: models.ModelLoad,
    0x0501: operation.ProcessesAsk,
    0x0502: operation.Processes,
    0x0503: operation.ThreadsAsk,
    0x0504: operation.Threads,
    0x0505: operation.StatusAsk,
    0x0506: operation.Status,
    0x0507: operation.ProcessKill,
    0x0508: operation.ProcessStarted,
    0x0509: operation.Shutdown,
    0x050A: operation.Note,
    0x0601: tenants.KeyPresent,
    0x0602: tenants.KeyPresented,
    0x0603: tenants.KeyAdd,
    0x0604: tenants.KeyRemove,
    0x0605: tenants.KeysAsk,
    0x0606: tenants.Keys,
    0x0701: metrics.Metrics,
    0x0702: metrics.MetricsAsk,
    0x0703: metrics.MetricsText,
    0x0801: init.Fork,
    0x0802: init.Signal,
    0x0803: init.KernelBeat,
    0x0804: init.Halt,
    0x0805: init.Promoted,
    0x0806: init.Forked,
    0x0807: init.Exited,
    0x0808: init.Stop,
}

KIND_OF: Final[dict[type[Message], int]] = {message: kind for kind, message in KINDS.items()}


def kind_of(message: Message) -> int:
    """What its header says; KeyError for a struct that stands in no table."""
    return message.kind if isinstance(message, Opaque) else KIND_OF[type(message)]
