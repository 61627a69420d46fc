import json
import os
import pickle
import shutil

import numpy as np
import pytest
from small_cache import EACH, IDENTITY, KEYS, NAMES, NUM_TOKENS, SHAPES, blobs, stored, write

from neo.teachers.durable import CacheError
from neo.teachers.manifest import begin, finish
from neo.teachers.shards import RowKey
from neo.teachers.store import CacheFolder

KEPT = stored("top_p")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "made"
    write(folder, KEPT)
    return folder


@pytest.fixture
def cache(written, tmp_path):
    """A cache of the test's own."""
    return shutil.copytree(written, tmp_path / "cache")


def contents(folder):
    """Whatever can be read of a cache, by row."""
    cache = CacheFolder.open(folder)
    cache.beside("teacher_head.safetensors")
    keys = cache.keys()
    return {key: (*cache.read(key)[:2], bytes(cache.read(key).blob)) for key in keys}


@pytest.mark.parametrize("kept", EACH, ids=NAMES)
def test_rows_of_every_kind_come_back_as_they_were_written(kept, tmp_path):
    manifest = write(tmp_path, kept)
    cache = CacheFolder.open(tmp_path)
    assert cache.manifest == manifest
    assert (cache.manifest.stored, cache.manifest.shapes) == (kept, SHAPES)
    assert cache.manifest.counts == {"rows": 4, "tokens": NUM_TOKENS, "bad_rows": {"empty": 1}}
    assert cache.manifest.certificate == {"kl": 1e-7}
    assert len(cache) == len(KEYS)
    for (key, num_tokens), blob in zip(KEYS, blobs(kept), strict=True):
        row = cache.read(key)
        assert (row.num_tokens, row.content, bytes(row.blob)) == (
            num_tokens, 1000 + key.row_id, blob,
        )  # fmt: skip
        assert cache.num_tokens(key) == num_tokens


def test_rows_are_found_by_their_keys(cache):
    cache = CacheFolder.open(cache)
    assert cache.keys() == [KEYS[0][0], KEYS[2][0], KEYS[1][0], KEYS[3][0]]  # shard by shard
    assert all(key in cache for key, _ in KEYS)
    for absent in (RowKey(1, 2), RowKey(0, 901), RowKey(0, 0), RowKey(1, 2**40)):
        assert absent not in cache
        with pytest.raises(KeyError):
            cache.read(absent)
    wanted = np.array([900, 3, 2, 5, 2**40])
    np.testing.assert_array_equal(cache.missing(0, wanted), [3, 2**40])
    np.testing.assert_array_equal(cache.missing(1, wanted), [900, 3, 2, 2**40])


def test_a_cache_goes_to_another_process(cache):
    opened = CacheFolder.open(cache)
    opened.read(KEYS[0][0])  # which maps a file
    there = pickle.loads(pickle.dumps(opened))
    assert bytes(there.read(KEYS[0][0]).blob) == bytes(opened.read(KEYS[0][0]).blob)


