"""Batches are prepared ahead of their turn, in their order, and what goes wrong is told in turn."""

import threading
from dataclasses import replace

import pytest

from neo.data.ahead import DEPTH, Prepare
from neo.data.packing import RowReport, empty_batch


def batches(num):
    return [replace(empty_batch(0, RowReport()), row_ids=(i,)) for i in range(num)]


@pytest.mark.parametrize("num", [0, 1, DEPTH, 3 * DEPTH])
def test_every_batch_comes_prepared_once_and_in_order(num):
    prepare = Prepare(lambda batch: replace(batch, taught=batch.row_ids[0]))
    assert [batch.taught for batch in prepare.ahead(iter(batches(num)))] == list(range(num))
    assert prepare.num_batches == num


def test_batches_are_read_by_the_caller_and_prepared_by_another_thread():
    read, prepared = [], []

    def source():
        for batch in batches(9):
            read.append(threading.get_ident())
            yield batch

    def note(batch):
        prepared.append(threading.get_ident())
        return batch

    given = Prepare(note).ahead(source())
    next(given)
    assert len(read) == DEPTH + 1  # no further ahead than that
    list(given)
    assert set(read) == {threading.get_ident()}
    assert threading.get_ident() not in prepared
    assert len(set(prepared)) == 1


def test_an_error_comes_when_its_batch_would_have():
    def fail(batch):
        if batch.row_ids == (3,):
            raise ValueError("row 3 is damaged")
        return batch

    given = Prepare(fail).ahead(iter(batches(9)))
    assert [next(given).row_ids[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="row 3"):
        next(given)
