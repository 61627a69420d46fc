import errno
import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from neo.training import checkpoints
from neo.training.checkpoints import (
    CheckpointFiles,
    checkpoint_file,
    commit_file,
    fault_of,
    newest_good,
    read_commit,
    remove_checkpoints,
    write_checkpoint,
)


def state(step, size=1000):
    return {"global_step": step, "weights": torch.full((size,), float(step))}


def held(file):
    return torch.load(file, weights_only=True)["global_step"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path):
    for step in (5, 10, 15):
        write_checkpoint(state(step), checkpoint_file(tmp_path, step))
    return tmp_path


@contextmanager
def disk_full_after(num_bytes, monkeypatch):
    """Within it no file that is opened by its descriptor takes more bytes than these."""
    fdopen = os.fdopen

    class Full:
        def __init__(self, file):
            self.file, self.left = file, num_bytes

        def write(self, content):
            self.left -= memoryview(content).nbytes
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(content)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, "fdopen", lambda *a, **k: Full(fdopen(*a, **k)))
        yield


def test_what_is_written_is_read_again_with_what_is_noted_beside_it(folder):
    file = checkpoint_file(folder, 10)
    assert file.name == "step-00000010.ckpt"
    assert held(file) == 10
    commit = read_commit(file)
    assert commit.step == 10
    assert commit.num_bytes == file.stat().st_size
    assert fault_of(file) is None
    sha256 = subprocess.run(["sha256sum", file], capture_output=True, text=True).stdout.split()[0]
    assert commit.sha256 == sha256
    assert file.stat().st_mode & 0o777 == 0o644


def test_the_newest_is_taken_and_nothing_said(folder):
    said = []
    assert newest_good(folder, said.append) == checkpoint_file(folder, 15)
    assert said == []


def test_an_empty_or_missing_folder_holds_none_and_nothing_is_said(tmp_path):
    said = []
    assert newest_good(tmp_path, said.append) is None
    assert newest_good(tmp_path / "none", said.append) is None
    assert said == []


def torn(file):
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def uncommitted(file):
    commit_file(file).unlink()


def commit_torn(file):
    commit_file(file).write_text('{"step": 1')


def commit_of_another(file):
    commit_file(file).write_text(commit_file(checkpoint_file(file.parent, 5)).read_text())


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (torn, r"it has [\d,]+ bytes of [\d,]+"),
        (flip, "its bytes have changed"),
        (uncommitted, "cut off while it was written: no step-00000015.ckpt.json"),
        (commit_torn, "step-00000015.ckpt.json cannot be read"),
        (commit_of_another, "cannot be read: it is of step 5"),
        (Path.unlink, None),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_it_is_said_why(folder, damage, why):
    damage(checkpoint_file(folder, 15))
    said = []
    assert newest_good(folder, said.append) == checkpoint_file(folder, 10)
    if why is None:
        assert said == []
    else:
        (line,) = said
        assert re.search(f"step-00000015.ckpt is passed over: .*{why}", line)


def test_any_flipped_byte_is_found(tmp_path):
    file = checkpoint_file(tmp_path, 1)
    write_checkpoint(state(1, size=3), file)
    content = file.read_bytes()
    for at in range(0, len(content), 17):
        changed = bytearray(content)
        changed[at] ^= 0x10
        file.write_bytes(changed)
        assert fault_of(file) is not None, at
    file.write_bytes(content)
    assert fault_of(file) is None


def test_where_none_is_whole_the_run_begins_anew_and_says_so(folder):
    for step in (5, 10, 15):
        torn(checkpoint_file(folder, step))
    said = []
    assert newest_good(folder, said.append) is None
    assert len(said) == 4
    assert "the run begins anew" in said[-1]


def test_a_file_of_another_name_is_passed_over_aloud(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"")
    said = []
    assert newest_good(tmp_path, said.append) is None
    assert "last.ckpt is passed over: it is none of this version's" in said[0]


