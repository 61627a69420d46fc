"""A loader that knows its epoch: resumes in the middle, keeps ranks in step, refuses bad data."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch.utils.data import DataLoader

from neo.data.order import RowStream
from neo.data.packing import Batch, RowReport, empty_batch


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


class EpochLoader:
    """Batches of one epoch per pass.

    Args:
        stream: What the batches come from; it is told the epoch.
        begin: Asked at the beginning of a pass for its epoch, and how many batches to skip
            because they were consumed before.
        end: Told when all batches of a pass have been read.
        skipped: Told the report of each batch that is skipped.
        device: Where a number must lie for ranks to exchange it; asked with several ranks only.
    """

    def __init__(
        self,
        stream: RowStream,
        *,
        num_workers: int,
        begin: Callable[[], tuple[int, int]],
        end: Callable[[], None] = lambda: None,
        skipped: Callable[[RowReport], None] = lambda report: None,
        device: Callable[[], torch.device] = lambda: torch.device("cpu"),
    ) -> None:
        self.stream, self.num_workers = stream, num_workers
        self.close()
        self.begin, self.end, self.skipped, self.device = begin, end, skipped, device

    def close(self) -> None:
        """Ends the workers, if there are any; the next pass starts new ones.

        Left to the garbage collector, each of them is waited for 5 seconds in vain, because it
        finalizes their queues before the loader can tell them to end.
        """
        self.loader: DataLoader[Batch] = DataLoader(
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
            epoch, num_skip = self.begin()
            self.stream.set_epoch(epoch)
            count = 0
            for batch in self._usable():
                count += 1
                if count <= num_skip:
                    self.skipped(batch.report)
                else:
                    given = True
                    yield batch
            if count < num_skip:
                raise ValueError(
                    f"cannot resume after {num_skip} batches of epoch {epoch}: the data gives only "
                    f"{count}. Have the rows at data.path changed since the checkpoint?"
                )
            # A checkpoint behind the last batch of an epoch goes on with the next one.
            self.end()

    def _usable(self) -> Iterator[Batch]:
        """All batches from the first with a supervised token on, which carries earlier reports.

        Raises:
            TooManyBadRows: There is none.
        """
        waiting: RowReport | None = RowReport()
        for batch, num_supervised in self._in_step():
            if waiting is None:
                yield batch
            elif num_supervised == 0:
                waiting = waiting + batch.report
            else:
                yield replace(batch, report=waiting + batch.report)
                waiting = None
        if waiting is not None:
            self.close()
            if waiting.rows == 0:
                raise ValueError("data: there are no rows to read")
            raise TooManyBadRows(waiting, None)

    def _in_step(self) -> Iterator[tuple[Batch, int]]:
        """Batches with their supervised tokens on all ranks.

        Ranks whose rows pack into fewer batches go on with empty ones until all are done, because
        a rank that stops early leaves the others waiting in their next exchange.
        """
        world_size = self.stream.world_size
        batches = iter(self.loader)
        supervised = False  # once there was a token, nobody asks again
        while True:
            batch = next(batches, None)
            number = 1 if supervised else (batch.num_supervised if batch is not None else 0)
            if world_size > 1:
                numbers = torch.tensor([int(batch is not None), number], device=self.device())
                torch.distributed.all_reduce(numbers)
                any_batch, number = numbers.tolist()
            else:
                any_batch = int(batch is not None)
            if not any_batch:
                return
            supervised = supervised or number > 0
            if batch is None:
                batch = empty_batch(self.stream.pad_id, RowReport())
            yield batch, number
