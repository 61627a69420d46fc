"""Shards: rows' blobs one after another in NAME.bin, a record of each in NAME.index."""

import hashlib
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

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
    """What a manifest knows of a shard; `num_bytes` are those of its .bin.

    The index has no crc32: that of records which end in their own is the same whatever they say.
    """

    name: str
    rows: int
    num_bytes: int
    index_sha256: str


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


def key_number(key: RowKey) -> int:
    """A row as a single number: its place among those looked up, and its byte of the locks."""
    return key.row_id * len(PARTS) + key.part  # as `key_numbers` has it for many


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
    return ShardEntry(name, len(records), bin_size, hashlib.sha256(content).hexdigest())