@pytest.mark.parametrize("num_bytes", [0, 1, 500, 3000])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(folder, num_bytes, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with (
        disk_full_after(num_bytes, monkeypatch),
        pytest.raises(OSError, match="No space left") as e,
    ):
        write_checkpoint(state(20), checkpoint_file(folder, 20))
    assert e.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_disk_that_is_full_when_the_commit_is_due_leaves_the_old_one_good(folder, monkeypatch):
    def refuse(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_atomically", refuse)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(state(20), checkpoint_file(folder, 20))
    said = []
    assert newest_good(folder, said.append) == checkpoint_file(folder, 15)


def test_a_real_disk_that_is_full_counts_a_failure_and_the_old_one_stays(tmp_path):
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("may not mount")
    try:
        said = []
        files = CheckpointFiles(tmp_path, keep_last=1, keep_best=0, say=said.append)
        files.save_checkpoint(state(5, size=30_000), checkpoint_file(tmp_path, 5))
        assert (files.failure, files.num_failures, said) == (None, 0, [])
        files.save_checkpoint(state(10, size=40_000), checkpoint_file(tmp_path, 10))
        assert files.failure.errno == errno.ENOSPC
        assert files.num_failures == 1
        (line,) = said
        assert "step-00000010.ckpt COULD NOT BE WRITTEN: No space left on device" in line
        assert "kept is step-00000005.ckpt" in line
        assert names(tmp_path) == ["step-00000005.ckpt", "step-00000005.ckpt.json"]
        assert newest_good(tmp_path, said.append) == checkpoint_file(tmp_path, 5)
        files.save_checkpoint(state(15, size=10_000), checkpoint_file(tmp_path, 15))
        assert files.failure is None
        assert newest_good(tmp_path, said.append) == checkpoint_file(tmp_path, 15)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_an_error_that_is_not_the_disks_is_raised(tmp_path):
    files = CheckpointFiles(tmp_path, keep_last=1, keep_best=0, say=print)
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        files.save_checkpoint({"a": lambda: 0}, checkpoint_file(tmp_path, 1))
    assert files.num_failures == 0
    assert names(tmp_path) == []


WRITER = """
import sys, torch
from pathlib import Path
from neo.training.checkpoints import checkpoint_file, write_checkpoint
for step in range(1, 10**6):
    state = {"global_step": step, "weights": torch.full((500_000,), float(step))}
    write_checkpoint(state, checkpoint_file(Path(sys.argv[1]), step))
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_writer_that_is_killed_at_any_time_leaves_a_good_checkpoint(tmp_path):
    for turn in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout.readline()
            time.sleep(0.013 * (turn + 1))
            writer.kill()
            done = [int(line) for line in writer.stdout.read().split()] or [1]
        good = newest_good(tmp_path, lambda line: None)
        assert held(good) >= done[-1]
        write_checkpoint(state(10**7), checkpoint_file(tmp_path, 10**7))
        assert not list(tmp_path.glob(".*"))  # what was half written is gone
        remove_checkpoints(tmp_path)


def test_the_newest_are_kept_and_others_go_once_the_new_one_lies_there(tmp_path):
    files = CheckpointFiles(tmp_path, keep_last=2, keep_best=0, say=print)
    (tmp_path / "probe.safetensors").write_text("not a checkpoint")
    for step in (5, 10, 15):
        files.save_checkpoint(state(step), checkpoint_file(tmp_path, step))
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == [
        "step-00000010.ckpt", "step-00000010.ckpt.json",
        "step-00000015.ckpt", "step-00000015.ckpt.json",
    ]  # fmt: skip
    assert (tmp_path / "probe.safetensors").exists()


def test_later_ones_that_a_run_could_not_go_on_from_go_too(folder):
    torn(checkpoint_file(folder, 15))
    uncommitted(checkpoint_file(folder, 10))
    files = CheckpointFiles(folder, keep_last=3, keep_best=0, say=print)
    files.save_checkpoint(state(7), checkpoint_file(folder, 7))
    assert {path.name[:13] for path in folder.iterdir()} == {"step-00000005", "step-00000007"}


def test_the_best_are_kept_besides_the_newest(tmp_path):
    files = CheckpointFiles(tmp_path, keep_last=1, keep_best=2, say=print)
    for step, val_loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, 9.0), (6, None)):
        files.val_loss = val_loss
        files.save_checkpoint(state(step), checkpoint_file(tmp_path, step))
    assert sorted(int(p.stem[5:]) for p in tmp_path.glob("*.ckpt")) == [2, 4, 6]
    assert files.is_among_best(1.5)
    assert not files.is_among_best(2.5)
    files.score(6, 0.5)
    assert read_commit(checkpoint_file(tmp_path, 6)).val_loss == 0.5
    files.val_loss = None
    files.save_checkpoint(state(7), checkpoint_file(tmp_path, 7))
    assert sorted(int(p.stem[5:]) for p in tmp_path.glob("*.ckpt")) == [2, 6, 7]
    assert fault_of(checkpoint_file(tmp_path, 6)) is None


def test_the_best_go_only_when_a_better_one_lies_there_whole(tmp_path, monkeypatch):
    files = CheckpointFiles(tmp_path, keep_last=1, keep_best=1, say=lambda line: None)
    files.val_loss = 2.0
    files.save_checkpoint(state(1), checkpoint_file(tmp_path, 1))
    files.val_loss = 1.0
    with disk_full_after(1000, monkeypatch):
        files.save_checkpoint(state(2), checkpoint_file(tmp_path, 2))
    assert files.num_failures == 1
    assert newest_good(tmp_path, print) == checkpoint_file(tmp_path, 1)


def test_removing_checkpoints_leaves_other_files(folder):
    (folder / "probe.safetensors").write_text("")
    remove_checkpoints(folder)
    assert names(folder) == ["probe.safetensors"]


def test_a_commit_is_plain_json(folder):
    noted = json.loads(commit_file(checkpoint_file(folder, 5)).read_text())
    assert noted.keys() == {"step", "num_bytes", "sha256", "val_loss"}
