"""Starts computed from training rows, by PEFT: EVA, CorDA and LoRA-GA."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int64
from peft import LoraConfig, LoraGAConfig, initialize_lora_eva_weights
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers import PreTrainedModel

from neo.models.hidden import hidden_states
from neo.models.variants import Variant, config_of

# Passes over the rows after which EVA is said not to converge; PEFT would go on for ever.
MAX_PASSES = 100


@dataclass(frozen=True)
class CalibrationBatch:
    """Sequences of tokens.

    Args:
        input_ids: Right-padded.
        position_ids: Restart at 0 at every packed example.
        supervised: Where the student has to predict the next token.
    """

    input_ids: Int64[Tensor, "batch length"]
    position_ids: Int64[Tensor, "batch length"]
    supervised: Bool[Tensor, "batch length"]

    def to(self, device: torch.device | str) -> "CalibrationBatch":
        """The same batch on the device."""
        moved = {name: value.to(device) for name, value in vars(self).items()}
        return replace(self, **moved)

    @property
    def needed(self) -> Bool[Tensor, "batch length"]:
        """The tokens on which the loss depends: none behind the last supervised one."""
        return self.supervised.flip(1).cumsum(1).flip(1) > 0

    def run(self, model: PreTrainedModel) -> None:
        """Runs the backbone."""
        hidden_states(model, self.input_ids, self.position_ids)


@dataclass(frozen=True)
class Calibration:
    """Training rows, and what the student's base would learn from them.

    Args:
        batches: At least one, on the device of the base.
        backward: Adds the gradient of the loss, summed over all their tokens, to the model's
            weights that require it, one backward pass for each batch.
    """

    batches: Sequence[CalibrationBatch]
    backward: Callable[[PreTrainedModel], None]


def eva_branch(base: PreTrainedModel, variant: Variant, calibration: Calibration) -> nn.Module:
    """EVA (Paischer et al. 2024, arXiv:2410.07170): A begins as main directions of the inputs.

    Raises:
        ValueError: A batch has fewer tokens than a layer's rank, or the directions do not settle.
    """
    student = variant.attach_drawn(base)  # what is drawn is overwritten; B is zero
    config = config_of(student)
    eva = cast(Any, config.eva_config)

    def tokens(batch: CalibrationBatch, _: LoraConfig) -> Bool[Tensor, "batch length"]:
        return batch.supervised if eva.use_label_mask else batch.needed

    most = round(max([config.r, *config.rank_pattern.values()]) * eva.rho)
    counted = [int(tokens(batch, config).sum()) for batch in calibration.batches]
    # Of the others PEFT would skip some and stop at the first.
    batches = [b for b, num in zip(calibration.batches, counted, strict=True) if num >= most]
    if not batches:
        kind = "supervised tokens" if eva.use_label_mask else "tokens"
        raise ValueError(
            f"lora.init_lora_weights=eva: no batch of training rows has more than {max(counted)} "
            f"{kind}, and {most} directions (r times eva_config.rho) need as many in one; raise "
            "data.batch_size, or set eva_config.use_label_mask=false to take all tokens"
        )
    runs, allowed = 0, MAX_PASSES * len(batches) + 1

    def run(_: Any, batch: CalibrationBatch) -> None:
        nonlocal runs
        runs += 1
        if runs > allowed:
            raise ValueError(
                f"lora.eva_config.tau={eva.tau}: the directions of some layer still change by more "
                f"after {MAX_PASSES} passes over {len(batches)} batches; lower tau, or "
                "raise lora.calibration_rows"
            )
        batch.run(base)

    def of_layer(
        states: Any, which: Bool[Tensor, "batch length"], _: str
    ) -> Float[Tensor, "tokens in"]:
        return (states[0] if isinstance(states, tuple) else states)[which]

    initialize_lora_eva_weights(
        student,
        batches,
        forward_fn=run,
        prepare_model_inputs_fn=tokens,
        prepare_layer_inputs_fn=of_layer,
        gather_distributed_inputs=False,  # one process computes, the others are given the start
        show_progress_bar=False,
    )
    for layer in student.modules():  # PEFT makes those of a new rank in the base's dtype
        if isinstance(layer, LoraLayer):
            for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                part.float()
    return student


def corda_branch(base: PreTrainedModel, variant: Variant, calibration: Calibration) -> nn.Module:
    """CorDA (Yang et al. 2024, arXiv:2406.05223): directions of weight times covariance of inputs.

    All tokens are counted that the loss depends on, one sequence at a time as PEFT expects them.
    Afterwards the base is in eval mode.
    """

    def run() -> None:
        for batch in calibration.batches:
            for ids, positions, needed in zip(
                batch.input_ids, batch.position_ids, batch.needed, strict=True
            ):
                if needed.any():
                    hidden_states(base, ids[needed][None], positions[needed][None])

    preprocess_corda(base, cast(LoraConfig, variant.adapter), run)
    return variant.attach(base)


def lora_ga_branch(base: PreTrainedModel, variant: Variant, calibration: Calibration) -> nn.Module:
    """LoRA-GA (Wang et al. 2024, arXiv:2407.05000): directions of the gradient of the whole loss.

    Of the gradient's singular vectors A and B take r each. Scaled as in the authors' code: `stable`
    is `out ** (1/4) / sqrt(gamma)` on both, `gd_scale` is `1 / s`, `unit` is 1. PEFT 0.21 also
    multiplies B by the singular values and leaves A as it is under `stable`, so that its start
    shrinks with the gradient: a loss divided by 1000 gives a branch 1000 times smaller.

    Raises:
        ValueError: A layer of the branch gets no gradient.
    """
    adapter = cast(LoraConfig, variant.adapter)
    # Without it the first layers' inputs need no gradient, and torch warns of hooks half fired.
    base.enable_input_require_grads()
    try:
        preprocess_loraga(base, adapter, lambda: calibration.backward(base))
    finally:
        base.disable_input_require_grads()
    for name in sorted(cast(set[str], adapter.target_modules)):
        if not hasattr(base.get_submodule(name), "_peft_loraga_grad"):
            raise ValueError(f"lora.target_modules: {name} gets no gradient from the loss")
    student = variant.attach(base)
    for layer in student.modules():
        if isinstance(layer, LoraLayer):
            _scale_as_published(layer, cast(Any, adapter.lora_ga_config))
    return student


@torch.no_grad()
def _scale_as_published(layer: Any, settings: LoraGAConfig) -> None:
    """Gives A and B of a layer unit directions and the scale of the authors' code."""
    for name, down in layer.lora_A.items():
        scale = 1.0
        if settings.scale == "stable":
            scale = layer.out_features**0.25 / settings.stable_gamma**0.5
        elif settings.scale == "gd_scale":
            scale = 1 / layer.scaling[name]
        up = layer.lora_B[name].weight
        down.weight.copy_(nn.functional.normalize(down.weight, dim=1) * scale)
        up.copy_(nn.functional.normalize(up, dim=0, eps=1e-30) * scale)
