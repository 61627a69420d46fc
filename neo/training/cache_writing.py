"""Shards of a cache, written one after another by each process, so that a kill costs one shard."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neo.data.loader import TooManyBadRows
from neo.data.packing import RowReport
from neo.teachers.durable import CacheError, write_whole
from neo.teachers.shard_writers import ShardWriter
from neo.teachers.shards import PARTS, ShardEntry, whole_shard
from neo.training.cache_models import Measured, Measurer
from neo.training.cache_progress import CacheProgress
from neo.training.cache_rows import CacheRows, Span, SpanRows
from neo.training.cache_standing import LAYOUT, PATIENCE_S, WAIT_S
from neo.training.run_cache import CERTIFICATE


@dataclass(frozen=True)
class Done:
    """What is known of a shard that lies whole in the folder, until the manifest is written.

    Args:
        entry: For the manifest; None where none of its rows could be used.
        num_read: Rows that were read for it.
        is_last: A stream ended in it.
        num_tokens: Supervised ones.
        report: Of its rows.
    """

    entry: ShardEntry | None
    num_read: int
    is_last: bool
    num_tokens: int
    report: RowReport


def done_file(folder: Path, span: Span) -> Path:
    """Where it is kept that a shard is done."""
    return folder / f"{span.name}.done"


def done(folder: Path, span: Span) -> Done | None:
    """What was kept of a shard; None where it is not whole."""
    try:
        plain = json.loads(done_file(folder, span).read_bytes())
        entry = None if plain["entry"] is None else ShardEntry(*plain["entry"])
        report = _report(plain["report"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):  # not what was written
        return None
    if entry is not None and whole_shard(folder, span.name) != entry:
        return None
    return Done(entry, plain["num_read"], plain["is_last"], plain["num_tokens"], report)


def _report(plain: dict[str, Any]) -> RowReport:
    """A report that has been JSON, which knows no tuples."""
    shown = {reason: tuple((i, d) for i, d in rows) for reason, rows in plain["shown"].items()}
    return RowReport.from_plain(plain | {"shown": shown})


def write_span(folder: Path, read: SpanRows, made: dict[int, Measured]) -> Done:
    """Puts a shard in place, and behind it the word that it is done.

    Args:
        folder: Of the cache.
        read: Its rows.
        made: What is kept of them, by row id.

    Raises:
        CacheError: There is no room on the disk; nothing of the shard is left.
    """
    entry = None
    if made:
        with ShardWriter(folder, read.span.name) as writer:
            for row_id in sorted(made):
                one = made[row_id]
                writer.add(one.key, one.num_tokens, one.content, one.blob)
        entry = writer.entry
    num_tokens = sum(one.num_tokens for one in made.values())
    plain = {
        "entry": entry,
        "num_read": read.num_read,
        "is_last": read.is_last,
        "num_tokens": num_tokens,
        "report": read.report.plain(),
    }
    write_whole(done_file(folder, read.span), json.dumps(plain).encode())
    return Done(entry, read.num_read, read.is_last, num_tokens, read.report)


def write_shards(
    folder: Path,
    rows: CacheRows,
    spans: Sequence[Span],
    measurer: Measurer,
    *,
    max_bad_rows: int | None,
    progress: CacheProgress,
) -> None:
    """Writes those of the shards that are not done.

    Args:
        folder: Of the cache.
        rows: All of its rows.
        spans: This process's shards.
        measurer: What makes blobs of batches.
        max_bad_rows: More in this process's shards end it.
        progress: Is told of every batch.

    Raises:
        TooManyBadRows: There are.
        CacheError: There is no room on the disk.
    """
    bad = RowReport()
    left = []
    for span in spans:
        remove_partial(folder, span)
        if (before := done(folder, span)) is None:
            left.append(span)
        else:
            bad = bad + before.report
            progress.skip(before.num_read)
    for read in rows.read(left):
        bad = bad + read.report
        if max_bad_rows is not None and bad.num_bad > max_bad_rows:
            raise TooManyBadRows(bad, max_bad_rows)
        progress.advance(read.num_read - len(read.examples), 0)
        made: dict[int, Measured] = {}
        for batch, examples in rows.batches(read.examples):
            for one in measurer.measure(read.span.part, batch, examples):
                made[one.key.row_id] = one
            progress.advance(len(examples), batch.num_supervised)
        write_span(folder, read, made)


def remove_partial(folder: Path, span: Span) -> None:
    """Removes what a process that was killed left of a shard, which is this process's now."""
    for file in folder.glob(f".{span.name}.*.partial"):
        file.unlink(missing_ok=True)


def wait_for_all(
    folder: Path, spans: Sequence[Span], world_size: int, say: Callable[[str], Any]
) -> list[tuple[Span, Done]]:
    """All shards, once the last process has written its last one.

    Args:
        folder: Of the cache.
        spans: All of them; those behind the end of a stream are not waited for.
        world_size: Processes that write them, of which this is the first.
        say: Is told what is waited for, if that takes long.

    Raises:
        CacheError: A shard of this process is not there any more.
    """
    found: list[tuple[Span, Done]] = []
    ended = False  # the stream of part 0
    began = time.monotonic()
    for span in spans:
        while not (ended and span.part == 0):
            if (one := done(folder, span)) is not None:
                found.append((span, one))
                ended = ended or one.is_last
                break
            if span.number % world_size == 0:
                raise CacheError(
                    f"{folder / span.name}: was written and is not whole any more; start the same "
                    "command again"
                )
            if time.monotonic() - began > PATIENCE_S:
                began = float("inf")
                say(f"waiting for shards of other processes, {span.name} first")
            time.sleep(WAIT_S)
    return found


def counts_of(found: Sequence[tuple[Span, Done]], limit: int | None) -> dict[str, Any]:
    """What the manifest says of the rows: of those read, bad ones and held out ones are not there.

    Args:
        found: All shards.
        limit: Up to how many rows of a stream were asked for.
    """
    report = sum((one.report for _, one in found), RowReport())
    read = [0] * len(PARTS)
    for span, one in found:
        read[span.part] += one.num_read
    return {
        "rows": sum(one.entry.rows for _, one in found if one.entry is not None),
        "tokens": sum(one.num_tokens for _, one in found),
        "bad_rows": dict(sorted(report.bad.items())),
        "truncated_rows": report.truncated,
        "read": read[0],
        "read_val_rows": read[1],
    } | ({} if limit is None else {"limit": limit})


def remove_traces(folder: Path) -> None:
    """Removes what only an unfinished cache needs."""
    for file in folder.glob("*.done"):
        file.unlink(missing_ok=True)
    for name in (LAYOUT, CERTIFICATE):
        (folder / name).unlink(missing_ok=True)
