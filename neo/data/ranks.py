"""The processes that train together, and what they tell each other about the data."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist


class Ranks:
    """This process among those that train together. Every method is called by all, or none returns.

    They talk on the CPU: an exchange on the GPU would stand in line behind the step under way, and
    reading its result would keep the next step from being lined up meanwhile.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self._group: Any = None

    def sum(self, numbers: Sequence[int]) -> list[int]:
        """The sums over all ranks."""
        if self.world_size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        dist.all_reduce(total, group=self._cpu_group())
        return [int(number) for number in total.tolist()]

    def gather(self, mine: Any) -> list[Any]:
        """What every rank gave, in the order of ranks, the same on all."""
        if self.world_size == 1:
            return [mine]
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, mine, group=self._cpu_group())
        return parts

    def _cpu_group(self) -> Any:
        if self._group is None:
            gloo = dist.get_backend() == "gloo"
            self._group = dist.group.WORLD if gloo else dist.new_group(backend="gloo")
        return self._group
