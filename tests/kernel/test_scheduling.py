"""The queue's order and its bounds."""

from hypothesis import given
from hypothesis import strategies as st
from llmkernel.facts import ThreadAdmitted
from llmkernel.scheduling import HEAP_SLACK, Queue, urgency, victim
from llmkernel.threads import Thread
from llmproto.generation import Sampling


def thread(number: int, *, service_class: int = 1, priority: int = 0, model: str = "m") -> Thread:
    return Thread(
        ThreadAdmitted(
            thread=number.to_bytes(8),
            tenant=1,
            session=bytes(16),
            key=number.to_bytes(16),
            index=0,
            digest=bytes(16),
            model=model,
            tokens=bytes(4),
            prompt_tokens=1,
            output_tokens_max=1,
            sampling=Sampling(),
            sink="tokenizer",
            sink_state=b"",
            service_class=service_class,
            priority=priority,
            deadline_ns=None,
            resumable=False,
            admitted_ns=number,
        )
    )


def test_class_then_priority_then_age() -> None:
    threads = [
        thread(4, service_class=0),
        thread(3, priority=7),
        thread(1),
        thread(2),
        thread(0, service_class=3, priority=7),
    ]
    shuffled = [threads[i] for i in (3, 1, 4, 0, 2)]
    assert sorted(shuffled, key=urgency) == threads


def test_the_victim_is_the_least_urgent_of_a_lower_class() -> None:
    residents = [thread(1), thread(2, service_class=2), thread(3, service_class=2)]
    assert victim(residents, thread(9)) is residents[2]
    assert victim(residents, thread(9, service_class=2)) is None
    assert victim([], thread(9)) is None


@given(
    st.lists(st.tuples(st.sampled_from(["push", "remove", "renice", "take"]), st.integers(0, 9)))
)
def test_the_queue_against_a_sorted_list(steps: list[tuple[str, int]]) -> None:
    threads = [thread(i, model="mn"[i % 2]) for i in range(10)]
    queue = Queue()
    model: dict[int, Thread] = {}
    for what, number in steps:
        one = threads[number]
        match what:
            case "push":
                queue.push(one)
                model[number] = one
            case "remove":
                queue.remove(one)
                model.pop(number, None)
            case "renice" if number in model:
                one.priority = (one.priority + 5) % 8
                queue.push(one)
            case "take":
                expected = min(
                    (t for t in model.values() if t.model == "m"), key=urgency, default=None
                )
                assert queue.first("m") is expected
                if expected is not None:
                    queue.remove(expected)
                    del model[threads.index(expected)]
        assert len(queue) == len(model)
        assert sorted(queue.models()) == sorted({t.model for t in model.values()})
        for name in "mn":
            mine = sorted((t for t in model.values() if t.model == name), key=urgency)
            assert queue.all_waiting(name) == mine
        assert all((t in queue) == (i in model) for i, t in enumerate(threads))


def test_threads_that_come_and_go_do_not_fill_the_heap() -> None:
    queue = Queue()
    queue.push(thread(0))
    restless = thread(1)
    for _ in range(10 * HEAP_SLACK):
        queue.push(restless)
        queue.remove(restless)
    assert queue.entries <= HEAP_SLACK + 4
