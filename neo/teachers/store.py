"""An opened cache: rows by their keys, whichever shard they lie in."""

import hashlib
import mmap
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from neo.teachers.durable import CacheError
from neo.teachers.manifest import Manifest, find_manifest, sha256_of
from neo.teachers.row_table import RowTable
from neo.teachers.shards import (
    GROWING,
    PARTS,
    RECORD,
    RowKey,
    StoredRow,
    bin_file,
    index_file,
    key_number,
    key_numbers,
    padded,
    valid_records,
)

# Each mapped shard takes one of the files that a process may have open, often 1,024.
MAX_MAPPED = 256
_AGAIN = "restore it, or remove the folder and write the cache again"


class CacheFolder:
    """A cache that was opened for reading; `open` makes it. It may go to other processes.

    Attributes:
        path: Of the folder.
        manifest: What the cache is.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._table = RowTable()
        self._names: list[str] = []  # of shards, by number
        self._seen: dict[str, tuple[int, int, int]] = {}  # growing: number, records, bytes of .bin
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()  # the last used behind the others

    @classmethod
    def open(cls, path: Path | str) -> "CacheFolder":
        """Opens a cache that is finished or grows.

        Raises:
            CacheError: Something of it is damaged, missing or not finished.
        """
        path = Path(path)
        cache = cls(path, find_manifest(path))
        cache._read_shards()
        cache.refresh()
        return cache

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, key: RowKey) -> bool:
        return self._table.find(key_number(key)) is not None

    def keys(self) -> list[RowKey]:
        """All rows, in the order of shards and of rows within them."""
        records = self._table.in_order()
        pairs = zip(records["part"].tolist(), records["row_id"].tolist(), strict=True)
        return [RowKey(part, row_id) for part, row_id in pairs]

    def missing(self, part: int, row_ids: np.ndarray) -> np.ndarray:
        """Those of the rows that it lacks, in their order."""
        row_ids = np.asarray(row_ids)
        return row_ids[~self._table.holds(key_numbers(part, row_ids))]

    def num_tokens(self, key: RowKey) -> int:
        """Supervised tokens of a row, without reading them.

        Raises:
            KeyError: It is not there.
        """
        found = self._table.find(key_number(key))
        if found is None:
            raise KeyError(key)
        return int(found[0]["num_tokens"])

    def read(self, key: RowKey) -> StoredRow:
        """What is kept of a row, as a view of the file.

        Raises:
            KeyError: The row is not there.
            CacheError: It is damaged.
        """
        found = self._table.find(key_number(key))
        if found is None:
            raise KeyError(key)
        record, number = found
        _, offset, size, num_tokens, _, content, crc, _, _ = record.item()
        stop = offset + padded(size)
        # An empty file cannot be mapped, and a row without tokens has no bytes.
        view = memoryview(self._map(number, stop) if size else b"")[offset:stop]
        if zlib.crc32(view) != crc:
            file = bin_file(self.path, self._names[number])
            raise CacheError(
                f"{file}: is damaged at row {key.row_id} of {PARTS[key.part]} (bytes {offset} to "
                f"{stop}: their checksum is another); {self._advice(number)}"
            )
        return StoredRow(num_tokens, content, view[:size])

    def refresh(self) -> None:
        """Looks for rows that other processes have added since.

        Raises:
            CacheError: What they added is damaged.
        """
        records: list[np.ndarray] = []
        shards: list[int] = []
        # In this order: an index is made before the first byte of its .bin is written.
        blobs = self.path.glob(f"{GROWING}*.bin")
        with_rows = [file.stem for file in blobs if file.stat().st_size]
        names = {file.stem for file in self.path.glob(f"{GROWING}*.index")}
        for name in with_rows:
            if name not in names:
                file = index_file(self.path, name)
                raise CacheError(f"{file}: is missing; {_advice(name)}")
        for name in sorted(names):
            found = self._grown(name)
            if len(found):
                records.append(found)
                shards.append(self._seen[name][0])
        if records:
            self._table = self._table.with_more(records, shards)

    def beside(self, name: str) -> Path:
        """A file that lies beside the shards, such as teacher_head.safetensors, checked.

        Raises:
            CacheError: It is missing or damaged.
        """
        known = self.manifest.files.get(name)
        file = self.path / name
        if known is None:
            raise CacheError(f"{file}: is not a file of this cache")
        self._check_size(file, known["bytes"])
        if sha256_of(file) != known["sha256"]:
            raise CacheError(f"{file}: is damaged, its sha256 is another; {_AGAIN}")
        return file

    def _read_shards(self) -> None:
        """The shards of the manifest, checked but for their blobs."""
        records = []
        for entry in self.manifest.shards:
            file = index_file(self.path, entry.name)
            self._check_size(bin_file(self.path, entry.name), entry.num_bytes)
            self._check_size(file, entry.rows * RECORD.itemsize)
            content = file.read_bytes()
            if hashlib.sha256(content).hexdigest() != entry.index_sha256:
                raise CacheError(f"{file}: is damaged, its sha256 is another; {_AGAIN}")
            records.append(np.frombuffer(content, dtype=RECORD))
            self._names.append(entry.name)
        for name, known in self.manifest.files.items():
            self._check_size(self.path / name, known["bytes"])
        if records:
            self._table = self._table.with_more(records, list(range(len(records))))

    def _check_size(self, file: Path, num_bytes: int) -> None:
        if not file.is_file():
            raise CacheError(f"{file}: is missing; {_AGAIN}")
        if (size := file.stat().st_size) != num_bytes:
            raise CacheError(f"{file}: has {size:,} bytes where {num_bytes:,} belong; {_AGAIN}")

    def _grown(self, name: str) -> np.ndarray:
        """Whole records that a growing shard has gained since it was last looked at."""
        number, num, end = self._seen.get(name, (len(self._names), 0, 0))
        file = index_file(self.path, name)
        with file.open("rb") as opened:
            opened.seek(num * RECORD.itemsize)
            content = opened.read()
        if name in self._seen and not content:
            return np.zeros(0, dtype=RECORD)
        blobs = bin_file(self.path, name)
        if not blobs.is_file():
            raise CacheError(f"{blobs}: is missing; {_advice(name)}")
        records, damaged = valid_records(content, blobs.stat().st_size, end)
        if damaged is not None:
            raise CacheError(f"{file}: is damaged at record {num + damaged}; {_advice(name)}")
        if name not in self._seen:
            self._names.append(name)
        end += sum(padded(size) for size in records["num_bytes"].tolist())
        self._seen[name] = (number, num + len(records), end)
        return records

    def _map(self, number: int, stop: int) -> mmap.mmap:
        """The .bin of a shard in memory, at least up to a byte."""
        mapped = self._maps.get(number)
        if mapped is None or len(mapped) < stop:
            file = bin_file(self.path, self._names[number])
            try:
                with file.open("rb") as opened:
                    mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # an empty file cannot be mapped
                raise CacheError(f"{file}: cannot be read: {error}; {_AGAIN}") from error
            if len(mapped) < stop:
                raise CacheError(
                    f"{file}: was cut off while it was read: {len(mapped):,} bytes where {stop:,} "
                    f"belong; {self._advice(number)}"
                )
            self._maps[number] = mapped
            if len(self._maps) > MAX_MAPPED:
                # its descriptor goes when the last row that was read of it does
                self._maps.popitem(last=False)
        self._maps.move_to_end(number)
        return mapped

    def _advice(self, number: int) -> str:
        return _advice(self._names[number])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict()}  # a mapping is of one process


def _advice(name: str) -> str:
    """What to do about a damaged shard."""
    if name.startswith(GROWING):
        return f"remove {name}.bin and {name}.index: runs compute its rows again"
    return _AGAIN
