"""The monitor's answers, with a port whose kernel is the test."""

import asyncio

from libllm.events import Answer, Call, Event
from libllm.port import Port
from libllm.service import Request
from llmproto.base import Header, Message
from llmproto.connection import Failed
from llmproto.errors import ErrorKind
from llmproto.metrics import Metrics, MetricsAsk, Sample
from llmproto.operation import Processes, ProcessesAsk, Status, StatusAsk
from llmservices.monitor.service import MonitorService

STATUS = Status(True, "1.0", 3, 10, tokens_committed=10)


class KernelPort(Port):
    """Answers the monitor's questions at once."""

    def __init__(self, answers: dict[type[Message], Message]) -> None:
        super().__init__(self._answer)
        self._answers = answers

    def _answer(self, event: Event) -> None:
        if isinstance(event, Call):
            answer = self._answers[type(event.message)]
            asyncio.get_running_loop().call_soon(self.deliver, Answer(event.call, answer))


async def test_reports_and_the_kernel_make_one_text() -> None:
    port = KernelPort({StatusAsk: STATUS, ProcessesAsk: Processes([])})
    service = MonitorService(port)
    request = Request(Header(1, 0x0702, b"i" * 16), port)
    service.take(Metrics("tokenizer", 1, counters=[Sample("llmos_texts_total", 4.0)]), request)
    text = (await service.ask(MetricsAsk(), request)).text
    assert 'llmos_texts_total{process="tokenizer"} 4.0' in text
    assert 'llmos_tokens_committed_total{process="kernel"} 10.0' in text
    assert set(service.handlers()) == {Metrics, MetricsAsk}


async def test_a_kernel_that_does_not_answer_is_left_out() -> None:
    failed = Failed(ErrorKind.DEADLINE, "no answer")
    port = KernelPort({StatusAsk: failed, ProcessesAsk: failed})
    service = MonitorService(port)
    request = Request(Header(1, 0x0702, b"i" * 16), port)
    assert "llmos_kernel_up 0.0" in (await service.ask(MetricsAsk(), request)).text
