"""A run's batches looked up in its cache, ahead of their turn; what is lacking is computed."""

import os
import socket
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from neo.data.ahead import Prepare
from neo.data.packing import Batch
from neo.data.prompt import IGNORE
from neo.data.segments import Segment, rows_alone, segments
from neo.losses.given import Given, HiddenStates
from neo.losses.head import Head
from neo.models.head import head_of
from neo.teachers.durable import CacheError
from neo.teachers.manifest import begin
from neo.teachers.measure import measured
from neo.teachers.row_locks import RowLocks
from neo.teachers.shard_writers import GrowingShard
from neo.teachers.shards import GROWING, PARTS, RowKey, StoredRow
from neo.teachers.store import CacheFolder
from neo.teachers.unpack import given_of, unpacked
from neo.training.run_cache import RunCache
from neo.training.token_loss import factors_of, given_by


@dataclass(frozen=True, eq=False)
class Taught:
    """What a cache holds for a batch.

    Args:
        part: Of the cache, in which its rows are.
        batch: On the CPU.
        found: Its rows, in the order of their supervised tokens.
        rows: What is kept of each, None where it is lacking.
        tensors: Of all tokens, where none is lacking.
    """

    part: int
    batch: Batch
    found: Sequence[Segment]
    rows: Sequence[StoredRow | None] = field(repr=False)
    tensors: dict[str, Tensor] | None = field(default=None, repr=False)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Taught":
        """The same with its tensors on the device."""
        if self.tensors is None:
            return self
        moved = {k: t.to(device, non_blocking=non_blocking) for k, t in self.tensors.items()}
        return replace(self, tensors=moved)


