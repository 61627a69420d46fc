"""Who writes shards: at once and whole, or row by row while others read."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from neo.teachers.durable import CacheError, partial_file, sync_folder, told, write_all
from neo.teachers.shards import (
    GROWING,
    PADDING,
    RowKey,
    ShardEntry,
    StoredRow,
    bin_file,
    index_file,
    padded,
    record_of,
)


class ShardWriter:
    """Writes a shard that is there whole or not at all.

    As a context manager it closes at the end, and leaves nothing behind an exception.

    Args:
        folder: Of the cache.
        name: Of the shard; one that is there is replaced.
    """

    def __init__(self, folder: Path | str, name: str) -> None:
        self.folder, self.name = Path(folder), name
        self.entry: ShardEntry | None = None
        self._records: list[bytes] = []
        self._num_bytes = 0
        self._files = [bin_file(self.folder, name), index_file(self.folder, name)]
        with told(self._files[0], 0):
            self._bin = partial_file(self._files[0]).open("wb", buffering=2**20)

    def add(self, key: RowKey, num_tokens: int, content: int, blob: bytes) -> None:
        """Adds a row.

        Raises:
            CacheError: There is no room on the disk; nothing of the shard is left.
        """
        record = record_of(key, self._num_bytes, num_tokens, content, blob)
        with told(self._files[0], self._num_bytes + padded(len(blob))), self._nothing_left():
            self._bin.write(blob)
            self._bin.write(bytes(-len(blob) % PADDING))
        self._records.append(record)
        self._num_bytes += padded(len(blob))

    def close(self) -> ShardEntry:
        """Puts the shard in its place and says what a manifest must know of it.

        Raises:
            CacheError: There is no room on the disk; nothing of the shard is left.
        """
        if self.entry is not None:
            return self.entry
        index = b"".join(self._records)
        blobs, records = self._files
        with told(blobs, self._num_bytes + len(index)), self._nothing_left():
            self._bin.flush()
            os.fsync(self._bin.fileno())
            self._bin.close()
            with partial_file(records).open("wb") as file:
                file.write(index)
                file.flush()
                os.fsync(file.fileno())
            # A shard is there when its index is: one of old that is replaced must be gone first.
            records.unlink(missing_ok=True)
            os.replace(partial_file(blobs), blobs)
            sync_folder(self.folder)
            os.replace(partial_file(records), records)
            sync_folder(self.folder)
        digest = hashlib.sha256(index).hexdigest()
        self.entry = ShardEntry(self.name, len(self._records), self._num_bytes, digest)
        return self.entry

    def abandon(self) -> None:
        """Leaves nothing of what was written."""
        with suppress(OSError):  # what was buffered had no room either
            self._bin.close()
        for file in self._files:
            partial_file(file).unlink(missing_ok=True)

    @contextmanager
    def _nothing_left(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.abandon()
            raise

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self.entry is None:
            self.abandon()


class GrowingShard:
    """An append-only shard, which others read while it grows.

    A row's blob is written before its record: a process that dies leaves whole rows, and at the
    end perhaps bytes that belong to none.

    Args:
        folder: Of the cache.
        name: Begins with `auto-`; of this process alone.

    Raises:
        CacheError: There is a shard of that name.
    """

    def __init__(self, folder: Path | str, name: str) -> None:
        if not name.startswith(GROWING):
            raise ValueError(f"name={name!r}: must begin with {GROWING}")
        self.folder, self.name = Path(folder), name
        self._files = [bin_file(self.folder, name), index_file(self.folder, name)]
        self._sizes = [0, 0]
        self._descriptors: list[int] = []
        for file in self._files:
            try:
                with told(file, 0):
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
                    self._descriptors.append(os.open(file, flags, 0o644))
            except CacheError:
                self.close()
                raise

    def add(self, key: RowKey, num_tokens: int, content: int, blob: bytes) -> None:
        """Adds a row, as `add_all`."""
        self.add_all([(key, StoredRow(num_tokens, content, memoryview(blob)))])

    def add_all(self, rows: Sequence[tuple[RowKey, StoredRow]]) -> None:
        """Adds rows, which other processes see from now on: all of them, or none.

        Their records are written at once, so that a run that is killed has none of a batch, and
        computes it again as it lay.

        Raises:
            CacheError: There is no room on the disk; the rows before them stay, and others may be
                tried later.
        """
        size, records = self._sizes[0], b""
        for key, row in rows:
            records += record_of(key, size, row.num_tokens, row.content, bytes(row.blob))
            size += padded(len(row.blob))
        with told(self._files[0], size - self._sizes[0] + len(records)):
            try:
                for _, row in rows:
                    blob = bytes(row.blob)
                    write_all(self._descriptors[0], blob + bytes(-len(blob) % PADDING))
                write_all(self._descriptors[1], records)
            except BaseException:
                for descriptor, before in zip(self._descriptors, self._sizes, strict=True):
                    os.ftruncate(descriptor, before)
                raise
        self._sizes = [size, self._sizes[1] + len(records)]

    def close(self) -> None:
        """Makes what was added last; safe to call twice."""
        while self._descriptors:
            descriptor = self._descriptors.pop(0)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def __enter__(self) -> "GrowingShard":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
