"""A base with its branch, whose start may be computed from the first rows of training."""

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from neo.data.packing import Batch
from neo.data.peek import first_batches
from neo.losses.given import Given
from neo.models.calibration import Calibration
from neo.models.sharding import is_sharded
from neo.models.start import attach_branch, is_computed, needs_rows, start_of
from neo.models.variants import Variant
from neo.teachers.online import OnlineTeacher
from neo.training.calibrate import calibration_of

if TYPE_CHECKING:
    from neo.training.module import NeoModule


def attached(
    module: "NeoModule", base: PreTrainedModel, lora: Variant, device: torch.device
) -> nn.Module:
    """The base with its branch; a start is computed by the first process and given to all."""
    computes = is_computed(lora.adapter) and module.start is None
    if not computes or module._trainer is None or module.trainer.world_size == 1:
        return attached_here(module, base, lora, device)
    first = module.trainer.is_global_zero
    student = attached_here(module, base, lora, device) if first else None
    start = module.trainer.strategy.broadcast(None if student is None else start_of(student))
    return attach_branch(base, lora, module.seed, start) if student is None else student


def attached_here(
    module: "NeoModule", base: PreTrainedModel, lora: Variant, device: torch.device
) -> nn.Module:
    """The base with its branch, whose start is computed in this process if it is not known."""
    calibration = None
    if module.start is None and needs_rows(lora.adapter):
        calibration = _calibration(module, base, lora, device)
    return attach_branch(base, lora, module.seed, module.start, calibration)


def _calibration(
    module: "NeoModule", base: PreTrainedModel, lora: Variant, device: torch.device
) -> Calibration | None:
    """The first rows of training, with both models where these rows are run."""
    data = getattr(module._trainer, "datamodule", None)
    if data is None:
        return None
    batches = first_batches(data, lora.calibration_rows)
    module.init_metrics["perf/init_rows"] = sum(batch.num_rows for batch in batches)
    base.to(device)
    model = None
    if module.teacher is not None and module.loss.kd_ratio > 0:
        # One process cannot run a teacher that is split over all.
        whole = module.teacher
        if is_sharded(whole.model):
            whole = cast(OnlineTeacher, module.specs[1]).load_frozen(device)
        model = whole.to(device).model
    on_device = [batch.to(device) for batch in batches]
    if module.cached is None or module.loss.kd_ratio == 0:
        return calibration_of(on_device, model, module.loss, module.vocab)
    cached = module.cached

    def given(batch: Batch) -> Given:
        # Lightning makes the GPU the default device while models are built; rows are read on the
        # CPU, as they are in training
        with torch.device("cpu"):
            return cached.given(batch, model, base)

    # what is kept is made under the precision of training, and goes with a student that is
    context = module.trainer.precision_plugin.forward_context
    return calibration_of(on_device, given, module.loss, module.vocab, context)
