"""What one optimizer step takes: its bytes and FLOPs, counted by running it without data.

Layers, loss and optimizer are the run's own; only the tensors have no data, so that no weight is
read. One process on one device; `device_plan` says what several make of it.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers.masking_utils as masking
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from neo.data.packing import Batch
from neo.losses.chunk import sized_for
from neo.losses.given import Given
from neo.models.causal_lm import CausalLM
from neo.models.integer_weights import GROUP_SIZE
from neo.models.memory import (
    StepCounter,
    make_fake,
    quantized_bytes,
    quantized_weights,
    weight_dtype,
)
from neo.models.student import build_meta_student, inner, trained_parameters
from neo.models.traffic import Units, units_of
from neo.teachers.stand_in import stand_in
from neo.training.frozen_linear import speed_up_frozen
from neo.training.token_loss import batch_sums
from neo.training.workload import Workload

AUTOCAST = {"bf16-mixed": torch.bfloat16, "bf16": torch.bfloat16,
            "16-mixed": torch.float16, "16": torch.float16}  # fmt: skip
# In the order of a step.
PHASES = (
    "student forward",
    "teacher forward",
    "loss",
    "backward",
    "recomputation",  # of activations, in the backward pass
    "optimizer step",
)
# What a part is made of; see `StepCounter`.
PARTS = (
    "student",  # weights of the base, or all of them
    "adapter",  # weights of the branch
    "teacher",
    "gradients",
    "optimizer",  # its moments
    "activations",  # of the student
    "teacher activations",
    "loss chunk",  # logits and what is made of them, and the gradient of hidden states
    "backward",  # gradients on their way
    "temporaries",  # of the optimizer
    "batch",
)


@dataclass(frozen=True)
class StepCost:
    """What was counted.

    Args:
        peaks: For each phase, what lay in memory when it held most, in bytes by part.
        kept: What lies in memory when the backward pass begins, in bytes by part.
        flops: By phase, of one micro-batch.
        model_flops: Of one micro-batch, without what is computed twice to save memory.
        student: Its weights, as FSDP would gather them.
        teacher: None where there is none.
        kept_over_gathered: How many times as many bytes the trained weights take where they are
            kept, in float32, as in the dtype they were counted in.
    """

    peaks: dict[str, dict[str, int]]
    kept: dict[str, int]
    flops: dict[str, int]
    model_flops: int
    student: Units
    teacher: Units | None
    kept_over_gathered: int = 1


def planned_dtype(spec: CausalLM, device_type: str) -> torch.dtype:
    """The dtype of a model's frozen weights on a kind of device, be there one here or not."""
    if spec.dtype != "auto":
        return getattr(torch, spec.dtype)
    lacks_bf16 = torch.cuda.is_available() and not torch.cuda.is_bf16_supported()
    return torch.float32 if device_type != "cuda" or lacks_bf16 else torch.bfloat16


def count_step(
    specs: Mapping[str, Any],
    workload: Workload,
    *,
    device_type: str,
    precision: str = "32-true",
    clip: float | None = None,
    gathered: torch.dtype = torch.float32,
) -> StepCost:
    """Counts a step of a run like those before it, with the optimizer's state in place.

    Args:
        specs: Student, teacher (or None), lora, loss and optim.
        workload: Of one process.
        device_type: cpu or cuda; there need be no such device here.
        precision: Lightning's name.
        clip: The norm that gradients are clipped to.
        gathered: In which trained weights are multiplied, where FSDP gathers them in another dtype
            than they are kept in.
    """
    count = _Count(specs, workload, device_type, precision, clip, gathered)
    counter = count.run()
    return StepCost(
        peaks={phase: counter.peaks[phase] for phase in PHASES if phase in counter.peaks},
        kept=count.kept,
        flops={phase: counter.flops[phase] for phase in PHASES if counter.flops.get(phase)},
        model_flops=sum(counter.flops.values()) - counter.flops["recomputation"],
        student=count.student_units,
        teacher=count.teacher_units,
        kept_over_gathered=torch.float32.itemsize // gathered.itemsize,
    )


