"""A look at the first rows of training, in which nothing is counted or consumed."""

from itertools import islice

import torch

from neo.data.datamodule import DataModule
from neo.data.loader import EpochLoader
from neo.data.packing import Batch


def first_batches(data: DataModule, num_rows: int) -> list[Batch]:
    """The first training batches until they hold so many rows, or there are no more, as `peek`."""
    batches: list[Batch] = []
    # Lightning makes the GPU the default device while models are built; rows are read on the CPU.
    with torch.device("cpu"):
        for batch in _aside(data):
            batches.append(batch)
            if sum(b.num_rows for b in batches) >= num_rows:
                break
    return batches


def peek(data: DataModule, num_batches: int) -> list[Batch]:
    """The first training batches of the run, as one process alone would read them."""
    return list(islice(_aside(data), num_batches))


def _aside(data: DataModule) -> EpochLoader:
    """A pass in which nothing is counted or consumed."""
    # through a loader, which refuses rows none of which can be trained on
    return EpochLoader(data.train_stream(alone=True), num_workers=0)
