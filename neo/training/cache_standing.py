"""What stands in the folder of a cache before it is written, and who may write there."""

import json
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from neo.config import ConfigError
from neo.teachers.durable import CacheError, write_whole
from neo.teachers.head_file import HEAD
from neo.teachers.identity import differences
from neo.teachers.manifest import GROWS, MANIFEST, UNFINISHED, read_manifest
from neo.teachers.shards import GROWING
from neo.teachers.store import CacheFolder
from neo.training.cache_rows import CacheRows
from neo.training.run_cache import CERTIFICATE

LAYOUT = "layout.json"  # how an unfinished cache is cut into shards
LOCK = ".lock"
# Of a cache, so that it may be removed; nothing else is.
OURS = (
    "*.bin", "*.index", "*.done", ".*.partial", MANIFEST, UNFINISHED, GROWS, LAYOUT, LOCK, "locks",
    HEAD, CERTIFICATE,
)  # fmt: skip
PATIENCE_S = 20.0  # processes of a killed command may hold its lock until they notice
WAIT_S = 0.2


class CacheIsBusy(RuntimeError):
    """Another process is writing this very cache."""


@contextmanager
def lock_cache(folder: Path, wait_s: float = PATIENCE_S) -> Generator[None, None, None]:
    """Within it no other command writes the cache; a finished one has no lock left.

    Raises:
        CacheIsBusy: Another held it for as long as was waited.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, timeout=wait_s):
            try:
                yield
            finally:
                nothing = [file.name for file in folder.iterdir()] == [LOCK]
                # nobody who waits for a finished one would write any more
                if nothing or (folder / MANIFEST).exists():
                    (folder / LOCK).unlink(missing_ok=True)
                if nothing:
                    folder.rmdir()
    except Timeout:
        raise CacheIsBusy(f"{folder}: another process is writing this cache") from None


@dataclass(frozen=True)
class Layout:
    """How the rows of a cache are cut into shards; kept until it is finished.

    Args:
        rows_per_shard: Of all but the last of a part.
        rows: The digest of the set of rows.
    """

    rows_per_shard: int
    rows: str

    def write(self, folder: Path) -> None:
        """Keeps it.

        Raises:
            CacheError: There is no room.
        """
        write_whole(folder / LAYOUT, json.dumps(asdict(self)).encode())


def read_layout(folder: Path) -> Layout | None:
    """The layout that was kept; None where none was.

    Raises:
        CacheError: It is damaged.
    """
    try:
        return Layout(**json.loads((folder / LAYOUT).read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise CacheError(f"{folder / LAYOUT}: is damaged; rerun=true writes anew") from error


def wait_for_layout(folder: Path, say: Callable[[str], Any]) -> Layout | None:
    """The layout, once the first process has decided on it; None where the cache is finished."""
    began = time.monotonic()
    while not (folder / MANIFEST).exists():
        if (folder / UNFINISHED).exists() and (layout := read_layout(folder)) is not None:
            return layout
        if time.monotonic() - began > PATIENCE_S:
            began = float("inf")
            say(f"{folder}: waiting for the first process, which measures the teacher")
        time.sleep(WAIT_S)
    return None


@dataclass(frozen=True)
class Standing:
    """What was found.

    Args:
        finished: The whole cache, None where it is not.
        layout: Of one that was begun.
    """

    finished: CacheFolder | None = None
    layout: Layout | None = None


def standing(folder: Path, identity: Mapping[str, Any], rows: CacheRows) -> Standing:
    """What stands in the folder of this very cache.

    Args:
        folder: That may not be there.
        identity: Of the cache that is to be written.
        rows: That it is to hold.

    Raises:
        ConfigError: Another cache stands there, or one of other rows, or what is none.
    """
    place = f"out={folder}"
    if not folder.exists():
        return Standing()
    if not folder.is_dir():
        raise ConfigError([f"{place}: is not a folder"])
    for name in (MANIFEST, UNFINISHED, GROWS):
        if not (folder / name).exists():
            continue
        try:
            there = read_manifest(folder / name)
        except CacheError as error:
            raise ConfigError([f"{place}: {error}; or rerun=true"]) from error
        of_run = json.loads(json.dumps(identity))
        if differing := differences(there.identity, of_run):
            raise ConfigError(
                [
                    f"{place}: holds another cache ({there.name}); give another folder, or "
                    "rerun=true to write this one in its place. What differs:",
                    *(f"  {line}" for line in differing),
                ]
            )
        if name == MANIFEST:
            return Standing(finished=_finished(folder, rows))
        if name == UNFINISHED:
            return Standing(layout=_layout(folder, rows))
        return Standing()
    if others := _others(folder):
        raise ConfigError([f"{place}: is no cache, and holds {others[0]}; give another folder"])
    return Standing()


def _finished(folder: Path, rows: CacheRows) -> CacheFolder:
    """The finished cache, which holds these rows."""
    try:
        cache = CacheFolder.open(folder)
    except CacheError as error:
        raise ConfigError([f"out={folder}: {error}; or rerun=true"]) from error
    counts = cache.manifest.counts
    read, wanted, lacking = counts["read"], 0, 0
    for part in rows.streams:
        ids = rows.ids.get(part)
        if ids is None:
            num, limit = rows.num_rows(part), counts.get("limit", 0)
            ids = np.arange(min(num, read) if read < limit else num)  # it ended, or was cut off
        lacking, wanted = lacking + len(cache.missing(part, ids)), wanted + len(ids)
    unusable = read + counts["read_val_rows"] - counts["rows"]  # held out ones of a stream, too
    if lacking > unusable:
        raise ConfigError(
            [
                f"out={folder}: is finished, and lacks {lacking:,} of these {wanted:,} rows "
                f"({unusable:,} of those it was made of had no targets; data.max_rows, "
                "data.val_share and seed choose rows). Give another folder, or rerun=true; runs "
                "with teacher=auto add what they lack by themselves"
            ]
        )
    return cache


def _layout(folder: Path, rows: CacheRows) -> Layout | None:
    layout = read_layout(folder)
    if layout is not None and layout.rows != rows.digest():
        raise ConfigError(
            [
                f"out={folder}: was begun with other rows (data.max_rows, data.val_share and seed "
                "choose them); set these as they were, give another folder, or rerun=true"
            ]
        )
    return layout


def refuse_others(folder: Path) -> None:
    """Refuses to remove a cache from a folder that holds something else, too.

    Raises:
        ConfigError: It does.
    """
    if folder.is_dir() and (others := _others(folder)):
        raise ConfigError(
            [f"out={folder}: rerun=true removes a cache, and here lies {others[0]}, too"]
        )


def remove_cache(folder: Path) -> None:
    """Removes a cache, whichever it is.

    Raises:
        ConfigError: There are other files.
    """
    refuse_others(folder)
    for pattern in OURS:
        for file in folder.glob(pattern):
            if file.name != LOCK:
                file.unlink(missing_ok=True)


def _others(folder: Path) -> list[str]:
    ours = {file for pattern in OURS for file in folder.glob(pattern)}
    return sorted(file.name for file in folder.iterdir() if file not in ours)


def written_bytes(folder: Path) -> int:
    """What lies in the folder already."""
    files = [file for pattern in ("*.bin", "*.index") for file in folder.glob(pattern)]
    return sum(file.stat().st_size for file in files if not file.name.startswith(GROWING))