def test_the_same_rows_make_the_same_bytes(cache, tmp_path):
    write(tmp_path / "again", KEPT)
    names = sorted(file.name for file in cache.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "again").iterdir())
    for name in names:
        assert (cache / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_no_flipped_byte_anywhere_passes_unseen(cache):
    whole = contents(cache)
    random = np.random.default_rng(0)
    for file in sorted(cache.iterdir()):
        content = file.read_bytes()
        at = random.choice(len(content), min(len(content), 60), replace=False)
        for place in {0, len(content) - 1, *at.tolist()}:
            damaged = bytearray(content)
            damaged[place] ^= 1 << random.integers(8)
            file.write_bytes(damaged)
            with pytest.raises(CacheError, match=file.stem):
                contents(cache)
        file.write_bytes(content)
    assert contents(cache) == whole


def test_a_damaged_row_does_not_stand_in_the_way_of_others(cache):
    file = cache / "rows-00000.bin"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    opened = CacheFolder.open(cache)
    with pytest.raises(CacheError, match=r"rows-00000\.bin: is damaged at row 5 of rows \(bytes 0"):
        opened.read(KEYS[0][0])
    for key, num_tokens in KEYS[1:]:
        assert opened.read(key).num_tokens == num_tokens


@pytest.mark.parametrize("name", ["rows-00000.bin", "rows-00001.index", "teacher_head.safetensors"])
def test_a_file_that_is_cut_off_longer_or_missing_is_refused(name, cache):
    file = cache / name
    content = file.read_bytes()
    for other in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
        file.write_bytes(other)
        with pytest.raises(CacheError, match=rf"{name}: has [\d,]+ bytes where {len(content):,}"):
            CacheFolder.open(cache)
    file.unlink()
    with pytest.raises(CacheError, match=f"{name}: is missing; restore it, or remove"):
        CacheFolder.open(cache)


def test_a_manifest_that_is_cut_off_or_missing_is_refused(cache):
    file = cache / "manifest.json"
    content = file.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(CacheError, match=r"manifest.json: is damaged"):
            CacheFolder.open(cache)
    file.unlink()
    with pytest.raises(CacheError, match=r"there are shards .* but no manifest.json; restore it"):
        CacheFolder.open(cache)


def test_a_manifest_of_another_version_is_refused(cache, monkeypatch):
    monkeypatch.setattr("neo.teachers.manifest.VERSION", 2)
    with pytest.raises(CacheError, match=r"format 'neo.cache' version 1; this neo reads .* 2"):
        CacheFolder.open(cache)


def test_a_folder_that_holds_no_finished_cache_says_what_it_is(tmp_path):
    with pytest.raises(CacheError, match=r"there is no such folder"):
        CacheFolder.open(tmp_path / "none")
    with pytest.raises(CacheError, match=r"this folder holds no cache"):
        CacheFolder.open(tmp_path)
    begin(tmp_path, KEPT, SHAPES, IDENTITY, growing=False)
    with pytest.raises(CacheError, match=r"not finished \(unfinished.json\); run neo.cache again"):
        CacheFolder.open(tmp_path)


def test_beginning_again_changes_nothing_and_another_cache_is_refused(tmp_path):
    begin(tmp_path, KEPT, SHAPES, IDENTITY, growing=False)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    begin(tmp_path, KEPT, SHAPES, IDENTITY | {"teacher": {"path": "elsewhere", "hash": "ab"}},
          growing=False)  # fmt: skip
    assert file.read_bytes() == content
    other = {"teacher": {"path": "somewhere", "hash": "cd"}, "vocab": 51}
    with pytest.raises(CacheError, match=r"this is another cache") as error:
        begin(tmp_path, KEPT, SHAPES, other, growing=False)
    assert str(error.value).splitlines()[1:] == [
        '  teacher.hash: the cache has "ab", the run has "cd"',
        "  vocab: the cache has 50, the run has 51",
    ]


def test_what_is_not_whole_is_not_finished(cache, tmp_path):
    begin(tmp_path / "x", KEPT, SHAPES, IDENTITY, growing=False)
    manifest = CacheFolder.open(cache).manifest
    with pytest.raises(CacheError, match=r"rows-00000: this shard is not what was written"):
        finish(tmp_path / "x", manifest.shards, {}, {}, [])
    for file in cache.glob("rows-*"):
        shutil.copy(file, tmp_path / "x")
    with pytest.raises(CacheError, match=r"teacher_head.safetensors: is missing"):
        finish(tmp_path / "x", manifest.shards, {}, {}, ["teacher_head.safetensors"])
    with pytest.raises(CacheError, match=r"unfinished"):
        CacheFolder.open(tmp_path / "x")
    with pytest.raises(CacheError, match=r"nothing was begun here"):
        finish(cache, manifest.shards, {}, {}, [])


def test_what_killed_processes_left_is_gone_when_a_cache_is_finished(tmp_path):
    begin(tmp_path, KEPT, SHAPES, IDENTITY, growing=False)
    (tmp_path / ".rows-00000.bin.other-1.partial").write_bytes(b"half")
    write(tmp_path, KEPT)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "manifest.json", "rows-00000.bin", "rows-00000.index", "rows-00001.bin",
        "rows-00001.index", "teacher_head.safetensors",
    ]  # fmt: skip
    begun = (tmp_path / "manifest.json").read_bytes()
    begin(tmp_path, KEPT, SHAPES, IDENTITY, growing=False)
    assert (tmp_path / "manifest.json").read_bytes() == begun
    assert not (tmp_path / "unfinished.json").exists()


def test_a_manifest_holds_no_time(cache):
    plain = json.loads((cache / "manifest.json").read_bytes())
    assert set(plain) == {
        "format", "version", "neo_version", "name", "identity", "stored", "shapes", "fields",
        "counts", "shards", "files", "certificate", "checksum",
    }  # fmt: skip
    assert len({shard["index_sha256"] for shard in plain["shards"]}) == 2
    assert plain["shards"][0] == {
        "name": "rows-00000", "rows": 2, "index_sha256": plain["shards"][0]["index_sha256"],
        "num_bytes": os.path.getsize(cache / "rows-00000.bin"),
    }  # fmt: skip
