"""Checkpoints on disk: a file per step, whole or not there, and known to be damaged where it is."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from neo.results.records import write_atomically

_NAME = re.compile(r"step-(\d+)\.ckpt")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Commit:
    """What stands beside a checkpoint once it lies whole on the disk; without it, it does not.

    Attributes:
        step: How many optimizer steps lie behind it.
        num_bytes: Of the file.
        sha256: Of the file, in hex.
        val_loss: Of the weights it holds, where they were validated.
    """

    step: int
    num_bytes: int
    sha256: str
    val_loss: float | None = None


def checkpoint_file(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies; names sort as steps do."""
    return folder / f"step-{step:08d}.ckpt"


def commit_file(file: Path) -> Path:
    """Where a checkpoint's `Commit` lies."""
    return file.with_name(f"{file.name}.json")


def write_checkpoint(checkpoint: dict[str, Any], file: Path, val_loss: float | None = None) -> None:
    """Writes the checkpoint of a step, then its commit; a crash leaves what was there, or both.

    Raises:
        OSError: It could not be written, and nothing of it is left: the disk may be full.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    for old in file.parent.glob(".step-*"):  # of a process that was killed while it wrote
        old.unlink(missing_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as opened:
            hashed = _Hashed(opened)
            try:
                torch.save(checkpoint, cast(IO[bytes], hashed))
            except RuntimeError as error:  # torch's own, about the bytes that did not arrive
                raise hashed.error or error from error
            opened.flush()
            os.fsync(opened.fileno())
        os.chmod(temporary, 0o644)  # mkstemp lets nobody else read
        commit_file(file).unlink(missing_ok=True)  # of a damaged one that is replaced
        os.replace(temporary, file)
        _sync(file.parent)
        _commit(file, Commit(_step(file), hashed.num_bytes, hashed.sha256.hexdigest(), val_loss))
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_commit(file: Path) -> Commit:
    """What was noted when the checkpoint lay whole on the disk.

    Raises:
        ValueError: Nothing was, or it cannot be read.
    """
    noted = commit_file(file)
    try:
        commit = Commit(**json.loads(noted.read_text()))
        if commit.step != _step(file):
            raise ValueError(f"it is of step {commit.step}")
        return commit
    except FileNotFoundError:
        raise ValueError(f"the run was cut off while it was written: no {noted.name}") from None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{noted.name} cannot be read: {error}") from None


def fault_of(file: Path) -> str | None:
    """What is wrong with a checkpoint; None where every byte is as it was written."""
    try:
        commit = read_commit(file)
        num_bytes = file.stat().st_size
        if num_bytes != commit.num_bytes:
            return f"it has {num_bytes:,} bytes of {commit.num_bytes:,}"
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        return str(error)
    if digest != commit.sha256:
        return f"its bytes have changed: SHA-256 {digest[:8]}…, written was {commit.sha256[:8]}…"
    return None


def newest_good(folder: Path, say: Say) -> Path | None:
    """The newest checkpoint that is whole; `say` is told which are passed over, and why."""
    passed_over = False
    for file in sorted(folder.glob("*.ckpt"), key=lambda file: (_step(file), file), reverse=True):
        if not _NAME.fullmatch(file.name):
            say(f"{file} is passed over: it is none of this version's, step-<number>.ckpt")
        elif (fault := fault_of(file)) is not None:
            say(f"{file} is passed over: {fault}")
        else:
            return file
        passed_over = True
    if passed_over:
        say(f"{folder} holds no checkpoint that is whole: the run begins anew")
    return None


def remove_checkpoints(folder: Path) -> None:
    """Makes the folder one of a run that never began; other files stay."""
    for file in folder.glob("step-*.ckpt*"):
        file.unlink(missing_ok=True)


class CheckpointFiles(TorchCheckpointIO):
    """How Lightning's first process writes checkpoints, and which it keeps.

    An error of the disk is not raised but counted, said and kept in `failure`: the other processes
    wait for the first, which must not leave, and a run is worth more than its next checkpoint. What
    lies there already stays.

    Args:
        folder: Of the checkpoints.
        keep_last: How many of the newest stay.
        keep_best: How many of those with the lowest `val_loss` stay besides.
        say: Told what could not be written.
    """

    def __init__(self, folder: Path, keep_last: int, keep_best: int, say: Say) -> None:
        self.folder, self.keep_last, self.keep_best, self.say = folder, keep_last, keep_best, say
        self.val_loss: float | None = None  # of the weights that are written next
        self.failure: OSError | None = None  # of the last attempt
        self.num_failures = 0

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Writes one, and removes those that need not be kept, once it lies whole on the disk."""
        assert storage_options is None
        file = Path(path)
        with self._counting(file):
            write_checkpoint(checkpoint, file, self.val_loss)
            self._prune(_step(file))

    def score(self, step: int, val_loss: float) -> None:
        """Notes the validation loss of a checkpoint that was written before it was known."""
        file = checkpoint_file(self.folder, step)
        with self._counting(file):
            _commit(file, replace(read_commit(file), val_loss=val_loss))
            self._prune(step)

    def is_among_best(self, val_loss: float) -> bool:
        """Whether weights with this validation loss would be kept as one of the best."""
        best = self._best()
        return len(best) < self.keep_best or any(val_loss < other for other, _ in best)

    def _best(self) -> list[tuple[float, Path]]:
        """Validation loss and file of those that are kept for it, the lowest first."""
        scored = [
            (commit.val_loss, -commit.step, file)
            for file, commit in _committed(self.folder)
            if commit.val_loss is not None
        ]
        return [(val_loss, file) for val_loss, _, file in sorted(scored)[: self.keep_best]]

    def _prune(self, step: int) -> None:
        """Keeps the newest and the best; later ones are of another past, or damaged."""
        past = [file for file, commit in _committed(self.folder) if commit.step <= step]
        keep = {*sorted(past)[-self.keep_last :], *(file for _, file in self._best())}
        for file in self.folder.glob("step-*.ckpt"):
            if file not in keep:
                file.unlink()  # first, for a commit without a file says nothing
                commit_file(file).unlink(missing_ok=True)

    def _counting(self, file: Path) -> "_Counting":
        return _Counting(self, file)


