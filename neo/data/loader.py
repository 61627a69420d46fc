"""A loader that knows its epoch: resumes in the middle, keeps ranks in step, refuses bad data."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from neo.data.ahead import Prepare
from neo.data.packing import Batch, RowReport, empty_batch
from neo.data.place import Rest
from neo.data.ranks import Ranks
from neo.data.reader import DataChanged, RowFailed, RowStream


class TooManyBadRows(ValueError):
    """More rows than `data.max_bad_rows` allows, or all of them, cannot be trained on."""

    def __init__(self, report: RowReport, max_bad_rows: int | None) -> None:
        self.report = report
        lines = [
            f"  {reason}: {count}, among them "
            + "; ".join(f"row {index}: {detail}" for index, detail in report.shown.get(reason, ()))
            for reason, count in report.bad.most_common()
        ]
        if report.num_bad == report.rows:
            head = f"none of the {report.rows} rows that were read can be trained on"
            advice = "Correct the rows, or data.schema, data.chat_template, data.max_length"
        else:
            head = (
                f"data.max_bad_rows={max_bad_rows}: {report.num_bad} of the {report.rows} rows "
                "read so far cannot be trained on"
            )
            advice = "Correct the rows, or raise data.max_bad_rows (null: no limit)"
        super().__init__("\n".join([f"{head}:", *lines, f"{advice}."]))


class WorkerDied(RuntimeError):
    """A process that read ahead was killed, or has crashed."""


class EpochLoader:
    """Batches of one epoch per pass.

    Args:
        stream: What the batches come from; it is told the epoch.
        begin: Asked at the beginning of a pass for its epoch, and what is left of it if some of its
            batches were consumed before.
        end: Told when all batches of a pass have been read.
        ranks: Those that each take a batch at the same time.
        prepare: What is done to each batch ahead of its turn.
    """

    def __init__(
        self,
        stream: RowStream,
        *,
        num_workers: int,
        begin: Callable[[], tuple[int, Rest | None]] = lambda: (0, None),
        end: Callable[[], None] = lambda: None,
        ranks: Ranks | None = None,
        prepare: Prepare | None = None,
    ) -> None:
        self.prepare = prepare
        self.stream, self.num_workers = stream, num_workers
        self.loader = self._fresh()
        self.begin, self.end, self.ranks = begin, end, ranks or Ranks()

    def close(self) -> None:
        """Ends the workers, if there are any; the next pass starts new ones.

        Left to the garbage collector, each of them is waited for 5 seconds in vain, because it
        finalizes their queues before the loader can tell them to end.
        """
        iterator: Any = self.loader._iterator
        if self.num_workers and iterator is not None:
            iterator._shutdown_workers()
        self.loader = self._fresh()

    def _fresh(self) -> DataLoader[Batch]:
        return DataLoader(
            self.stream,
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Its own: a pass would draw from the generator that dropout draws from, and a run that
            # validates more often would train otherwise.
            generator=torch.Generator().manual_seed(0),
        )

    def __iter__(self) -> Iterator[Batch]:
        given = False
        while not given:
            epoch, rest = self.begin()
            if rest is not self.stream.rest_of(epoch):
                self.stream.rest = rest
                self.close()  # its workers have the old one
            self.stream.set_epoch(epoch)
            batches = self._usable(begun=rest is not None)
            for batch in batches if self.prepare is None else self.prepare.ahead(batches):
                given = True
                yield batch
            # A checkpoint behind the last batch of an epoch goes on with the next one.
            self.end()

    def _usable(self, begun: bool) -> Iterator[Batch]:
        """All batches from the first with a supervised token on, which carries what went before.

        Args:
            begun: The epoch had its first batch before.

        Raises:
            TooManyBadRows: There is none.
        """
        waiting: Batch | None = None
        for batch, num_supervised in self._in_step(begun):
            if begun:
                yield batch
                continue
            waiting = batch if waiting is None else _joined(waiting, batch)
            if num_supervised:
                begun = True
                yield waiting
        if not begun:
            self.close()
            if waiting is None or waiting.report.rows == 0:
                raise ValueError("data: there are no rows to read")
            raise TooManyBadRows(waiting.report, None)

    def _in_step(self, supervised: bool) -> Iterator[tuple[Batch, int]]:
        """Batches with their supervised tokens on all ranks.

        Ranks whose rows pack into fewer batches go on with empty ones until all are done, because
        a rank that stops early leaves the others waiting in their next exchange. What is exchanged
        is the same number of times the same on all ranks, since all go by the sums.

        Args:
            supervised: There was a token, and nobody asks again.
        """
        batches = self._workers(lambda: iter(self.loader))
        while True:
            batch = self._workers(lambda: next(batches, None))
            number = int(supervised)
            if batch is not None and not supervised:
                number = batch.num_supervised
            rows = batch.num_rows + batch.report.num_bad if batch is not None else 0
            num_batches, number, rows = self.ranks.sum([int(batch is not None), number, rows])
            if not num_batches:
                return
            supervised = supervised or number > 0
            if batch is None:
                batch = empty_batch(self.stream.pad_id, RowReport())
            yield replace(batch, num_rows_all_ranks=rows), number

    def _workers(self, ask: Callable[[], Any]) -> Any:
        """What the workers are asked for.

        Raises:
            WorkerDied: One of them did, with the row that it was at.
            RowFailed: One of them could not read a row.
        """
        try:
            answer = ask()
        except (RowFailed, DataChanged) as error:
            if not self.num_workers:
                raise
            # torch gives a traceback, at whose end the message stands
            text = str(error)
            head = text.rpartition(f"{type(error).__name__}: ")[2].strip()
            self.close()
            raise type(error)(f"{head}\n\n{text}") from None
        except RuntimeError as error:
            if (message := self._death()) is None:
                raise
            self.close()
            raise WorkerDied(message) from error
        iterator: Any = self.loader._iterator
        if iterator is not None and iterator._worker_pids_set:
            # Otherwise torch raises wherever the training process is when a worker dies, be it in
            # the middle of writing a checkpoint. Without, it is noticed within 5 s when a batch is
            # asked for.
            signal_handling._remove_worker_pids(id(iterator))
            iterator._worker_pids_set = False
        return answer

    def _death(self) -> str | None:
        """What became of the workers that do not live any more; None if all do."""
        iterator: Any = self.loader._iterator
        dead = []
        for number, worker in enumerate(() if iterator is None else iterator._workers):
            if worker.is_alive():
                continue
            at = int(self.stream.at[number])
            code = worker.exitcode
            how = (
                f"was killed by {signal.Signals(-code).name}"
                if code < 0
                else f"ended with exit code {code}"
            )
            where = f"at row {at}" if at >= 0 else "before its first row"
            dead.append(
                f"data worker {number} of {self.num_workers} (pid {worker.pid}) {how} {where}"
            )
        if not dead:
            return None
        rank = f"rank {self.ranks.rank}: " if self.ranks.world_size > 1 else ""
        return (
            f"{rank}{'; '.join(dead)}. SIGKILL mostly means that memory ran out: lower "
            "data.num_workers or data.max_length, or take out a row that is too large. "
            "data.num_workers=0 reads in the training process and shows where it breaks"
        )


def _joined(first: Batch, second: Batch) -> Batch:
    """The second batch with the first one's report and places, of which nothing can be trained."""
    return replace(
        second,
        report=first.report + second.report,
        places=first.places + second.places,
        num_rows_all_ranks=first.num_rows_all_ranks + second.num_rows_all_ranks,
    )
