"""Bytes that processes send each other in a step, on paper: DDP, FSDP, and a sharded teacher alone.

A ring of N processes moves, per process, (N - 1)/N of what an all-gather or a reduce-scatter makes
or takes, and twice that for an all-reduce, which is one after the other (Rajbhandari et al. 2020,
ZeRO, arXiv:1910.02054, section 7). What is moved does not shrink as N grows; what is computed does.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from neo.models.memory import quantized_bytes, quantized_weights, weight_dtype
from neo.models.sharding import decoder_layers

GRADIENT_BYTES = 4  # a number, whatever the weights are gathered in


@dataclass(frozen=True)
class Weight:
    """A tensor as FSDP splits it: along its first dimension.

    Args:
        rows: Size of its first dimension.
        row_bytes: Of one row as it is gathered.
        row_numbers: How many numbers a row has.
        trained: Whether its gradient is reduced.
    """

    rows: int
    row_bytes: float
    row_numbers: int
    trained: bool

    def padded_rows(self, num_processes: int) -> int:
        """The rows with the padding that makes all parts alike."""
        return -(-self.rows // num_processes) * num_processes

    def gathered(self, num_processes: int = 1) -> int:
        """Bytes of the whole tensor, padding included."""
        return round(self.padded_rows(num_processes) * self.row_bytes)

    def gradient(self, num_processes: int = 1) -> int:
        """Bytes of its gradient in float32, padding included; 0 where it is frozen."""
        return self.trained * self.padded_rows(num_processes) * self.row_numbers * GRADIENT_BYTES


@dataclass(frozen=True)
class Unit:
    """Weights that are gathered and freed together."""

    weights: tuple[Weight, ...]

    def gathered(self, num_processes: int = 1) -> int:
        """Bytes when gathered."""
        return sum(weight.gathered(num_processes) for weight in self.weights)

    def gradient(self, num_processes: int = 1) -> int:
        """Bytes of the gradients of what is trained."""
        return sum(weight.gradient(num_processes) for weight in self.weights)


@dataclass(frozen=True)
class Units:
    """A model in the units that FSDP gathers.

    Args:
        layers: Decoder layers, in order.
        backbone: What the backbone has beside its layers: embedding and last norm.
        head: None where it is tied, and so the backbone's embedding.
    """

    layers: tuple[Unit, ...]
    backbone: Unit
    head: Unit | None

    @property
    def all(self) -> tuple[Unit, ...]:
        """Every unit once."""
        return (*self.layers, self.backbone, *([] if self.head is None else [self.head]))

    def gathered(self, num_processes: int = 1) -> int:
        """Bytes of the whole model."""
        return sum(unit.gathered(num_processes) for unit in self.all)

    def gradient(self, num_processes: int = 1) -> int:
        """Bytes of the gradients of all that is trained."""
        return sum(unit.gradient(num_processes) for unit in self.all)

    @property
    def largest_layer(self) -> int:
        """Bytes of the largest layer when gathered."""
        return max((layer.gathered() for layer in self.layers), default=0)

    @property
    def largest_layer_gradient(self) -> int:
        """Bytes of the gradients of the layer that has most of them."""
        return max((layer.gradient() for layer in self.layers), default=0)


def units_of(
    model: PreTrainedModel,
    frozen: torch.dtype,
    *,
    trained: torch.dtype = torch.float32,
    quantization: str | None = None,
) -> Units:
    """The units of a model on the meta device.

    Args:
        model: A teacher, or the causal LM inside a student.
        frozen: The dtype of its frozen weights.
        trained: The dtype in which trained weights are gathered.
        quantization: Of its frozen linear layers.
    """
    small = {id(w) for w in quantized_weights(model).values()} if quantization else set()
    named = {id(p): name for name, p in model.named_parameters()}

    def unit(parameters: Iterable[nn.Parameter]) -> Unit:
        weights = []
        for p in parameters:
            if id(p) not in named:
                continue
            dtype = weight_dtype(named.pop(id(p)), p, frozen)
            num_bytes = p.numel() * (trained if p.requires_grad else dtype).itemsize
            if id(p) in small and quantization is not None:
                num_bytes = quantized_bytes(quantization, p)
            rows = len(p) if p.ndim else 1
            weights.append(Weight(rows, num_bytes / rows, p.numel() // rows, p.requires_grad))
        return Unit(tuple(weights))

    of_layers = tuple(unit(layer.parameters()) for layer in decoder_layers(model))
    backbone = unit(model.get_decoder().parameters())
    rest = unit(model.parameters())
    return Units(of_layers, backbone, rest if rest.weights else None)


@dataclass(frozen=True)
class Traffic:
    """What one process takes part in, by kind of collective, in bytes of whole tensors.

    Args:
        num_processes: N.
        all_gather: Of what all-gathers put together.
        reduce_scatter: Of what reduce-scatters take in.
        all_reduce: Of what all-reduces add up.
    """

    num_processes: int
    all_gather: int = 0
    reduce_scatter: int = 0
    all_reduce: int = 0

    @property
    def moved(self) -> int:
        """Bytes that each process sends: `(N - 1)/N (gathered + scattered + 2 reduced)`."""
        whole = self.all_gather + self.reduce_scatter + 2 * self.all_reduce
        return whole * (self.num_processes - 1) // self.num_processes

    def __add__(self, other: "Traffic") -> "Traffic":
        """Both, of the same processes."""
        assert self.num_processes == other.num_processes
        return Traffic(
            self.num_processes,
            self.all_gather + other.all_gather,
            self.reduce_scatter + other.reduce_scatter,
            self.all_reduce + other.all_reduce,
        )

    def __mul__(self, times: int) -> "Traffic":
        """As much as so many times."""
        return Traffic(
            self.num_processes,
            self.all_gather * times,
            self.reduce_scatter * times,
            self.all_reduce * times,
        )


@dataclass(frozen=True)
class StepTraffic:
    """The traffic of an optimizer step.

    Args:
        micro_batch: Of each micro-batch.
        once: Of the step besides.
        num_micro_batches: Of a step.
    """

    micro_batch: Traffic
    once: Traffic
    num_micro_batches: int = 1

    @property
    def step(self) -> Traffic:
        """All of it."""
        return self.micro_batch * self.num_micro_batches + self.once


def ddp_traffic(student: Units, num_processes: int, num_micro_batches: int = 1) -> StepTraffic:
    """DDP: the gradients of what is trained, in float32, all-reduced once a step.

    `2 (N - 1)/N * 4 * trained parameters`; nothing frozen travels, and no micro-batch but the last
    of a step. Teacher and base are on every device.

    Example:
        >>> unit = Unit((Weight(rows=8, row_bytes=4.0, row_numbers=1, trained=True),))
        >>> ddp_traffic(Units((unit,), unit, None), num_processes=4).step.moved  # 2 * 3/4 * 64
        96
    """
    none = Traffic(num_processes)
    reduced = Traffic(num_processes, all_reduce=student.gradient())
    return StepTraffic(none, reduced if num_processes > 1 else none, num_micro_batches)


def sharded_teacher_traffic(
    student: Units, teacher: Units | None, num_processes: int, num_micro_batches: int = 1
) -> StepTraffic:
    """A replicated student with a sharded teacher: DDP's, and the teacher gathered.

    `(N - 1)/N * teacher` for every micro-batch, of which nothing goes back.
    """
    alone = ddp_traffic(student, num_processes, num_micro_batches)
    gathered = 0 if teacher is None else teacher.gathered(num_processes)
    return StepTraffic(Traffic(num_processes, gathered), alone.once, num_micro_batches)


def fsdp_traffic(
    student: Units,
    teacher: Units | None,
    num_processes: int,
    num_micro_batches: int = 1,
    *,
    reduces_once: bool = False,
) -> StepTraffic:
    """FSDP: weights gathered as they are used, gradients reduced to whom they belong to.

    For every micro-batch `(N - 1)/N (2 layers + rest of the student + teacher)`: a layer's weights
    are freed after the forward pass and gathered again for the backward pass; embedding, norm and
    head of the student are gathered once, as is all of the teacher. And `(N - 1)/N * 4 * trained
    parameters` for the gradients, once a micro-batch or once a step. Recomputing activations moves
    nothing more. Every tensor is padded along its first dimension to a multiple of N.

    Args:
        student: With its branch.
        teacher: None where none is in the loss.
        num_processes: N.
        num_micro_batches: Of a step.
        reduces_once: Gradients are kept whole until the last micro-batch of a step.
    """
    layers = sum(layer.gathered(num_processes) for layer in student.layers)
    gathered = student.gathered(num_processes) + layers
    gathered += 0 if teacher is None else teacher.gathered(num_processes)
    reduced = Traffic(num_processes, reduce_scatter=student.gradient(num_processes))
    weights = Traffic(num_processes, all_gather=gathered)
    if reduces_once:
        return StepTraffic(weights, reduced, num_micro_batches)
    return StepTraffic(weights + reduced, Traffic(num_processes), num_micro_batches)