class _Counting:
    """Turns an error of the disk into one more failure of the files."""

    def __init__(self, files: CheckpointFiles, file: Path) -> None:
        self.files, self.file = files, file

    def __enter__(self) -> None:
        self.files.failure = None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, OSError):
            return False
        files, folder = self.files, self.file.parent
        files.failure, files.num_failures = error, files.num_failures + 1
        kept = [file.name for file, _ in _committed(folder)] if folder.is_dir() else []
        files.say(
            f"{self.file} COULD NOT BE WRITTEN: {error.strerror or error}. The run goes on; "
            + (f"kept is {kept[-1]}" if kept else "there is no other checkpoint yet")
        )
        return True


class _Hashed:
    """A file to write to, that counts and digests what passes, and keeps the disk's error."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.num_bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            self.file.write(content)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(content)
        self.num_bytes += (num_bytes := memoryview(content).nbytes)
        return num_bytes

    def flush(self) -> None:
        self.file.flush()


def _committed(folder: Path) -> list[tuple[Path, Commit]]:
    """The checkpoints that were written whole, by step; whether they still are is not looked at."""
    found = []
    for file in sorted(folder.glob("step-*.ckpt")):
        try:
            found.append((file, read_commit(file)))
        except ValueError:
            continue
    return found


def _commit(file: Path, commit: Commit) -> None:
    write_atomically(commit_file(file), (json.dumps(asdict(commit)) + "\n").encode())
    _sync(file.parent)


def _step(file: Path) -> int:
    found = _NAME.fullmatch(file.name)
    return int(found[1]) if found else -1


def _sync(folder: Path) -> None:
    """Makes renames in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
