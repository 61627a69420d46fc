"""Shards: rows' blobs one after another in NAME.bin, a record of each in NAME.index."""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from neo.teachers.durable import CacheError, partial_file, sync_folder, told, write_all

PARTS = ("rows", "val_rows")
PADDING = 64  # bytes at whose multiples blobs begin
GROWING = "auto-"  # what the names of append-only shards begin with
RECORD = np.dtype(
    [
        ("row_id", "<i8"),
        ("offset", "<i8"),
        ("num_bytes", "<i8"),
        ("num_tokens", "<i4"),
        ("part", "<i4"),
        ("content", "<u4"),
        ("crc", "<u4"),
        ("reserved", "<u4"),
        ("check", "<u4"),
    ]
)
_CHECKED = RECORD.itemsize - 4  # bytes of a record that its check is of


class RowKey(NamedTuple):
    """A row: of which table, by its place in `PARTS`, and its index or number there."""

    part: int
    row_id: int


class StoredRow(NamedTuple):
    """What is kept of a row: how many tokens, the crc32 of what the teacher saw, and the blob."""

    num_tokens: int
    content: int
    blob: memoryview


class ShardEntry(NamedTuple):
    """What a manifest knows of a shard; `num_bytes` are those of its .bin."""

    name: str
    rows: int
    num_bytes: int
    index_crc: int


def bin_file(folder: Path, name: str) -> Path:
    """Where a shard's blobs lie."""
    return folder / f"{name}.bin"


def index_file(folder: Path, name: str) -> Path:
    """Where a shard's records lie."""
    return folder / f"{name}.index"


def padded(num_bytes: int) -> int:
    """Bytes that a blob takes in a .bin."""
    return num_bytes + -num_bytes % PADDING


def key_numbers(part: int | np.ndarray, row_ids: np.ndarray) -> np.ndarray:
    """Rows as single numbers, in the order in which they are looked up."""
    return row_ids.astype(np.int64) * len(PARTS) + part


def record_of(key: RowKey, offset: int, num_tokens: int, content: int, blob: bytes) -> bytes:
    """The record of a row whose padded blob begins at `offset`.

    Raises:
        ValueError: The row is none that there can be.
    """
    if not (0 <= key.part < len(PARTS) and 0 <= key.row_id < 2**62):
        raise ValueError(
            f"{key}: part must be below {len(PARTS)}, and row_id at least 0 and below 2^62"
        )
    crc = zlib.crc32(bytes(-len(blob) % PADDING), zlib.crc32(blob))
    numbers = (key.row_id, offset, len(blob), num_tokens, key.part, content, crc, 0, 0)
    record = np.array(numbers, dtype=RECORD).tobytes()[:_CHECKED]
    return record + zlib.crc32(record).to_bytes(4, "little")


def valid_records(content: bytes, bin_size: int, start: int = 0) -> tuple[np.ndarray, int | None]:
    """The records of an index up to the first that is not whole, and the number of one behind it.

    A record is whole if its check is right, if its blob begins where the one before it ends, and
    if that lies within the .bin. What is written last may be cut off; a record that is not whole
    and has a whole one behind it was damaged.

    Args:
        content: Of the index, or of its end.
        bin_size: Bytes of the .bin.
        start: Where the first blob begins.

    Returns:
        The records, and the number of the damaged one, None where there is none.
    """
    num = len(content) // RECORD.itemsize
    records = np.frombuffer(content, dtype=RECORD, count=num)
    end, good = start, 0
    for number, (offset, size) in enumerate(
        zip(records["offset"].tolist(), records["num_bytes"].tolist(), strict=True)
    ):
        if not _checks(content, number) or offset != end or size < 0:
            damaged = any(_checks(content, later) for later in range(number + 1, num))
            return records[:good], number if damaged else None
        end += padded(size)
        if end > bin_size:
            break
        good += 1
    return records[:good], None


def _checks(content: bytes, number: int) -> bool:
    at = number * RECORD.itemsize
    found = content[at + _CHECKED : at + RECORD.itemsize]
    return zlib.crc32(content[at : at + _CHECKED]) == int.from_bytes(found, "little")


def whole_shard(folder: Path | str, name: str) -> ShardEntry | None:
    """What a manifest would say of a shard that lies whole in the folder, None where none does.

    Records are checked, blobs are not read.
    """
    folder = Path(folder)
    try:
        content = index_file(folder, name).read_bytes()
        bin_size = bin_file(folder, name).stat().st_size
    except FileNotFoundError:
        return None
    records, _ = valid_records(content, bin_size)
    whole = len(records) * RECORD.itemsize == len(content)
    end = sum(padded(size) for size in records["num_bytes"].tolist())
    if not whole or end != bin_size:
        return None
    return ShardEntry(name, len(records), bin_size, zlib.crc32(content))


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
        self.entry = ShardEntry(self.name, len(self._records), self._num_bytes, zlib.crc32(index))
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
        """Adds a row, which other processes see from now on.

        Raises:
            CacheError: There is no room on the disk; the rows before it stay, and another may be
                tried later.
        """
        record = record_of(key, self._sizes[0], num_tokens, content, blob)
        contents = (bytes(blob) + bytes(-len(blob) % PADDING), record)
        sizes = [size + len(content) for size, content in zip(self._sizes, contents, strict=True)]
        for file, descriptor, content_bytes in zip(
            self._files, self._descriptors, contents, strict=True
        ):
            with told(file, len(content_bytes)):
                try:
                    write_all(descriptor, content_bytes)
                except BaseException:
                    for opened, size in zip(self._descriptors, self._sizes, strict=True):
                        os.ftruncate(opened, size)
                    raise
        self._sizes = sizes

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
