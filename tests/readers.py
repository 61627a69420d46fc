"""Ranks and workers played one after another in the test's own process."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from threading import Barrier, BrokenBarrierError, local
from types import SimpleNamespace
from typing import ClassVar

import torch
from conftest import CHATML, byte_level_tokenizer
from torch.utils.data import DataLoader

from neo.data.datamodule import Data, DataModule
from neo.data.packing import Batch, pack
from neo.data.prompt import PromptEncoder
from neo.data.ranks import Ranks
from neo.data.reader import RowStream

TOKENIZER = byte_level_tokenizer(CHATML)
NUM_ROWS = 30


class Streamed:
    """Rows that can only be read from the beginning."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@dataclass(frozen=True, kw_only=True)
class GivenData(Data):
    """Rows given by the test, as a table or as a stream."""

    given: list = field(default_factory=list)
    table: bool = True
    max_length: int = 64
    batch_size: int = 2
    val_share: float = 0.0

    def rows(self):
        return self.given if self.table else Streamed(self.given)


def mixed_rows(num: int = NUM_ROWS) -> list[dict[str, str]]:
    """Rows of many lengths; every seventh is bad, some are cut off."""
    return [
        {"prompt": "q"} if i % 7 == 3 else {"prompt": "q", "completion": "x" * (1 + i * 13 % 61)}
        for i in range(num)
    ]


class Fellows(Ranks):
    """Ranks that are threads of one process."""

    def __init__(self, modules: list["RankModule"], rank: int, barrier: Barrier) -> None:
        super().__init__(rank, len(modules))
        self.modules, self.barrier = modules, barrier
        self.numbers: list[int] = []

    def sum(self, numbers):
        self.numbers = list(numbers)
        self.barrier.wait()
        told = [module.fellows.numbers for module in self.modules]
        total = [sum(parts) for parts in zip(*told, strict=True)]
        self.barrier.wait()
        return total

    def gather(self, mine):
        return [module._epoch.of_rank() for module in self.modules]


class RankModule(DataModule):
    """The data of one rank among others in the same process."""

    fellows: Fellows

    rank = property(lambda self: self.fellows.rank)
    world_size = property(lambda self: self.fellows.world_size)
    ranks = property(lambda self: self.fellows)


def modules_of(rows, world_size: int = 1, *, seed: int = 5, **changes) -> list[RankModule]:
    """The modules of all ranks."""
    modules = [
        RankModule(GivenData(given=rows, **changes), TOKENIZER, seed) for _ in range(world_size)
    ]
    barrier = Barrier(world_size)
    for rank, module in enumerate(modules):
        module.fellows = Fellows(modules, rank, barrier)
    return modules


class InProcess(DataLoader):
    """torch's DataLoader, its workers played in turn: in their order, the exhausted left out."""

    playing = local()

    def __init__(self, stream, *, num_workers, **_) -> None:
        super().__init__(stream, batch_size=None)
        self.num_played = num_workers

    def __iter__(self) -> Iterator[Batch]:
        workers = [
            (SimpleNamespace(id=i, num_workers=self.num_played), iter(self.dataset))
            for i in range(self.num_played)
        ] or [(None, iter(self.dataset))]
        while workers:
            for pair in list(workers):
                self.playing.worker, batches = pair
                batch = next(batches, None)
                if batch is None:
                    workers.remove(pair)
                else:
                    yield batch


class Remembering(PromptEncoder):
    """Encodes each conversation once in all tests together, and counts how often it was asked."""

    num_asked = 0
    known: ClassVar[dict] = {}

    def encode(self, conversation):
        Remembering.num_asked += 1
        key = (str(conversation), self.max_length)
        if key not in self.known:
            self.known[key] = super().encode(conversation)
        return self.known[key]


def small_sizes(monkeypatch, *, in_process: bool = True) -> None:
    """Few open sequences, small blocks and windows, so that a short epoch has many places."""
    monkeypatch.setattr("neo.data.reader.pack", partial(pack, num_open=3))
    monkeypatch.setattr("neo.data.order.BLOCK", 16)
    monkeypatch.setattr("neo.data.datamodule.RowStream", partial(RowStream, sort_window=4))
    monkeypatch.setattr("neo.data.datamodule.PromptEncoder", cache(Remembering))
    for module in ("reader", "packing"):
        monkeypatch.setattr(f"neo.data.{module}.NUM_SHOWN", 10**6)
    if in_process:
        monkeypatch.setattr("neo.data.loader.DataLoader", InProcess)
        monkeypatch.setattr("neo.data.reader.get_worker_info", lambda: InProcess.playing.worker)


def consume(modules: list[RankModule], num: int | None = None, ahead: int = 0) -> list[Batch]:
    """So many batches of an epoch on every rank, or all; `ahead` were read and not consumed."""
    (epoch,) = {module._begin_pass()[0] for module in modules}

    def play(module: RankModule) -> list[Batch]:
        consumed: list[Batch] = []
        waiting: list[Batch] = []

        def take() -> None:
            module.consume(waiting[0])
            consumed.append(waiting.pop(0))

        try:
            for batch in module.train_dataloader() if num != 0 else ():
                if module.position[0] != epoch:
                    return consumed  # nothing was left, and the next one has begun
                waiting.append(batch)
                if len(waiting) > ahead:
                    take()
                if len(consumed) == num:
                    return consumed
            while waiting and len(consumed) != num:
                take()
        except BaseException:
            module.fellows.barrier.abort()
            raise
        return consumed

    if len(modules) == 1:
        return play(modules[0])
    with ThreadPoolExecutor(len(modules)) as threads:
        parts = [threads.submit(play, module) for module in modules]
    errors = [error for part in parts if (error := part.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, BrokenBarrierError)):
        raise error
    results = [part.result() for part in parts]
    assert len({len(result) for result in results}) == 1
    return [batch for result in results for batch in result]


def resumed(modules: list[RankModule], others: Callable[[], list[RankModule]]) -> list[RankModule]:
    """Others that go on where these stopped; the state has been through a file."""
    states = [through_file(module.state_dict()) for module in modules]
    assert all(state == states[0] for state in states)
    new = others()
    for module in new:
        module.load_state_dict(states[0])
    return new


def through_file(state):
    """The state as `torch.load` gives it, without anything that it would refuse."""
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
