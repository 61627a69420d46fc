"""Batches prepared by a thread while the step before them runs."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from neo.data.packing import Batch

# Batches that are prepared, or being so, while one is trained on.
DEPTH = 2


class Prepare:
    """What is done to a batch before it is given out.

    Args:
        prepare: Called in a thread of its own, batch by batch in their order.

    Attributes:
        waited_s: How long whoever asked for batches has waited for it, in all.
        num_batches: How many were given.
    """

    def __init__(self, prepare: Callable[[Batch], Batch]) -> None:
        self.prepare = prepare
        self.waited_s, self.num_batches = 0.0, 0

    def ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches prepared, in their order; those that come are read `DEPTH` ahead.

        What the batches themselves come from stays in the caller's thread: it may talk to other
        processes.
        """
        waiting: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="prepare") as thread:
            for batch in batches:
                waiting.append(thread.submit(self.prepare, batch))
                if len(waiting) > DEPTH:
                    yield self._given(waiting.popleft())
            while waiting:
                yield self._given(waiting.popleft())

    def _given(self, future: Future[Batch]) -> Batch:
        began = time.perf_counter()
        batch = future.result()
        self.waited_s += time.perf_counter() - began
        self.num_batches += 1
        return batch
