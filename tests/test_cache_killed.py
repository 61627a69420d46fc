"""A cache that was killed, ran out of disk, or was written by two, is the one that never was."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from caches import KINDS, ROWS, contents, forked, small_shards, typed, write
from devices import environment
from lab import write_rows

from neo.config import ConfigError
from neo.teachers import durable, shard_writers
from neo.teachers.durable import CacheError
from neo.teachers.store import CacheFolder
from neo.training import cache_writing
from neo.training.cache_standing import CacheIsBusy, lock_cache

NUM_KILLS = 10


@pytest.fixture(autouse=True)
def _many_shards():
    with small_shards(8):
        yield


@pytest.fixture(scope="module")
def overrides(tmp_path_factory, student_dir, teacher_dir):
    rows = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)
    return typed(student_dir, teacher_dir, rows, *KINDS["sampled"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, overrides):
    folder = tmp_path_factory.mktemp("caches") / "cache"
    with small_shards(8):
        write(folder, overrides)
    return contents(folder)


def killed_at(number):
    """Has this process killed in the middle of its so many-th renaming of a file."""
    done = []
    replace = os.replace

    def replaced(*paths):
        done.append(paths)
        if len(done) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    return lambda: setattr(os, "replace", replaced)


def test_killed_between_its_files_and_started_again_it_is_the_same(
    tmp_path, overrides, undisturbed
):
    out = tmp_path / "cache"
    for number in (4, 9):  # of a shard's .bin, and of its .index
        process = forked(out, overrides, killed_at(number))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert list(out.glob(".*.partial"))  # a trace, which whoever goes on removes
        with pytest.raises(CacheError, match="not finished"):
            CacheFolder.open(out)
    write(out, overrides)
    assert contents(out) == undisturbed


@pytest.mark.slow
def test_killed_before_its_certificate_it_gets_one_after_all(tmp_path, overrides, undisturbed):
    out = tmp_path / "cache"
    process = forked(out, overrides, lambda: setattr(CacheFolder, "open", kill))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not CacheFolder.open(out).manifest.certificate
    write(out, overrides)
    assert contents(out) == undisturbed


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_ten_times_at_random_moments_it_is_the_same(tmp_path, overrides, kind):
    words = [o for o in overrides if not o.startswith("teacher.") or "path" in o]
    words += [*KINDS[kind], "data.batch_size=1"]
    chance = random.Random(kind)
    with small_shards(2):
        write(tmp_path / "whole", words)
        out = tmp_path / "cache"
        killed = []
        for number in range(NUM_KILLS):
            process = forked(out, words)
            deadline = time.monotonic() + 60
            wanted = 2 * number + chance.randint(0, 2)
            while len(list(out.glob("*.done"))) < wanted and process.is_alive():
                assert time.monotonic() < deadline
            time.sleep(chance.uniform(0, 0.02))
            process.kill()
            process.join()
            killed.append(process.exitcode)
        assert killed.count(-signal.SIGKILL) == NUM_KILLS
        write(out, words)
    assert contents(out) == contents(tmp_path / "whole")


def rank_of_two(rank):
    values = {
        "TORCHELASTIC_RUN_ID": "x", "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1,
    }  # fmt: skip
    return lambda: os.environ.update({name: str(value) for name, value in values.items()})


def test_two_processes_write_what_one_does(tmp_path, overrides, undisturbed):
    out = tmp_path / "cache"
    split = [*overrides, "trainer.devices=2", "trainer.strategy=ddp"]
    processes = [forked(out, split, rank_of_two(rank)) for rank in (1, 0)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert contents(out) == undisturbed


@pytest.mark.slow
def test_one_command_writes_in_two_processes_what_one_does(tmp_path, overrides):
    for name, more in (("one", ()), ("two", ("trainer.devices=2", "trainer.strategy=ddp"))):
        done = subprocess.run(
            [sys.executable, "-m", "neo.cache", *overrides, *more, f"out={tmp_path / name}"],
            env=environment(), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("certificate, from") == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@contextmanager
def largest_file(num_bytes):
    """Within it no file of this process may grow past that size, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_span_on(num_bytes):
    write_span = cache_writing.write_span

    def written(*arguments):  # and no more than that: memory that processes share is files, too
        with largest_file(num_bytes):
            return write_span(*arguments)

    return written


def test_a_full_disk_is_told_and_the_next_call_goes_on(
    tmp_path, overrides, undisturbed, monkeypatch
):
    out = tmp_path / "cache"
    sizes = [len(content) for name, content in undisturbed.items() if name.endswith(".bin")]
    with monkeypatch.context() as patch:
        patch.setattr(cache_writing, "write_span", write_span_on(max(sizes) - 1))
        with pytest.raises(CacheError, match=r"could not be written.*Make room and start again"):
            write(out, overrides)
    assert not list(out.glob(".*.partial"))
    finished = {name for name in contents(out) if name.endswith((".bin", ".index"))}
    assert {file.removesuffix(".bin") + ".index" for file in finished if "bin" in file} <= finished

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shard_writers.os, "fsync", full)
        patch.setattr(durable.os, "fsync", full)
        with pytest.raises(CacheError, match="No space left on device"):
            write(out, overrides)
    write(out, overrides)
    assert contents(out) == undisturbed


def test_a_disk_that_is_too_small_is_refused_with_both_numbers(
    tmp_path, overrides, undisturbed, monkeypatch
):
    size = sum(len(content) for name, content in undisturbed.items() if "shard" in name)
    usage = shutil.disk_usage(tmp_path)

    def left(_):
        return usage._replace(free=size // 3)

    monkeypatch.setattr("neo.training.cache_estimate.shutil.disk_usage", left)
    with pytest.raises(ConfigError, match=rf"{size // 3:,} bytes\)\. Make room"):
        write(tmp_path / "cache", overrides)
    assert not (tmp_path / "cache").exists()
    # what is written already is not counted
    process = forked(tmp_path / "other", overrides, lambda: (undo(usage), killed_at(16)()))
    process.join()
    done = sum(f.stat().st_size for f in (tmp_path / "other").glob("shard*") if f.suffix != ".done")
    assert size / 3 < done < size
    monkeypatch.setattr(
        "neo.training.cache_estimate.shutil.disk_usage",
        lambda _: usage._replace(free=size - done + size // 3),
    )
    write(tmp_path / "other", overrides)
    assert contents(tmp_path / "other") == undisturbed


def undo(usage):
    shutil.disk_usage = lambda _: usage


def test_two_commands_at_once_do_not_write_the_same_cache(tmp_path, overrides, monkeypatch):
    monkeypatch.setattr("neo.cache.lock_cache", lambda folder: lock_cache(folder, 0.1))
    with (
        lock_cache(tmp_path / "cache"),
        pytest.raises(CacheIsBusy, match="another process is writing this cache"),
    ):
        write(tmp_path / "cache", overrides)
