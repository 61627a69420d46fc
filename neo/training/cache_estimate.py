"""What a cache will take, told before it is begun: rows, tokens, bytes, time, size of a shard."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from neo.config import ConfigError
from neo.data.loader import TooManyBadRows
from neo.data.packing import RowReport
from neo.teachers.shards import RECORD, padded
from neo.teachers.stored import Stored
from neo.training.cache_models import Measurer
from neo.training.cache_rows import CacheRows, Span, SpanRows, num_supervised

COUNTED_ROWS = 20_000  # at most so many are all encoded to count their tokens
SAMPLED_ROWS = 512  # of a part with more are encoded to tell how many tokens a row has
MEASURED_BATCHES = 4  # are run, of which the first warms up
SHARD_BYTES = 2**28
# What a small cache is cut into all the same: many devices share it, and little is lost to a kill.
LEAST_SHARDS, LEAST_BATCHES = 64, 32
HEAD_FILE_BYTES = 4096  # beside its tensors


@dataclass(frozen=True)
class RowCounts:
    """How much there is to run a teacher over.

    Args:
        num_rows: To be read, of all parts; of a stream at most.
        num_tokens: Supervised ones.
        counted: Row by row, and not from a sample.
        num_sampled: Rows that were looked at.
    """

    num_rows: int
    num_tokens: int
    counted: bool
    num_sampled: int

    @property
    def tokens_per_row(self) -> float:
        """On average, bad rows counted too."""
        return self.num_tokens / max(1, self.num_rows)


def count_rows(rows: CacheRows, limit: int | None) -> tuple[RowCounts, list[SpanRows]]:
    """The rows and tokens of a cache, and rows that stand for all.

    Args:
        rows: All.
        limit: `data.max_bad_rows`, which a whole count holds to.

    Raises:
        TooManyBadRows: There are more.
    """
    counted = not rows.is_stream and rows.num_rows_in_all <= COUNTED_ROWS
    tokens, sampled, total = 0.0, 0, 0
    report = RowReport()
    sample = rows.sample(SAMPLED_ROWS)
    for part, of_part in zip(rows.streams, sample, strict=True):
        read = of_part
        if counted:
            (read,) = rows.read([Span(0, part, 0, rows.num_rows(part))])
        # a stream may turn out to be shorter than it may be
        num_rows = read.num_read if read.is_last else rows.num_rows(part)
        own = sum(map(num_supervised, read.examples))
        tokens += own * num_rows / max(1, read.num_read)
        sampled, total = sampled + read.num_read, total + num_rows
        report = report + read.report
    counted = sampled == total
    if counted and limit is not None and report.num_bad > limit:
        raise TooManyBadRows(report, limit)
    if not report.rows - report.num_bad:
        raise TooManyBadRows(report, None)
    return RowCounts(total, round(tokens), counted, sampled), sample


@dataclass(frozen=True)
class Estimate:
    """A cache before it is begun.

    Args:
        counts: Of rows and tokens.
        bytes_per_token: Of blobs and their records.
        num_bytes: In all, the teacher's head included.
        num_measured: Rows that the bytes and the time are measured on.
        tokens_per_s: On one device.
        rows_per_shard: About 256 MiB.
        logits_bytes: What all logits would take in bfloat16.
    """

    counts: RowCounts
    bytes_per_token: float
    num_bytes: int
    num_measured: int
    tokens_per_s: float
    rows_per_shard: int
    logits_bytes: int

    def seconds(self, num_processes: int, share: float | int = 1.0) -> float:
        """For that share of the rows, on so many devices."""
        return share * self.counts.num_tokens / self.tokens_per_s / num_processes


def estimate(
    rows: CacheRows, measurer: Measurer, counts: RowCounts, sample: list[SpanRows]
) -> Estimate:
    """Runs the teacher over a few batches, as the cache will, and keeps nothing.

    Args:
        rows: All.
        measurer: What makes blobs of batches.
        counts: Of all rows.
        sample: That stand for all.
    """
    # Part 0 is by far the larger one, where there are two.
    span_rows = next(read for read in sample if read.examples)
    batches = list(rows.batches(span_rows.examples))
    if len(batches) > MEASURED_BATCHES:  # they may be sorted by length
        batches = [batches[len(batches) * i // MEASURED_BATCHES] for i in range(MEASURED_BATCHES)]
    found, tokens, seconds = [], 0, 0.0
    for number, (batch, examples) in enumerate(batches):
        if number == 1:  # the first has warmed up
            tokens, seconds = 0, 0.0
        began = time.perf_counter()
        made = measurer.measure(span_rows.span.part, batch, examples)
        seconds += time.perf_counter() - began
        tokens += sum(one.num_tokens for one in made)
        found += made
    size = sum(padded(len(one.blob)) + RECORD.itemsize for one in found)
    bytes_per_token = size / sum(one.num_tokens for one in found)
    row = max(1.0, bytes_per_token * counts.tokens_per_row)
    batch_rows = LEAST_BATCHES * rows.data.batch_size
    most = max(batch_rows, -(-counts.num_rows // LEAST_SHARDS))
    head = 0
    if measurer.stored.kind == "hidden" and measurer.teacher_head is not None:
        head = measurer.teacher_head.weight.nbytes + HEAD_FILE_BYTES
    return Estimate(
        counts=counts,
        bytes_per_token=bytes_per_token,
        num_bytes=round(bytes_per_token * counts.num_tokens) + head,
        num_measured=len(found),
        tokens_per_s=tokens / max(seconds, 1e-9),
        rows_per_shard=max(1, min(most, round(SHARD_BYTES / row))),
        logits_bytes=2 * counts.num_tokens * measurer.shapes.vocab,
    )


def free_bytes(folder: Path) -> int:
    """What the disk of a folder has left, be the folder there or not."""
    standing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(standing).free


def check_disk(folder: Path, needed: int) -> None:
    """Refuses a cache that the disk has no room for.

    Args:
        folder: Of the cache.
        needed: Bytes that are still to be written.

    Raises:
        ConfigError: With both numbers.
    """
    free = free_bytes(folder)
    if needed > free:
        raise ConfigError(
            [
                f"out={folder}: {spelt_bytes(needed)} are still to be written, and the disk has "
                f"{spelt_bytes(free)} left ({needed:,} and {free:,} bytes). Make room, give out= a "
                "folder of another disk, keep less (teacher.kind, teacher.values, teacher.k), or "
                "take fewer rows (data.max_rows)"
            ]
        )


def estimate_lines(
    found: Estimate,
    stored: Stored,
    folder: Path,
    num_processes: int,
    written: int,
    share: float | int,
) -> list[str]:
    """The estimate for a terminal.

    Args:
        found: What was found.
        stored: What is kept.
        folder: Of the cache.
        num_processes: That write it.
        written: Bytes that are there already.
        share: Of the rows that are left to do.
    """
    counts = found.counts
    how = "counted" if counts.counted else f"estimated from {counts.num_sampled:,} rows"
    unsaid = ("kind",) if stored.is_random else ("kind", "seed")
    said = {key: value for key, value in stored.as_dict().items() if key not in unsaid}
    kept = ", ".join(f"{key}={value}" for key, value in said.items())
    devices = "one device" if num_processes == 1 else f"{num_processes} devices"
    lines = [
        f"keeps: {stored.kind} ({kept})",
        f"rows: {counts.num_rows:,} in shards of {found.rows_per_shard:,}; supervised tokens: "
        f"{counts.num_tokens:,} ({how})",
        f"size: {spelt_bytes(found.num_bytes)}, {found.bytes_per_token:,.1f} bytes a token "
        f"(measured on {found.num_measured} rows); all logits in bfloat16 would take "
        f"{spelt_bytes(found.logits_bytes)}",
        f"time: {spelt_seconds(found.seconds(num_processes, share))} at "
        f"{found.tokens_per_s:,.0f} supervised tokens/s a device, on {devices}",
        f"disk: {spelt_bytes(free_bytes(folder))} are free in {folder}",
    ]
    if written:
        lines[-1] += f", and {spelt_bytes(written)} of the cache are written"
    return lines


def spelt_bytes(num: float | int) -> str:
    """A size as it is read.

    Example:
        >>> spelt_bytes(900), spelt_bytes(5 * 2**20), spelt_bytes(1.3 * 2**40)
        ('900 bytes', '5.0 MiB', '1.3 TiB')
    """
    if num < 1024:
        return f"{num:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        num /= 1024
        if num < 1024:
            return f"{num:.1f} {unit}"
    return f"{num / 1024:,.1f} TiB"


def spelt_seconds(seconds: float | int) -> str:
    """A time as it is read.

    Example:
        >>> spelt_seconds(4.2), spelt_seconds(200), spelt_seconds(9000)
        ('about 5 s', 'about 4 min', 'about 2.5 h')
    """
    if seconds < 120:
        return f"about {max(1, round(seconds + 0.5))} s"
    return (
        f"about {round(seconds / 60 + 0.5)} min"
        if seconds < 7200
        else f"about {seconds / 3600:.1f} h"
    )