class CachedTargets:
    """Gives what a teacher gave, and keeps what it gives now.

    Args:
        cache: Of the run.
        pad_id: Of batches that are made for rows that are lacking.

    Attributes:
        num_read: Rows that were read.
        num_computed: Rows that the teacher ran over.
    """

    def __init__(self, cache: RunCache, pad_id: int) -> None:
        self.cache, self.pad_id = cache, pad_id
        self.folder = cache.folder
        self.num_read = self.num_computed = 0
        self._lock = threading.Lock()  # batches are looked up in a thread of their own
        self._shard: GrowingShard | None = None
        self._locks: RowLocks | None = None
        self._teacher_head: Head | None = None

    def prepare(self, part: int) -> Prepare:
        """What looks the batches of a part up ahead of their turn."""
        return Prepare(lambda batch: self.look_up(batch, part))

    def look_up(self, batch: Batch, part: int) -> Batch:
        """The batch, on the CPU, with what is kept of its rows.

        Raises:
            CacheError: A row is damaged, is another one, or is lacking where nothing computes it.
        """
        found = segments(batch)
        rows = [self._read(part, segment) for segment in found]
        if self.folder is not None and None in rows:  # it may have been stored since
            with self._lock:
                self.folder.refresh()
            rows = [row or self._read(part, each) for row, each in zip(rows, found, strict=True)]
        taught = Taught(part, replace(batch, taught=None), found, rows)
        return replace(batch, taught=self._whole(taught))

    def given(
        self,
        batch: Batch,
        teacher: PreTrainedModel | None,
        student: PreTrainedModel,
        *,
        part: int = 0,
        reduce: Callable[..., Any] | None = None,
    ) -> Given:
        """What the teacher gives for the supervised tokens of a batch.

        Args:
            batch: On the device.
            teacher: Runs over rows that are lacking; None where it is not loaded.
            student: Whose frozen head the teacher is projected on.
            part: Of a batch that was not looked up ahead.
            reduce: Adds up over all processes, where these hold the teacher together. All of them
                run it then if one must.

        Raises:
            CacheError: As `look_up`; or there is no room for what is to be stored.
        """
        taught: Taught | None = batch.taught
        if taught is None:
            ahead = self.look_up(batch.to("cpu"), part)
            taught = ahead.taught.to(batch.targets.device)
        assert taught is not None
        lacks = taught.tensors is None
        together = reduce is not None
        if lacks and teacher is None:
            raise self._lacking(taught)
        any_lacks = lacks
        if reduce is not None:
            number = torch.tensor(int(lacks), device=batch.targets.device)
            any_lacks = bool(reduce(number, reduce_op="sum"))
        if any_lacks:
            assert teacher is not None
            head = None
            if self.cache.stored.kind == "projected":  # gathered from all, where it is split
                head = factors_of(head_of(student)).to(self.cache.head_dtype)
            if lacks:
                taught = self._complete(taught, batch, teacher, head, wait=not together)
            else:
                _run(teacher, _nothing(batch))
        assert taught.tensors is not None
        self.num_read += len(taught.found)
        return given_of(taught.tensors, self.cache.stored, head=self._head(batch))

    def close(self) -> None:
        """Makes what was stored last."""
        if self._shard is not None:
            self._shard.close()
        if self._locks is not None:
            self._locks.close()

    def counts(self) -> dict[str, int]:
        """Rows that were read and computed by this process."""
        return {"read": self.num_read - self.num_computed, "computed": self.num_computed}

    def _read(self, part: int, segment: Segment) -> StoredRow | None:
        if self.folder is None:
            return None
        with self._lock:
            try:
                row = self.folder.read(RowKey(part, segment.row_id))
            except KeyError:
                return None
        if (row.num_tokens, row.content) != (segment.num_tokens, segment.content):
            raise CacheError(
                f"{self.folder.path}: {PARTS[part]} {segment.row_id} is another one than this "
                f"run's: {row.num_tokens} supervised tokens of content {row.content:08x} were "
                f"stored, and the run has {segment.num_tokens} of {segment.content:08x}. Have the "
                "rows changed since? Write the cache again"
            )
        return row

    def _whole(self, taught: Taught) -> Taught:
        """With its tensors, where no row is lacking."""
        rows = [row for row in taught.rows if row is not None]
        if len(rows) < len(taught.rows):
            return taught
        tensors = unpacked(rows, self.cache.stored, self.cache.shapes)
        if torch.cuda.is_available():
            tensors = {key: tensor.pin_memory() for key, tensor in tensors.items()}
        return replace(taught, tensors=tensors)

    def _complete(
        self,
        taught: Taught,
        batch: Batch,
        teacher: PreTrainedModel,
        student_head: Head | None,
        *,
        wait: bool,
    ) -> Taught:
        """With the rows that were lacking: of another process by now, or computed and stored."""
        self._begin()
        assert self.folder is not None
        keys = [RowKey(taught.part, segment.row_id) for segment in taught.found]
        wanted = [key for key, row in zip(keys, taught.rows, strict=True) if row is None]
        assert self._locks is not None
        with self._locks.held(wanted, wait=wait) as mine:
            with self._lock:
                self.folder.refresh()
            rows = list(taught.rows)
            for place, segment in enumerate(taught.found):
                if rows[place] is None:
                    rows[place] = self._read(taught.part, segment)
            places = [place for place, row in enumerate(rows) if row is None]
            if places:
                self._compute(taught, places, rows, batch, teacher, student_head, set(mine))
            elif not wait:  # the others are at it
                _run(teacher, _nothing(batch))
        return self._whole(replace(taught, rows=rows)).to(batch.targets.device)

    def _compute(
        self,
        taught: Taught,
        places: Sequence[int],
        rows: list[StoredRow | None],
        batch: Batch,
        teacher: PreTrainedModel,
        student_head: Head | None,
        mine: set[RowKey],
    ) -> None:
        """Runs the teacher over the rows that are lacking, and stores those that are this one's."""
        chosen = [taught.found[place] for place in places]
        alone = replace(batch, taught=None)
        longest = max(segment.stop - segment.start for segment in chosen)
        # the others were paid for; but rows that are laid out alone may take more room
        apart = len(chosen) < len(taught.found)
        if apart and len(chosen) * longest <= batch.targets.numel():
            alone = rows_alone(taught.batch, chosen, self.pad_id).to(batch.targets.device)
            apart = False
        given = _run(teacher, alone)
        stored, shapes = self.cache.stored, self.cache.shapes
        keys = [(RowKey(taught.part, each.row_id), each.num_tokens) for each in chosen]
        targets = alone.targets[alone.targets != IGNORE]
        if apart:
            wanted = _tokens_of(taught.found, places).to(targets.device)
            given, targets = replace(given, hidden=given.hidden[wanted]), targets[wanted]
        blobs = measured(given, targets, stored, shapes, keys, student_head)
        self.num_computed += len(chosen)
        made = [
            StoredRow(segment.num_tokens, segment.content, memoryview(blob))
            for segment, blob in zip(chosen, blobs, strict=True)
        ]
        assert self._shard is not None
        named = [(key, row) for (key, _), row in zip(keys, made, strict=True) if key in mine]
        self._shard.add_all(named)
        for place, row in zip(places, made, strict=True):
            rows[place] = row

    def _begin(self) -> None:
        """The folder, and this process's own shard in it."""
        if self._shard is not None:
            return
        cache = self.cache
        begin(cache.path, cache.stored, cache.shapes, cache.identity, growing=True)
        name = f"{GROWING}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._shard = GrowingShard(cache.path, name)
        self._locks = RowLocks(cache.path)
        if self.folder is None:
            self.folder = CacheFolder.open(cache.path)

    def _head(self, batch: Batch) -> Head | None:
        """The teacher's, where hidden states are kept; read once."""
        if self.cache.stored.kind != "hidden":
            return None
        if self._teacher_head is None:
            self._teacher_head = self.cache.teacher_head(batch.targets.device)
        return self._teacher_head

    def _lacking(self, taught: Taught) -> CacheError:
        lacking = [
            s.row_id for s, row in zip(taught.found, taught.rows, strict=True) if row is None
        ]
        return CacheError(
            f"{self.cache.path}: lacks {len(lacking)} rows of a batch, such as "
            f"{PARTS[taught.part]} {lacking[0]}; use teacher=auto, or write a cache that has them"
        )


