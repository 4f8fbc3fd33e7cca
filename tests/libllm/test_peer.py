"""Session and transport over a real socket, kernel restarts included."""

from typing import TYPE_CHECKING

import pytest
from libllm.config import Home
from libllm.connection import Connection, open_connection
from llmproto import limits
from llmproto.connection import Hello
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import TokenizeAsk, Tokenized
from llmproto.operation import Status, StatusAsk

if TYPE_CHECKING:
    from tests.libllm.conftest import FakeKernel

STATUS = Status(True, "0", 1, 1)


async def test_it_proves_itself_and_asks(kernel: "FakeKernel", home: Home) -> None:
    connection = await open_connection(home)
    assert (kernel.hellos[0].role, kernel.hellos[0].proof) == ("client", bytes(32))
    call = connection.port.loop.create_task(connection.port.call(StatusAsk(), Status))
    header, _ = await kernel.hear(StatusAsk)
    kernel.say(STATUS, answers=header)
    assert await call == STATUS
    connection.close()


async def test_a_question_survives_a_restart_of_the_kernel_on_the_same_path(
    kernel: "FakeKernel", home: Home
) -> None:
    connection = await open_connection(home)
    call = connection.port.loop.create_task(connection.port.call(StatusAsk(), Status))
    asked, _ = await kernel.hear(StatusAsk)
    for _ in range(3):
        await kernel.stop()
        kernel.start()
        again, _ = await kernel.hear(StatusAsk)
        assert (again.id, again.epoch) == (asked.id, kernel.epoch)
    kernel.say(STATUS, answers=again)
    assert await call == STATUS
    sessions = {hello.session for hello in kernel.hellos}
    assert len(sessions) == 1 and len(kernel.hellos) >= 4
    connection.close()


async def test_it_connects_once_a_kernel_comes(kernel: "FakeKernel", home: Home) -> None:
    await kernel.stop()
    connection = Connection(home.endpoint, proof=b"")
    kernel.start()
    await kernel.hear(Hello)
    await connection.wait_up(20)
    connection.close()


async def test_without_a_kernel_waiting_ends_with_deadline(home: Home) -> None:
    with pytest.raises(RemoteError) as refused:
        await open_connection(home, timeout_s=0.01)
    assert refused.value.kind is ErrorKind.DEADLINE


async def test_thousands_of_messages_arrive_in_both_directions(
    kernel: "FakeKernel", home: Home
) -> None:
    connection = await open_connection(home)
    answers: list[Tokenized] = []
    done = connection.port.loop.create_future()

    def answered(message: object) -> None:
        assert isinstance(message, Tokenized)
        answers.append(message)
        if len(answers) == 2_000:
            done.set_result(None)

    for _ in range(2_000):
        connection.port.ask(TokenizeAsk(prompt="x"), answered, target="tokenizer")
    for number in range(2_000):
        header, _ = await kernel.hear(TokenizeAsk)
        kernel.say(Tokenized([number], 1), answers=header)
    await done
    assert [answer.tokens[0] for answer in answers] == list(range(2_000))
    connection.close()


async def test_a_message_that_is_too_large_is_refused_to_its_caller(
    kernel: "FakeKernel", home: Home
) -> None:
    connection = await open_connection(home)
    message = TokenizeAsk(prompt="x" * limits.MESSAGE_BYTES_MAX)
    with pytest.raises(RemoteError, match=str(limits.MESSAGE_BYTES_MAX)):
        await connection.port.call(message, Tokenized, target="tokenizer")
    connection.close()
