"""The models that make a cache, run as in training: its device, its precision, its products."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from neo.data.packing import Batch
from neo.data.prompt import IGNORE, Example
from neo.data.segments import content_of
from neo.losses.given import HiddenStates
from neo.losses.head import Head
from neo.losses.products import product_dtype
from neo.models.causal_lm import CausalLM
from neo.models.head_weights import read_head
from neo.models.hidden import check_packing
from neo.teachers.fields import Shapes
from neo.teachers.measure import measured
from neo.teachers.online import OnlineTeacher
from neo.teachers.shards import RowKey
from neo.teachers.stored import Stored
from neo.training.cache_identity import head_dtype
from neo.training.cache_rows import keys_of
from neo.training.frozen_linear import speed_up_frozen
from neo.training.token_loss import Outputs, factors_of, outputs_of
from neo.training.trainer import build_trainer


@dataclass(frozen=True)
class Measured:
    """What a cache keeps of one row."""

    key: RowKey
    num_tokens: int
    content: int
    blob: bytes


class CacheModels:
    """A teacher, and the student's head where targets are projected on it.

    Args:
        config: Of a run.
        specs: What it says; there is a teacher.
        vocab: Ids that both models share.

    Loading raises a ValueError where weights are missing, or a model cannot be packed.
    """

    def __init__(self, config: Mapping[str, Any], specs: Mapping[str, Any], vocab: int) -> None:
        self.student_spec: CausalLM = specs["student"]
        self.trained = specs["lora"].adapter is None
        self.seed, self.packing, self.vocab = config["seed"], specs["data"].packing, vocab
        trainer = build_trainer(config["trainer"], [], [])
        self.precision: Any = trainer.strategy.precision_plugin
        self.device: torch.device = trainer.strategy.root_device
        trainer.strategy.accelerator.setup_device(self.device)
        self.teacher_spec: OnlineTeacher = specs["teacher"]
        self.head_dtype = head_dtype(self.student_spec, config["trainer"])

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The teacher, loaded when it is first asked for."""
        frozen = self.teacher_spec.load_frozen(self.device)
        return self._placed(frozen, frozen.model)

    def _placed(self, module: nn.Module, model: PreTrainedModel) -> PreTrainedModel:
        """The model as a run would have it, on its device."""
        self.precision.convert_module(module).to(self.device)
        if self.packing:
            check_packing(model)
        speed_up_frozen(model.get_decoder())
        return model

    def base_student(self) -> PreTrainedModel:
        """The student before training, without its branch; loaded anew, in eval mode."""
        model = self.student_spec.load(self.device, trained=self.trained, seed=self.seed)
        return self._placed(model, model.requires_grad_(False))

    def student_head(self) -> Head:
        """The student's head alone, as the products of the loss take it."""
        found = read_head(self.student_spec, self.device, trained=self.trained, seed=self.seed)
        head = factors_of(found).to(self.head_dtype)
        bias = None if head.bias is None else head.bias[: self.vocab].to(self.device)
        return replace(head, weight=head.weight[: self.vocab].to(self.device), bias=bias)

    @torch.no_grad()
    def outputs(self, model: PreTrainedModel, batch: Batch) -> Outputs:
        """What a model gives for the supervised tokens of a batch, under the run's precision.

        Hidden states come in the dtype that the loss multiplies them in.
        """
        batch = batch.to(self.device, non_blocking=True)
        with self.precision.forward_context():
            found = outputs_of(model, batch, batch.targets != IGNORE)
            dtype = product_dtype(found.hidden)
        return Outputs(found.hidden.to(dtype), None, found.head)


class Measurer:
    """Makes of batches what a cache keeps of their rows.

    Args:
        models: On their device.
        stored: What is to be kept, resolved.
        shapes: Of the two heads.
        student_head: Of kind `projected` alone.
    """

    def __init__(
        self, models: CacheModels, stored: Stored, shapes: Shapes, student_head: Head | None
    ) -> None:
        self.models, self.stored, self.shapes = models, stored, shapes
        self.student_head = student_head
        self.teacher_head: Head | None = None  # known with the first batch

    @torch.no_grad()
    def measure(self, part: int, batch: Batch, examples: Sequence[Example]) -> list[Measured]:
        """What is kept of the rows that lie in a batch, in their order."""
        teacher = self.models.outputs(self.models.teacher, batch)
        hidden = teacher.hidden
        # Cast once: a whole head, batch after batch, takes longer than a small teacher.
        if self.teacher_head is None:
            self.teacher_head = teacher.head.to(hidden.dtype)
        targets = batch.targets[batch.targets != IGNORE].to(hidden.device)
        keys = keys_of(part, examples)
        given = HiddenStates(hidden=hidden, head=self.teacher_head)
        blobs = measured(given, targets, self.stored, self.shapes, keys, self.student_head)
        return [
            Measured(key, num, content_of(example.input_ids, example.targets), blob)
            for (key, num), example, blob in zip(keys, examples, blobs, strict=True)
        ]
