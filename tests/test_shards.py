import errno
import os
import resource
import signal
from contextlib import suppress
from multiprocessing import get_context

import numpy as np
import pytest
from shard_processes import add_many, add_until_killed, blob_of
from small_cache import IDENTITY, SHAPES, stored

from neo.teachers import durable
from neo.teachers.durable import CacheError, write_whole
from neo.teachers.manifest import begin
from neo.teachers.shard_writers import GrowingShard, ShardWriter
from neo.teachers.shards import RECORD, RowKey, whole_shard
from neo.teachers.store import CacheFolder

SPAWN = get_context("spawn")
# lengths that end on a block, past one and before one
ROWS = [
    (RowKey(number % 2, 7 * number), number + 1, 90 + number, bytes([number + 1]) * length)
    for number, length in enumerate((64, 1, 130, 8, 63, 200))
]


@pytest.fixture
def folder(tmp_path):
    begin(tmp_path, stored("top_k"), SHAPES, IDENTITY, growing=True)
    return tmp_path


def grow(folder, name="auto-a", rows=ROWS):
    with GrowingShard(folder, name) as shard:
        for row in rows:
            shard.add(*row)


def write_rows(folder, rows=ROWS):
    with ShardWriter(folder, "rows-00000") as writer:
        for row in rows:
            writer.add(*row)


def read(cache):
    keys = cache.keys()
    return {key: (*cache.read(key)[:2], bytes(cache.read(key).blob)) for key in keys}


def expected(rows):
    return {key: (num, content, blob) for key, num, content, blob in rows}


def test_rows_are_seen_by_others_as_they_are_added(folder):
    cache = CacheFolder.open(folder)
    assert not cache.manifest.finished
    assert len(cache) == 0
    np.testing.assert_array_equal(cache.missing(0, np.array([0, 14])), [0, 14])
    with GrowingShard(folder, "auto-a") as shard, GrowingShard(folder, "auto-b") as other:
        for number, row in enumerate(ROWS, 1):
            (other if number % 3 == 0 else shard).add(*row)
            assert row[0] not in cache
            cache.refresh()
            assert read(cache) == expected(ROWS[:number])
    assert read(CacheFolder.open(folder)) == expected(ROWS)


