import os
import re
import signal
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CHATML, byte_level_tokenizer

from neo.data.loader import EpochLoader, TooManyBadRows, WorkerDied
from neo.data.packing import RowReport
from neo.data.place import Rest
from neo.data.prompt import PromptEncoder
from neo.data.ranks import Ranks
from neo.data.reader import RowFailed, RowStream

GOOD = {"prompt": "q", "completion": "a"}
BAD = {"prompt": "q"}


def loader_of(rows, *, num_workers=0, max_length=64, shuffle=False, **options) -> EpochLoader:
    encoder = PromptEncoder(byte_level_tokenizer(CHATML), max_length)
    settings = {"batch_size": 1, "packing": False, "shuffle": shuffle, "seed": 0}
    stream = RowStream(rows, np.arange(len(rows)), encoder, "prompt_completion", **settings)
    return EpochLoader(stream, num_workers=num_workers, **options)


def test_a_pass_reads_the_epoch_that_it_is_told():
    epoch = 0
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(20)]
    loader = loader_of(rows, shuffle=True, begin=lambda: (epoch, None))
    passes = []
    for epoch in (0, 1, 0):  # noqa: B007  the loader asks for it
        passes.append([b.input_ids.tolist() for b in loader])
    assert passes[0] == passes[2] != passes[1]


def test_an_epoch_of_which_nothing_is_left_is_followed_by_the_next():
    done = Rest(3, done=np.ones(5, dtype=bool))
    begins, ends = iter([(3, done), (4, None)]), []
    loader = loader_of([GOOD] * 5, begin=lambda: next(begins), end=lambda: ends.append(1))
    assert len(list(loader)) == 5
    assert len(ends) == 2


def test_closing_ends_the_workers_at_once_and_a_pass_starts_others():
    loader = loader_of([GOOD] * 40, num_workers=2)
    for _ in range(2):
        next(iter(loader))
        workers = loader.loader._iterator._workers
        start = time.perf_counter()
        loader.close()
        assert not any(worker.is_alive() for worker in workers)
        assert time.perf_counter() - start < 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_that_are_all_bad_stop_the_pass_before_a_batch(num_workers):
    loader = loader_of([BAD] * 5, num_workers=num_workers)
    with pytest.raises(TooManyBadRows, match=r"none of the 5 rows .*(?s:.)*malformed: 5") as caught:
        next(iter(loader))
    assert "row 0: has no completion" in str(caught.value)


def test_the_first_batch_carries_reports_of_workers_without_one():
    # shard 0 of 2 reads only bad rows and reports them first
    loader = loader_of([BAD, GOOD] * 4, num_workers=2)
    batches = list(loader)
    loader.close()
    assert all(batch.num_supervised for batch in batches)
    total = sum((batch.report for batch in batches), start=RowReport())
    assert (total.rows, total.num_bad) == (8, 4)


def test_no_rows_at_all_are_an_error():
    with pytest.raises(ValueError, match="there are no rows to read"):
        list(loader_of([]))


class Breaking(list):
    """Rows of which the one with index 7 cannot be read."""

    def __init__(self, rows, how):
        super().__init__(rows)
        self.how = how

    def __getitem__(self, index):
        return self.how() if index == 7 else super().__getitem__(index)


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL"),
        pytest.param(
            lambda: os.kill(os.getpid(), signal.SIGSEGV),
            "was killed by SIGSEGV",
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda: os._exit(3), "ended with exit code 3", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_dies_is_named_with_its_row_when_a_batch_is_asked_for(end, told):
    loader = loader_of(Breaking([GOOD] * 40, end), num_workers=2)
    batches = iter(loader)
    next(batches)
    time.sleep(1)  # it reads ahead, and dies: whatever is done meanwhile is not interrupted
    began = time.perf_counter()
    with pytest.raises(WorkerDied) as caught:
        list(batches)
    assert time.perf_counter() - began < 12
    where = rf"data worker 1 of 2 \(pid \d+\) {told} at row 7\. "
    assert re.match(where, str(caught.value))
    assert "lower data.num_workers" in str(caught.value)
    assert loader.loader._iterator is None  # the others have ended too


def fail():
    raise KeyError("content")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_row_that_breaks_the_reading_is_named(num_workers):
    loader = loader_of(Breaking([GOOD] * 40, fail), num_workers=num_workers)
    with pytest.raises(RowFailed) as caught:
        list(loader)
    first, *others = str(caught.value).splitlines()
    who = "data worker 1 of 2: " if num_workers else ""
    assert first.startswith(f"{who}row 7 cannot be read: KeyError: 'content'. If the row is at")
    assert any("in fail" in line for line in others) == (num_workers > 0)


def test_a_stream_that_breaks_off_is_named_with_the_row_that_did_not_come():
    def rows():
        yield from [GOOD] * 5
        raise ConnectionError("gone")

    loader = loader_of([GOOD])
    loader.stream.rows, loader.stream.indices = rows(), None
    with pytest.raises(RowFailed, match=r"row 5 cannot be read: ConnectionError: gone"):
        list(loader)


def test_ranks_with_fewer_batches_go_on_with_empty_ones(monkeypatch):
    # this rank has 2 batches of a row each, the other one 4 of two
    others = iter([1, 1, 1, 1, 0])
    asked = []

    def all_reduce(numbers, group):
        assert group == "gloo group"
        numbers += torch.tensor([(other := next(others)), 1, 2 * other])
        asked.append(numbers.tolist())

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "nccl")
    monkeypatch.setattr("torch.distributed.new_group", lambda backend: f"{backend} group")
    loader = loader_of([GOOD] * 4, ranks=Ranks(0, 2))
    loader.stream.world_size = 2
    batches = list(loader)
    assert [bool(batch.num_supervised) for batch in batches] == [True, True, False, False]
    assert [batch.num_rows_all_ranks for batch in batches] == [3, 3, 2, 2]
    assert sum(batch.report.rows for batch in batches) == 2
    assert len(asked) == 5


def test_too_many_bad_rows_are_listed_by_reason_with_examples():
    report = RowReport(
        rows=10,
        bad=Counter(empty=2, malformed=1),
        shown={"empty": ((0, "nothing"), (4, "no text")), "malformed": ((7, "no role"),)},
    )
    assert str(TooManyBadRows(report, 2)).splitlines() == [
        "data.max_bad_rows=2: 3 of the 10 rows read so far cannot be trained on:",
        "  empty: 2, among them row 0: nothing; row 4: no text",
        "  malformed: 1, among them row 7: no role",
        "Correct the rows, or raise data.max_bad_rows (null: no limit).",
    ]