class _Count:
    """One step without data."""

    def __init__(
        self,
        specs: Mapping[str, Any],
        workload: Workload,
        device_type: str,
        precision: str,
        clip: float | None,
        gathered: torch.dtype,
    ) -> None:
        self.specs, self.workload, self.device_type = specs, workload, device_type
        self.autocast, self.clip, self.gathered = AUTOCAST.get(precision), clip, gathered
        spec, teacher = specs["student"], specs["teacher"]
        self.student = build_meta_student(spec, specs["lora"]).train()
        self.dtypes = {"student": planned_dtype(spec, device_type)}
        self.student_units = units_of(
            inner(self.student),
            self.dtypes["student"],
            trained=gathered,
            quantization=spec.quantization,
        )
        self.teacher: PreTrainedModel | None = None
        self.teacher_units: Units | None = None
        if teacher is not None:
            self.teacher = teacher.meta().requires_grad_(False).eval()
            self.dtypes["teacher"] = planned_dtype(teacher, device_type)
            self.teacher_units = units_of(
                self.teacher, self.dtypes["teacher"], quantization=teacher.quantization
            )
        self.kept: dict[str, int] = {}
        # Of quantised weights one at a time is there in full, while it is multiplied.
        self.widest = {"student": 0, "teacher": 0}
        # The loss scales its gradient only where the loss was divided: see `_FusedSums.backward`.
        divided = workload.accumulate > 1 or device_type != "cpu"
        self.counter = StepCounter(workload.num_supervised, 0.5 if divided else 1.0)

    def run(self) -> StepCounter:
        counter = self.counter
        with ExitStack() as stack:
            stack.enter_context(sized_for(self.device_type))
            if not self.workload.packing:
                stack.enter_context(_no_mask())
            stack.enter_context(FakeTensorMode())
            stack.enter_context(counter)
            optimizer = self._set_up()
            loss = self._forward()
            trained = trained_parameters(self.student).values()
            if self.workload.accumulate == 1:  # Lightning lets go of them only here
                for weight in trained:
                    weight.grad = None
            self.kept = {part: size for part, size in counter.live.items() if size}
            with counter.counting("backward", "backward"):
                loss.backward()
            del loss
            with counter.counting("temporaries", "optimizer step"):
                if (penalty := self.specs["lora"].penalty) is not None:
                    weights = [p for p in trained if p.grad is not None]
                    torch.autograd.grad(penalty(self.student), weights, allow_unused=True)
                if self.clip:
                    nn.utils.clip_grad_norm_(list(trained), self.clip)
                self._as_on_device(optimizer)
                optimizer.step()
        for phase, part, role in (
            ("student forward", "activations", "student"),
            ("backward", "backward", "student"),
            ("recomputation", "activations", "student"),
            ("teacher forward", "teacher activations", "teacher"),
        ):
            if self.widest[role] and (peak := counter.peaks.get(phase)):
                peak[part] = peak.get(part, 0) + self.widest[role]
        return counter

    def _set_up(self) -> torch.optim.Optimizer:
        """Models, batch, optimizer and the gradients of the step before."""
        counter, size = self.counter, self.workload
        with counter.counting("student"):
            self._place(self.student, "student")
        for name, weight in self.student.named_parameters():
            if self.specs["lora"].adapter is not None and _in_branch(name, weight):
                counter.move(weight, "adapter")
        if self.teacher is not None:
            with counter.counting("teacher"):
                self._place(self.teacher, "teacher")
        model = inner(self.student)
        if self.specs["student"].activation_checkpointing:
            model.activation_checkpointing_enable(
                {
                    "use_reentrant": False,
                    "preserve_rng_state": False,  # it has no values here
                    "context_fn": lambda: (
                        nullcontext(),
                        counter.counting("activations", "recomputation"),
                    ),
                }
            )
        for each in (model, self.teacher):
            if each is not None:
                speed_up_frozen(each.get_decoder())
        with counter.counting("batch"):
            shape = (size.batch_size, size.length)
            ids, positions, targets = (torch.empty(shape, dtype=torch.int64) for _ in range(3))
            self.batch = Batch(ids, positions, targets)
        trained = trained_parameters(self.student)
        optimizer = self.specs["optim"].build(trained)
        for group in optimizer.param_groups:
            group["foreach"] = True  # here all at once, for speed
        for weight in trained.values():
            with counter.counting("gradients"):
                weight.grad = torch.empty_like(weight)
            weight.register_post_accumulate_grad_hook(
                lambda w: counter.move(w.grad, "gradients") if w.grad is not None else None
            )
        with counter.counting("optimizer"):
            optimizer.step()
        self._follow(model, "activations", "student forward")
        if self.teacher is not None:
            self._follow(self.teacher, "teacher activations", "teacher forward")
        return optimizer

    def _place(self, model: nn.Module, role: str) -> None:
        """Fake weights; those that are quantised count as what they are stored in."""
        frozen, kind = self.dtypes[role], self.specs[role].quantization

        def dtype_of(name: str, weight: nn.Parameter) -> torch.dtype:
            if weight.requires_grad:
                return self.gathered
            return weight_dtype(name, weight, frozen)

        make_fake(model, dtype_of)
        if kind is not None:
            whole = inner(model) if role == "student" else model
            weights = quantized_weights(whole).values()
            group_size = getattr(self.specs[role], "group_size", GROUP_SIZE)
            for weight in weights:
                stored = quantized_bytes(kind, weight, group_size)
                self.counter.add(role, stored - weight.untyped_storage().nbytes())
            self.widest[role] = max((w.untyped_storage().nbytes() for w in weights), default=0)

    def _forward(self) -> torch.Tensor:
        """The loss of a micro-batch, as `NeoModule.training_step` takes it."""
        loss_spec, size = self.specs["loss"], self.workload
        given: PreTrainedModel | Given | None = self.teacher
        if given is None and (cache := self.specs.get("cache")) is not None:
            with self.counter.counting("batch"):
                given = stand_in(cache.stored, cache.shapes, size.num_supervised)
        distils = given is not None and loss_spec.kd_ratio > 0
        with (
            self.counter.counting("loss chunk", "loss"),
            torch.autocast("cpu", self.autocast) if self.autocast else nullcontext(),
        ):
            sums = batch_sums(
                inner(self.student),
                given if distils else None,
                self.batch,
                loss_spec,
                size.vocab,
                kd_positions=loss_spec.kd_positions if distils else "aligned",
            )
            return sums.loss / size.accumulate

    def _as_on_device(self, optimizer: torch.optim.Optimizer) -> None:
        """On a CPU torch updates one tensor after the other: the largest takes most."""
        if self.device_type == "cuda":
            return
        weights = [w for group in optimizer.param_groups for w in group["params"]]
        largest = max(weights, key=torch.Tensor.numel)
        optimizer.param_groups[:] = [
            group | {"params": [largest], "foreach": False} for group in optimizer.param_groups[:1]
        ]

    def _follow(self, model: PreTrainedModel, part: str, phase: str) -> None:
        """Counts what the backbone makes in a forward pass to a part and a phase of its own."""
        entered = ExitStack()

        def begin(*_: Any) -> None:
            entered.enter_context(self.counter.counting(part, phase))

        def end(*_: Any) -> None:
            entered.close()

        model.get_decoder().register_forward_pre_hook(begin)
        model.get_decoder().register_forward_hook(end)


def _in_branch(name: str, weight: nn.Parameter) -> bool:
    return weight.requires_grad or any(part.startswith("lora_") for part in name.split("."))


@contextmanager
def _no_mask() -> Iterator[None]:
    """Keeps transformers from taking sequences without data for packed ones.

    It looks at the values of positions, and takes the worst of tensors that have none.
    """
    find = masking.find_packed_sequence_indices
    masking.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = find
