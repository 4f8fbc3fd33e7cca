"""For all tests of services: one thread of the processor, as an executor of so small a model takes.

Two threads that wait for one another are many times slower than one wherever something else runs.
"""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