def check_all_alike(trainer: Any, has_teacher: bool, cached: CachedTargets | None) -> None:
    """Raise where the processes of a run have found their cache in different states.

    Each looks for itself when it starts, while other runs may be filling it; those that have a
    teacher would then wait for those that have none.

    Raises:
        RuntimeError: In all of them.
    """
    data = getattr(trainer, "datamodule", None)
    if trainer.world_size == 1 or data is None:
        return
    each = data.ranks.gather([has_teacher, None if cached is None else cached.cache.name])
    if any(one != each[0] for one in each):
        raise RuntimeError(
            f"the processes of this run found its cache in different states ({each}): another run "
            "was filling it as they started. Start the same command again"
        )


def _tokens_of(found: Sequence[Segment], places: Sequence[int]) -> Tensor:
    """Which of a batch's supervised tokens are of some of its rows."""
    which = torch.zeros(len(found), dtype=torch.bool)
    which[list(places)] = True
    return which.repeat_interleave(torch.tensor([segment.num_tokens for segment in found]))


def _run(teacher: PreTrainedModel, batch: Batch) -> HiddenStates:
    """What the teacher gives for the supervised tokens of a batch."""
    return given_by(teacher, batch, batch.targets != IGNORE)


def _nothing(batch: Batch) -> Batch:
    """One token of the batch, of which nothing is asked."""
    one = (slice(0, 1), slice(0, 1))
    targets = torch.full_like(batch.targets[one], IGNORE)
    return Batch(batch.input_ids[one], torch.zeros_like(batch.position_ids[one]), targets)
