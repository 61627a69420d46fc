import os
import signal
from contextlib import ExitStack, suppress
from multiprocessing import get_context

import pytest

from neo.teachers.durable import CacheError
from neo.teachers.row_locks import RowLocks
from neo.teachers.shards import RowKey

SPAWN = get_context("spawn")
KEYS = [RowKey(0, number) for number in (7, 3, 5)] + [RowKey(1, 3)]
ASCENDING = [RowKey(0, 3), RowKey(1, 3), RowKey(0, 5), RowKey(0, 7)]


def _hold(folder, keys, pipe):
    locks = RowLocks(folder)
    with locks.held(keys) as got:
        pipe.send(got)
        pipe.recv()
    pipe.send("released")


class Other:
    """A process that holds rows until it is told, or killed."""

    def __init__(self, folder, keys):
        self.pipe, there = SPAWN.Pipe()
        self.process = SPAWN.Process(target=_hold, args=(folder, keys, there), daemon=True)
        self.process.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()


def test_what_another_process_holds_is_left_out_until_it_lets_go(tmp_path):
    locks = RowLocks(tmp_path)
    with Other(tmp_path, KEYS[:2]) as other:
        assert other.pipe.recv() == [RowKey(0, 3), RowKey(0, 7)]
        with locks.held(KEYS, wait=False) as got:
            assert got == [RowKey(1, 3), RowKey(0, 5)]
        other.pipe.send("go")
        assert other.pipe.recv() == "released"
        with locks.held(KEYS, wait=False) as got:
            assert got == ASCENDING


def test_a_killed_process_holds_nothing(tmp_path):
    locks = RowLocks(tmp_path)
    with Other(tmp_path, KEYS) as other:
        other.pipe.recv()
        with locks.held(KEYS, wait=False) as got:
            assert got == []
        os.kill(other.process.pid, signal.SIGKILL)
        with locks.held(KEYS) as got:  # which waits, were it needed
            assert got == ASCENDING


def test_one_waits_until_rows_are_free(tmp_path):
    locks = RowLocks(tmp_path)
    with ExitStack() as others:
        with locks.held(KEYS[2:]) as got:
            assert got == [RowKey(1, 3), RowKey(0, 5)]
            other = others.enter_context(Other(tmp_path, KEYS))
            other.pipe.send("go")
            assert not other.pipe.poll(2)  # it takes a while to start
        assert other.pipe.recv() == ASCENDING


def test_rows_asked_for_twice_are_held_once_and_are_free_behind_an_error(tmp_path):
    locks = RowLocks(tmp_path)
    given = []
    with suppress(KeyError), locks.held([*KEYS, *KEYS]) as got:
        given += got
        raise KeyError
    assert given == ASCENDING
    with Other(tmp_path, KEYS) as other:
        assert other.pipe.recv() == ASCENDING
    locks.close()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    locks = RowLocks(tmp_path)
    monkeypatch.setattr("fcntl.lockf", none)
    with (
        pytest.raises(CacheError, match="locks: cannot be locked: No locks available"),
        locks.held(KEYS),
    ):
        pass
