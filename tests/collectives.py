"""Counts what processes send each other: bytes by kind of collective, step by step."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "c10d::allreduce_": "all_reduce",
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
}
# Counts, sums and flags that ranks exchange are no traffic to speak of.
CONTROL_BYTES = 256


class Collectives(TorchDispatchMode):
    """Within it every collective of this process is counted; `steps` has a counter a step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Counter[str]] = [Counter()]
        self.others: Counter[str] = Counter()

    def next_step(self) -> None:
        self.steps.append(Counter())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")):
            kind = KINDS.get(name)
            if kind is None:
                self.others[name] += 1
            else:
                self.count(kind, name, args)
        return func(*args, **(kwargs or {}))

    def count(self, kind: str, name: str, args: Any) -> None:
        """The whole tensor: what is gathered, scattered or reduced."""
        first = args[0]
        tensors = first if isinstance(first, list | tuple) else [first]
        if name == "c10d::_reduce_scatter_base_":  # (output, input, ...)
            tensors = [args[1]]
        size = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        if name == "_c10d_functional::all_gather_into_tensor":  # (input, group_size, ...)
            size *= args[1]
        if size > CONTROL_BYTES:
            self.steps[-1][kind] += size