def test_a_shard_cut_off_anywhere_gives_the_whole_rows_before_it(folder):
    grow(folder)
    blobs, index = (folder / f"auto-a.{kind}" for kind in ("bin", "index"))
    contents = blobs.read_bytes(), index.read_bytes()
    ends = np.cumsum([-(-len(row[3]) // 64) * 64 for row in ROWS])
    for length in range(0, len(contents[0]), 9):
        blobs.write_bytes(contents[0][:length])
        assert read(CacheFolder.open(folder)) == expected(ROWS[: int((ends <= length).sum())])
    blobs.write_bytes(contents[0])
    for length in range(0, len(contents[1]), 5):
        index.write_bytes(contents[1][:length])
        whole = length // RECORD.itemsize
        assert read(CacheFolder.open(folder)) == expected(ROWS[:whole])
    for lengths in ((100, 100), (300, 250), (129, 144)):
        blobs.write_bytes(contents[0][: lengths[0]])
        index.write_bytes(contents[1][: lengths[1]])
        whole = min(int((ends <= lengths[0]).sum()), lengths[1] // RECORD.itemsize)
        assert read(CacheFolder.open(folder)) == expected(ROWS[:whole])


def test_no_flipped_byte_of_a_growing_shard_passes_unseen(folder):
    grow(folder)
    whole = expected(ROWS)
    for file in (folder / "auto-a.bin", folder / "auto-a.index", folder / "growing.json"):
        content = file.read_bytes()
        for place in range(0, len(content), 7):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(damaged)
            if file.suffix == ".index" and place >= len(content) - RECORD.itemsize:
                # The last record looks as if it was not written to its end: its row is missing.
                assert read(CacheFolder.open(folder)) == expected(ROWS[:-1])
                continue
            with pytest.raises(CacheError, match=file.stem):
                read(CacheFolder.open(folder))
        file.write_bytes(content)
    assert read(CacheFolder.open(folder)) == whole


@pytest.mark.parametrize("kind", ["bin", "index"])
def test_half_a_shard_is_refused_and_says_what_to_do(kind, folder):
    grow(folder)
    (folder / f"auto-a.{kind}").unlink()
    with pytest.raises(CacheError, match=rf"auto-a\.{kind}: is missing; remove auto-a.bin and"):
        CacheFolder.open(folder)


def test_zeros_where_a_record_was_to_come_are_no_row(folder):
    grow(folder)
    with (folder / "auto-a.index").open("ab") as file:
        file.write(bytes(RECORD.itemsize))
    assert read(CacheFolder.open(folder)) == expected(ROWS)


def test_of_a_row_that_two_have_added_one_is_read(folder):
    grow(folder, "auto-a", ROWS[:4])
    grow(folder, "auto-b", [(*row[:3], row[3][::-1]) for row in ROWS[2:]])
    cache = CacheFolder.open(folder)
    assert len(cache) == len(cache.keys()) == len(ROWS)
    assert read(cache) == expected(ROWS)


def test_two_do_not_write_one_shard(folder):
    grow(folder)
    with pytest.raises(CacheError, match=r"auto-a\.bin: could not be written: File exists"):
        GrowingShard(folder, "auto-a")
    with pytest.raises(ValueError, match="name='rows': must begin with auto-"):
        GrowingShard(folder, "rows")


def test_two_processes_that_add_the_same_rows_at_once_do_not_spoil_each_other(folder):
    num_rows = 300
    start = SPAWN.Barrier(3)
    both = [
        SPAWN.Process(target=add_many, args=(folder, f"auto-{name}", start, num_rows), daemon=True)
        for name in "ab"
    ]
    for process in both:
        process.start()
    cache = CacheFolder.open(folder)
    start.wait(60)
    while any(process.is_alive() for process in both):
        cache.refresh()
        for key in cache.keys()[-3:]:
            assert bytes(cache.read(key).blob) == blob_of(key.row_id)
    assert [process.exitcode for process in both] == [0, 0]
    cache.refresh()
    for opened in (cache, CacheFolder.open(folder)):
        keys = opened.keys()
        assert sorted(key.row_id for key in keys) == list(range(num_rows))
        assert all(bytes(opened.read(key).blob) == blob_of(key.row_id) for key in keys)


def test_a_killed_process_leaves_whole_rows(folder):
    process = SPAWN.Process(target=add_until_killed, args=(folder, "auto-a"), daemon=True)
    process.start()
    try:
        cache = CacheFolder.open(folder)
        while len(cache) < 50:
            cache.refresh()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    cache = CacheFolder.open(folder)
    assert len(cache) >= 50
    for key in cache.keys()[:20] + cache.keys()[-20:]:
        assert bytes(cache.read(key).blob) == blob_of(key.row_id)


def test_a_shard_is_there_whole_or_not_at_all(tmp_path):
    with ShardWriter(tmp_path, "rows-00000") as writer:
        for row in ROWS:
            writer.add(*row)
        assert whole_shard(tmp_path, "rows-00000") is None
    assert whole_shard(tmp_path, "rows-00000") == writer.entry == writer.close()
    assert writer.entry.rows == len(ROWS)
    content = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(content) == {"rows-00000.bin", "rows-00000.index"}
    with suppress(KeyboardInterrupt), ShardWriter(tmp_path, "rows-00000") as writer:
        writer.add(*ROWS[0])
        raise KeyboardInterrupt
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == content
    for name, whole in content.items():
        (tmp_path / name).write_bytes(whole[:-1])
        assert whole_shard(tmp_path, "rows-00000") is None
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "rows-00000.index").unlink()
    assert whole_shard(tmp_path, "rows-00000") is None


@pytest.mark.parametrize("key", [RowKey(2, 0), RowKey(-1, 0), RowKey(0, -1), RowKey(0, 2**62)])
def test_a_row_that_cannot_be_is_refused(key, tmp_path):
    with pytest.raises(ValueError, match="part must be below 2, and row_id at least 0"):
        write_rows(tmp_path, [(key, 1, 0, b"")])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_file_past():
    """A limit on the size of files, as a full disk has it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda num_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [0, 1, 100, 300, 640])
def test_a_shard_that_finds_no_room_leaves_nothing(limit, tmp_path, no_file_past):
    no_file_past(limit)
    said = (
        r"rows-00000\.bin: could not be written: File too large; [\d,]+ bytes were wanted and "
        r"[\d,]+ are free there\. Make room"
    )
    with pytest.raises(CacheError, match=said):
        write_rows(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_growing_shard_that_finds_no_room_keeps_its_rows_and_goes_on_when_there_is(
    folder, no_file_past
):
    with GrowingShard(folder, "auto-a") as shard:
        shard.add(*ROWS[0])
        no_file_past(100)
        for _ in range(2):
            with pytest.raises(CacheError, match=r"auto-a\.bin: .*240 bytes were wanted"):
                shard.add(*ROWS[2])
            assert read(CacheFolder.open(folder)) == expected(ROWS[:1])
        no_file_past(10_000)
        for row in ROWS[2:]:
            shard.add(*row)
    assert read(CacheFolder.open(folder)) == expected([ROWS[0], *ROWS[2:]])


def test_a_record_that_finds_no_room_takes_its_blob_with_it(folder, monkeypatch):
    write, calls = os.write, []

    def full(descriptor, content):
        calls.append(len(content))
        if len(calls) == 4:  # the second record: half of it, and then nothing
            return write(descriptor, content[:20])
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content)

    with GrowingShard(folder, "auto-a") as shard:
        monkeypatch.setattr(durable.os, "write", full)
        shard.add(*ROWS[0])
        with pytest.raises(CacheError, match="No space left on device"):
            shard.add(*ROWS[1])
        assert [file.stat().st_size for file in sorted(folder.glob("auto-*"))] == [64, 48]
        shard.add(*ROWS[2])
    assert read(CacheFolder.open(folder)) == expected([ROWS[0], ROWS[2]])


def test_a_manifest_that_finds_no_room_leaves_the_one_before(tmp_path, no_file_past):
    file = tmp_path / "manifest.json"
    write_whole(file, b"before")
    no_file_past(3)
    with pytest.raises(CacheError, match=r"manifest\.json: .*5 bytes were wanted"):
        write_whole(file, b"after")
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {file.name: b"before"}


def test_a_failure_that_is_no_lack_of_room_is_told_as_it_is(tmp_path):
    with pytest.raises(CacheError, match=r"x\.bin: could not be written: No such file or dir"):
        ShardWriter(tmp_path / "none", "x")


def test_a_shard_that_begins_while_one_looks_is_no_damaged_one(folder, monkeypatch):
    glob = type(folder).glob

    def and_then_grows(self, pattern):
        found = list(glob(self, pattern))
        if not list(glob(folder, "auto-*")):
            grow(folder)
        return found

    cache = CacheFolder.open(folder)
    monkeypatch.setattr(type(folder), "glob", and_then_grows)
    cache.refresh()
    assert read(cache) == expected(ROWS)
