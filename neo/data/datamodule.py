"""The data of a run: what a config says of it, and the loaders that come of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from neo.data.ahead import Prepare
from neo.data.epoch import Epoch, resumed
from neo.data.loader import EpochLoader, TooManyBadRows
from neo.data.order import Rows, RowTable, first_columns, permutation
from neo.data.packing import Batch, RowReport
from neo.data.place import Rest
from neo.data.prompt import PromptEncoder
from neo.data.ranks import Ranks
from neo.data.reader import RowStream
from neo.data.rows import SCHEMAS, detect_schema
from neo.data.validation import held_out_rows, split_table, table_keys


@dataclass(frozen=True, kw_only=True)
class Data:
    """What all sources of rows have in common; a subclass says where the rows come from.

    Args:
        max_length: Tokens per sequence; longer rows are cut off at the right.
        batch_size: Sequences per micro-batch: rows, or packed sequences of several rows.
        packing: Lay short rows side by side in one sequence, unseen by each other.
        schema: One of `SCHEMAS`; None finds it out from the columns.
        chat_template: A shipped template's name or a .jinja file; None is the tokenizer's own.
        shuffle: Read rows in an order that seed and epoch fix, instead of as they stand.
        val_share: The share of rows held out for validation; 0 for none.
        max_rows: At most so many rows: of a stream the first, otherwise drawn with the seed.
        max_val_rows: At most so many rows held out.
        max_bad_rows: More unusable rows in an epoch (of one process) stop the run.
        num_workers: Processes that read ahead; 0 reads in the training process.
    """

    max_length: int = 2048
    batch_size: int = 8
    packing: bool = True
    schema: str | None = None
    chat_template: str | None = None
    shuffle: bool = True
    val_share: float = 0.02
    max_rows: int | None = None
    max_val_rows: int | None = 1000
    max_bad_rows: int | None = 100
    num_workers: int = 0

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ValueError("; ".join(problems))

    def problems(self) -> list[str]:
        """What is wrong with these values, each with what would be legal."""
        problems = []
        for name, least in (
            ("max_length", 2),
            ("batch_size", 1),
            ("max_rows", 1),
            ("max_val_rows", 1),
            ("max_bad_rows", 0),
            ("num_workers", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                problems.append(f"data.{name}={value}: must be at least {least}")
        if not 0 <= self.val_share < 1:
            problems.append(f"data.val_share={self.val_share}: must be at least 0 and below 1")
        if self.schema is not None and self.schema not in SCHEMAS:
            legal = ", ".join(SCHEMAS)
            problems.append(f"data.schema={self.schema!r}: must be null or one of {legal}")
        return problems

    def rows(self) -> Rows:
        """The rows, as a table or as a stream that can be read again from its beginning."""
        raise NotImplementedError

    def val_rows(self) -> RowTable | None:
        """Rows of their own for validation; None: a share of `rows` is held out."""
        return None

    def identity(self) -> dict[str, str]:
        """What the rows are: a "hash" of their content, or the "revision" of the hub."""
        raise NotImplementedError


class DataModule(L.LightningDataModule):
    """Loaders of `Batch` for training and validation, the same whenever they are made again.

    Batches are read ahead, so training says which it has consumed, by `consume`. The epoch is
    counted here, one per pass; Lightning's own number is one too high after a resume from the last
    batch of an epoch (seen with 2.6.6).
    """

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        super().__init__()
        self.data, self.seed = data, seed
        self.encoder = PromptEncoder(tokenizer, data.max_length, data.chat_template)
        self._epoch = Epoch()
        self._num_before = 0  # batches of this epoch that were consumed before the pass began
        self._all_read = False  # of this epoch
        self._ranks: Ranks | None = None
        self._train_rows: Rows | None = None
        self._train_indices: np.ndarray | None = None
        self._val_rows: RowTable | None = None
        self._val_indices: np.ndarray | None = None
        self.schema: str | None = None
        self._loader: EpochLoader | None = None
        self.prepare: dict[str, Prepare] = {}  # what is done to batches of "train" and "val"

    @property
    def position(self) -> tuple[int, int]:
        """The epoch, and how many of its batches were consumed."""
        return self._epoch.number, self._epoch.num_batches

    @property
    def report(self) -> RowReport:
        """What this rank read for the batches of the epoch that were consumed."""
        return self._epoch.report

    @property
    def rank(self) -> int:
        """This process among those that train together."""
        return int(self.trainer.global_rank) if self.trainer is not None else 0

    @property
    def world_size(self) -> int:
        """How many processes train together."""
        return int(self.trainer.world_size) if self.trainer is not None else 1

    @property
    def ranks(self) -> Ranks:
        """What these processes talk through."""
        if self._ranks is None or self._ranks.world_size != self.world_size:
            self._ranks = Ranks(self.rank, self.world_size)
        return self._ranks

    @property
    def num_rows(self) -> int | None:
        """Rows per epoch to train on, of all ranks together; None for a stream."""
        self.setup()
        return None if self._train_indices is None else len(self._train_indices)

    @property
    def num_val_rows(self) -> int:
        """Rows to validate on."""
        self.setup()
        return 0 if self._val_indices is None else len(self._val_indices)

    @property
    def val_part(self) -> int:
        """0 where validation rows are rows of the training table, 1 where they have their own."""
        return int(self._val_rows is not self._train_rows)

    def setup(self, stage: str | None = None) -> None:
        """Opens the rows, finds out their schema and holds out validation rows; once."""
        if self.schema is not None:
            return
        data = self.data
        rows = data.rows()
        columns = first_columns(rows)
        if not columns:
            raise ValueError(f"data: there are no rows in {data}")
        schema = data.schema or detect_schema(columns)
        val_rows: Any = data.val_rows()
        if isinstance(rows, RowTable):
            indices = np.arange(len(rows))
            if data.max_rows is not None and data.max_rows < len(rows):
                indices = np.sort(permutation(len(rows), self.seed)[: data.max_rows])
            if val_rows is None and data.val_share:
                keys = table_keys(rows, indices, schema)
                train, val = split_table(keys, data.val_share, data.max_val_rows)
                self._train_indices, self._val_indices = indices[train], indices[val]
                val_rows = rows
            else:
                self._train_indices = indices
        elif val_rows is None and data.val_share:
            val_rows = held_out_rows(rows, schema, data.val_share, data.max_val_rows, data.max_rows)
        if val_rows is not None and self._val_indices is None:
            self._val_indices = np.arange(len(val_rows))
        self._train_rows, self._val_rows, self.schema = rows, val_rows, schema

    def train_dataloader(self) -> EpochLoader:
        """One epoch of training batches per pass."""
        self.teardown("fit")
        self._loader = EpochLoader(
            self.train_stream(),
            num_workers=self.data.num_workers,
            begin=self._begin_pass,
            end=self._end_pass,
            ranks=self.ranks,
            prepare=self.prepare.get("train"),
        )
        return self._loader

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Out of pinned memory, without waiting; Lightning itself waits for what is no tensor."""
        return batch.to(device, non_blocking=device.type == "cuda")

    def teardown(self, stage: str) -> None:
        """Ends the workers that read for training."""
        if self._loader is not None:
            self._loader.close()

    def val_dataloader(self) -> EpochLoader | Sequence[Any]:
        """The validation batches, every time the same; nothing if no rows are held out."""
        self.setup()
        if (stream := self.val_stream()) is None:
            return []
        # read in the training process, or workers for both would wait for each other's turn
        prepare = self.prepare.get("val")
        return EpochLoader(stream, num_workers=0, ranks=self.ranks, prepare=prepare)

    def val_stream(self) -> RowStream | None:
        """What the validation batches of this rank come from; None where no rows are held out."""
        self.setup()
        if self._val_rows is None:
            return None
        return self._stream(self._val_rows, self._val_indices, shuffle=False)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass the one of this epoch, from its beginning."""
        self._go_on(Epoch(epoch))

    def consume(self, batch: Batch) -> None:
        """Counts a batch as consumed: a run that goes on from here gives the ones behind it.

        Raises:
            TooManyBadRows: More rows of this epoch than `data.max_bad_rows` could not be used.
        """
        self._epoch.consume(batch, self._num_readers)
        limit = self.data.max_bad_rows
        if limit is not None and self.report.num_bad > limit:
            raise TooManyBadRows(self.report, limit)

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, of all ranks, each of which must call this; the same on each."""
        ranks = self.ranks.gather(self._epoch.of_rank())
        return self._epoch.plain(ranks) | {"data": self._what(), "readers": self._readers()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on behind the saved place.

        By as many readers as saved it, with the same batches to the bit; by others, with the rows
        of the epoch that were not consumed.

        Raises:
            ValueError: The epoch consists of other rows than when it was begun.
        """
        if not state_dict["batches"]:
            self.set_epoch(state_dict["epoch"])
            return
        saved, now = state_dict["data"], self._what()
        changed = [
            f"{name} was {saved[name]} and is {value}"
            for name, value in now.items()
            if saved[name] != value
        ]
        if changed:
            raise ValueError(
                "cannot resume in the middle of an epoch, because it would consist of other rows: "
                f"{'; '.join(changed)}. Set them as they were, or begin anew with rerun=true"
            )
        same = state_dict["readers"] == self._readers()
        order = None if same else self.train_stream().order
        self._go_on(resumed(state_dict, self.rank, self.world_size, order))

    @property
    def _num_readers(self) -> int:
        return max(1, self.data.num_workers)  # the training process is one, where it has no workers

    def _what(self) -> dict[str, Any]:
        """What says which rows an epoch consists of, and in which order."""
        data = self.data
        return {
            "seed": self.seed,
            "data.shuffle": data.shuffle,
            "the number of rows": self.num_rows,
            "data.max_rows": data.max_rows,
            "data.val_share": data.val_share,
            "data.max_val_rows": data.max_val_rows,
        }

    def _readers(self) -> dict[str, Any]:
        """What says how the rows are dealt out and laid in batches."""
        data = self.data
        return {
            "world_size": self.world_size,
            "data.num_workers": self._num_readers,
            "data.batch_size": data.batch_size,
            "data.max_length": data.max_length,
            "data.packing": data.packing,
        }

    def train_stream(self, *, alone: bool = False) -> RowStream:
        """What the batches of this rank come from, or, `alone`, those of one process for all."""
        self.setup()
        assert self._train_rows is not None
        shuffle = self.data.shuffle
        return self._stream(self._train_rows, self._train_indices, shuffle=shuffle, alone=alone)

    def _stream(
        self, rows: Rows, indices: np.ndarray | None, shuffle: bool, *, alone: bool = False
    ) -> RowStream:
        assert self.schema is not None
        stream = isinstance(rows, RowTable) is False
        return RowStream(
            rows,
            indices,
            self.encoder,
            self.schema,
            batch_size=self.data.batch_size,
            packing=self.data.packing,
            shuffle=shuffle,
            seed=self.seed,
            rank=0 if alone else self.rank,
            world_size=1 if alone else self.world_size,
            max_rows=self.data.max_rows if stream else None,
            held_out=self.data.val_share if stream else 0.0,
            # rows asked for in their own order are not sorted by length either
            **({} if self.data.shuffle else {"sort_window": 1}),
        )

    def _begin_pass(self) -> tuple[int, Rest | None]:
        # An epoch may be left before its end; one that nothing was consumed of is read again.
        if self._all_read or self._epoch.num_batches > self._num_before:
            self.set_epoch(self._epoch.number + 1)
        return self._epoch.number, self._epoch.rest

    def _end_pass(self) -> None:
        self._all_read = True

    def _go_on(self, epoch: Epoch) -> None:
        self._epoch, self._num_before, self._all_read = epoch, epoch.num_batches, False
