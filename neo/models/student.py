"""The student: a base model, what is trained of it, and how it is written to disk."""

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from neo.models.causal_lm import CausalLM
from neo.models.variants import Variant


def build_student(spec: CausalLM, variant: Variant, device: torch.device, seed: int) -> nn.Module:
    """The student in train mode with its branch, whose weights are drawn from `seed`."""
    base = spec.load(device, trained=variant.adapter is None, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return variant.attach(base).train()


def build_meta_student(spec: CausalLM, variant: Variant) -> nn.Module:
    """The student on the meta device: what would be trained, counted before a weight is read.

    Raises:
        ValueError: `target_modules` match no layer.
    """
    with torch.device("meta"):
        return variant.attach(spec.meta())


def inner(student: nn.Module) -> PreTrainedModel:
    """The causal LM inside a student, with or without a PEFT wrapper around it."""
    return student.get_base_model() if isinstance(student, PeftModel) else student


def trained_parameters(student: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name; tied weights once."""
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


def save_student(student: nn.Module, tokenizer: Any, run_dir: Path) -> Path:
    """Writes `adapter/` in PEFT's format, or `model/` where all weights were trained.

    Returns:
        The folder written.
    """
    if isinstance(student, PeftModel):
        folder = run_dir / "adapter"
        # PEFT would add the frozen base's embedding where the head is adapted.
        student.save_pretrained(folder, save_embedding_layers=False)
    else:
        folder = run_dir / "model"
        cast(Any, student).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
