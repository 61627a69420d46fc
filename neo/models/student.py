"""The student: a base model, what is trained of it, and how it is written to disk."""

from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from neo.models.calibration import Calibration
from neo.models.causal_lm import CausalLM
from neo.models.plain_adapter import plain_adapter
from neo.models.start import Start, attach_branch, attach_without_start
from neo.models.variants import Variant

PROBE = Path("checkpoints") / "probe.safetensors"  # in the folder of a run


def build_student(
    spec: CausalLM,
    variant: Variant,
    device: torch.device,
    seed: int,
    start: Start | None = None,
    calibration: Calibration | None = None,
) -> nn.Module:
    """The student in train mode with its branch, whose weights are drawn from `seed`.

    Args:
        spec: The base.
        variant: The branch.
        device: Decides the base's dtype; the weights stay on the CPU.
        seed: Of the branch's weights, and of the base's where they are fresh.
        start: `start_of` the same student built before, so that nothing is computed again.
        calibration: What the starts of EVA, CorDA and LoRA-GA are computed of.

    Raises:
        ValueError: The branch does not fit a layer, or its start needs rows and there are none.
    """
    base = spec.load(device, trained=variant.adapter is None, seed=seed)
    return attach_branch(base, variant, seed, start, calibration)


def build_meta_student(spec: CausalLM, variant: Variant) -> nn.Module:
    """The student on the meta device: what would be trained, counted before a weight is read.

    Raises:
        ValueError: `target_modules` match no layer, or the branch does not fit one.
    """
    with torch.device("meta"):
        return attach_without_start(spec.meta(), variant)


def inner(student: nn.Module) -> PreTrainedModel:
    """The causal LM inside a student, with or without a PEFT wrapper around it."""
    return student.get_base_model() if isinstance(student, PeftModel) else student


def trained_parameters(student: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name; tied weights once."""
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


def save_student(student: nn.Module, tokenizer: Any, run_dir: Path) -> Path:
    """Writes `adapter/` in PEFT's format, or `model/` where all weights were trained.

    Besides, the student's logits on a probe, which an export is compared with.

    Returns:
        The folder written.
    """
    if isinstance(student, PeftModel):
        folder = run_dir / "adapter"
        folder.mkdir(parents=True, exist_ok=True)
        state, config, origin = plain_adapter(student)
        student.create_or_update_model_card(str(folder))
        save_file(
            {name: value.detach().cpu().contiguous().clone() for name, value in state.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        config.save_pretrained(folder)
    else:
        folder, origin = run_dir / "model", "all weights were trained"
        cast(Any, student).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _save_probe(student, origin, run_dir / PROBE)
    return folder


@torch.no_grad()
def logits_on(
    model: nn.Module, input_ids: Int64[Tensor, "batch length"]
) -> Float[Tensor, "batch length vocab"]:
    """The model's own logits, without dropout, in float32 on the CPU."""
    was_training = model.training
    device = next(model.parameters()).device
    output = model.eval()(input_ids=input_ids.to(device), use_cache=False)
    model.train(was_training)
    return output.logits.float().cpu()


def _save_probe(student: nn.Module, origin: str, file: Path) -> None:
    """Writes what the student says to four rows of eight ids that lie all over the vocabulary."""
    model = inner(student)
    ids = (torch.arange(32) * 7919 + 1).view(4, 8) % model.config.get_text_config().vocab_size
    frozen = (p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
    dtype = next(frozen, model.dtype)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {"input_ids": ids, "logits": logits_on(student, ids).contiguous()},
        file,
        metadata={"dtype": str(dtype).removeprefix("torch."), "origin": origin},
    )
