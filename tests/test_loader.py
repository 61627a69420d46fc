import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CHATML, byte_level_tokenizer

from neo.data.loader import EpochLoader, TooManyBadRows
from neo.data.order import RowStream
from neo.data.packing import RowReport
from neo.data.prompt import PromptEncoder

GOOD = {"prompt": "q", "completion": "a"}
BAD = {"prompt": "q"}


def loader_of(rows, *, num_workers=0, max_length=64, shuffle=False, **options) -> EpochLoader:
    encoder = PromptEncoder(byte_level_tokenizer(CHATML), max_length)
    settings = {"batch_size": 1, "packing": False, "shuffle": shuffle, "seed": 0}
    stream = RowStream(rows, np.arange(len(rows)), encoder, "prompt_completion", **settings)
    options = {"begin": lambda: (0, 0)} | options
    return EpochLoader(stream, num_workers=num_workers, **options)


def test_a_pass_reads_the_epoch_that_it_is_told():
    epoch = 0
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(20)]
    loader = loader_of(rows, shuffle=True, begin=lambda: (epoch, 0))
    passes = []
    for epoch in (0, 1, 0):  # noqa: B007  the loader asks for it
        passes.append([b.input_ids.tolist() for b in loader])
    assert passes[0] == passes[2] != passes[1]


def test_skipped_batches_are_told_and_not_given():
    told = []
    loader = loader_of([GOOD] * 50, begin=lambda: (0, 30), skipped=told.append)
    batches = list(loader)
    assert (len(told), len(batches)) == (30, 20)
    assert sum((b.report for b in batches), start=sum(told, start=RowReport())).rows == 50


def test_an_epoch_that_is_skipped_whole_is_followed_by_the_next():
    begins, ends = iter([(3, 5), (4, 0)]), []
    loader = loader_of([GOOD] * 5, begin=lambda: next(begins), end=lambda: ends.append(1))
    assert len(list(loader)) == 5
    assert len(ends) == 2


def test_skipping_more_than_there_is_says_that_the_data_changed():
    with pytest.raises(ValueError, match=r"after 6 batches of epoch 0: the data gives only 5"):
        list(loader_of([GOOD] * 5, begin=lambda: (0, 6)))


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


def test_ranks_with_fewer_batches_go_on_with_empty_ones(monkeypatch):
    # this rank has 2 batches, the other one 4
    others = iter([1, 1, 1, 1, 0])
    asked = []

    def all_reduce(numbers):
        numbers += torch.tensor([next(others), 1])
        asked.append(numbers.tolist())

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    loader = loader_of([GOOD] * 4)
    loader.stream.world_size = 2
    batches = list(loader)
    assert [bool(batch.num_supervised) for batch in batches] == [True, True, False, False]
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
