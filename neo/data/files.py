"""Local files as rows, every value as it is written.

`datasets` reads Parquet. It would read JSON and CSV too, but with types of its own making: answers
that are dates become timestamps, "02" becomes 2 and "NA" nothing (seen with 5.2). What is taught
word for word is read here, row by row, and only large files are laid down in its cache.
"""

import bz2
import csv
import gzip
import hashlib
import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from io import TextIOBase
from pathlib import Path
from typing import Any

import zstandard
from datasets import Dataset, load_dataset

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": zstandard.open}
JSON_FORMATS = (".json", ".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
FORMATS = (*JSON_FORMATS, *TABLES, ".parquet")
# Files larger than this together go through the cache of `datasets`, smaller ones stay in memory.
MEMORY_BYTES = 200_000_000


class UnreadableFile(ValueError):
    """A data file that is missing, of no known format, or malformed."""


class MalformedFile(UnreadableFile):
    """A data file that is there, but holds no rows, at a stated line where there is one."""


class JsonRows(Sequence[Any]):
    """Rows kept as JSON texts, decoded one by one when they are asked for."""

    def __init__(self, texts: Any) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        text = self.texts[index]
        return json.loads(text["json"] if isinstance(text, dict) else text)


def read_files(path: str) -> Any:
    """The rows of a file, a glob or a folder, in the order of file names and lines.

    Raises:
        UnreadableFile: Naming the file, and the line where there is one.
    """
    files = find_files(path)
    kinds = {_format(file) for file in files}
    if kinds == {".parquet"}:
        names = [str(file) for file in files]
        try:
            return load_dataset("parquet", data_files=names, split="train")
        except Exception as error:
            cause = error.__cause__ or error
            raise MalformedFile(
                f"data.path={path!r}: cannot be read as Parquet: {cause}"
            ) from error
    if ".parquet" in kinds:
        raise UnreadableFile(
            f"data.path={path!r}: holds Parquet and text files ({sorted(kinds)}); give one kind"
        )
    if sum(file.stat().st_size for file in files) <= MEMORY_BYTES:
        return JsonRows(list(_texts(files)))
    # size and time of change are part of the key under which datasets caches what it has read
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    try:
        return JsonRows(Dataset.from_generator(_stamped, gen_kwargs={"stamps": stamps}))
    except Exception as error:
        if isinstance(error.__cause__, UnreadableFile):
            raise error.__cause__ from None
        raise


def content_hash(path: str) -> str:
    """Sixteen hex digits that name the content of the files, whatever they are called."""
    digest = hashlib.sha256()
    for file in find_files(path):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def find_files(path: str) -> list[Path]:
    """The data files that a path, a glob or a folder names, in the order of their names."""
    place = Path(path).expanduser()
    if place.is_dir():
        found = [
            file
            for file in sorted(place.rglob("*"))
            if file.is_file()
            and _format(file) in FORMATS
            and not any(part.startswith(".") for part in file.relative_to(place).parts)
        ]
        if not found:
            raise UnreadableFile(
                f"data.path={path!r}: the folder holds no data file ({', '.join(FORMATS)}; all but "
                f"Parquet also with {', '.join(OPENERS)})"
            )
        return found
    found = [place] if place.is_file() else [Path(name) for name in sorted(glob(str(place)))]
    found = [file for file in found if file.is_file()]
    if not found:
        raise UnreadableFile(
            f"data.path={path!r}: no such file or folder, and no file fits it as a glob"
        )
    for file in found:
        if _format(file) not in FORMATS:
            raise UnreadableFile(
                f"data.path: {file} is of no known format; legal are {', '.join(FORMATS)}, all but "
                f"Parquet also with {', '.join(OPENERS)} behind"
            )
    return found


def _format(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        inner = suffixes[-2] if len(suffixes) > 1 else ""
        return inner if inner != ".parquet" else "compressed " + inner
    return suffixes[-1] if suffixes else ""


def _stamped(stamps: list[tuple[str, int, int]]) -> Iterator[dict[str, str]]:
    for text in _texts([Path(name) for name, _, _ in stamps]):
        yield {"json": text}


def _texts(files: Sequence[Path]) -> Iterator[str]:
    """One JSON text per row."""
    for file in files:
        kind = _format(file)
        opener: Any = OPENERS.get(file.suffix.lower(), open)
        line = 0
        try:
            with opener(file, "rt", encoding="utf-8-sig", newline="") as lines:
                if kind in TABLES:
                    rows = _table_rows(lines, TABLES[kind], file)
                else:
                    rows = _json_rows(lines, file)
                for line, text in rows:  # noqa: B007  the last good line is told
                    yield text
        except UnicodeDecodeError as error:
            raise MalformedFile(
                f"data.path: {file}, after line {line}: not UTF-8 ({error.reason})"
            ) from error
        except (OSError, EOFError, zstandard.ZstdError, lzma.LZMAError) as error:
            raise MalformedFile(
                f"data.path: {file}, after line {line}: cannot be read: {error}"
            ) from error


def _json_rows(lines: TextIOBase, file: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            continue
        if number == 1 and text.startswith("["):
            yield from _json_list(line + lines.read(), file)
            return
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            if text in ("{", "["):
                yield from _json_list("\n" * (number - 1) + line + lines.read(), file)
                return
            raise MalformedFile(
                f"data.path: {file}, line {number}: not JSON: {error.msg} at column {error.colno}"
            ) from error
        if not isinstance(row, Mapping):
            raise MalformedFile(
                f"data.path: {file}, line {number}: a row must be a JSON object, got {text[:40]!r}"
            )
        yield number, text


def _json_list(text: str, file: Path) -> Iterator[tuple[int, str]]:
    """The rows of a file that is one JSON list."""
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise MalformedFile(
            f"data.path: {file}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}"
        ) from error
    if not isinstance(rows, list):
        raise MalformedFile(
            f"data.path: {file}: is one JSON object with the keys {sorted(rows)[:8]}; "
            "it must be a list of rows, or one row per line"
        )
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise MalformedFile(
                f"data.path: {file}, row {number}: a row must be a JSON object, got {row!r:.40}"
            )
        yield 0, json.dumps(row)


def _table_rows(lines: TextIOBase, delimiter: str, file: Path) -> Iterator[tuple[int, str]]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    csv.field_size_limit(2**31 - 1)  # answers may be long; the default is 128 KiB
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) < len(header):
            raise MalformedFile(f"data.path: {file}, line 1: column names repeat: {header}")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise MalformedFile(
                    f"data.path: {file}, line {reader.line_num}: {len(cells)} cells where the "
                    f"header has {len(header)} ({', '.join(header)})"
                )
            yield reader.line_num, json.dumps(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise MalformedFile(
            f"data.path: {file}, line {reader.line_num}: not a table: {error}"
        ) from error
