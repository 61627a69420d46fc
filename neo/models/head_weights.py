"""A model's head read from its files, without the rest of its weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from neo.models.causal_lm import CausalLM
from neo.models.head import OutputHead, head_of


def read_head(spec: CausalLM, device: torch.device, *, trained: bool, seed: int = 0) -> OutputHead:
    """The head that `spec.load` would give, frozen, on the CPU.

    Of the model's files the head's tensors alone are read. Where its weights are drawn, or are
    stored under other names than the model's, all of it is loaded.

    Args:
        spec: Of the model.
        device: As for `spec.load`: what `dtype="auto"` means.
        trained: As for `spec.load`.
        seed: Of weights that are drawn.

    Raises:
        ValueError: The model cannot be read, or has no head that is known.
    """
    meta = spec.meta()
    module: Any = meta.get_output_embeddings()
    names = {"weight": _name_of(meta, module.weight)}
    if module.bias is not None:
        names["bias"] = _name_of(meta, module.bias)
    found = None if spec.random_init else _read(spec, names)
    if found is None:
        return _frozen(head_of(spec.load(device, trained=trained, seed=seed)))
    dtype = torch.float32 if trained else spec.weight_dtype(device)
    for key, tensor in found.items():
        setattr(module, key, torch.nn.Parameter(tensor.to(dtype), requires_grad=False))
    return _frozen(head_of(meta))


def _frozen(head: OutputHead) -> OutputHead:
    head.weight.requires_grad_(False)
    if head.bias is not None:
        head.bias.requires_grad_(False)
    return head


def _name_of(model: PreTrainedModel, weight: Tensor) -> str:
    """Under which it is stored: of a tied weight the embedding's."""
    return next(name for name, each in model.named_parameters() if each is weight)


def _read(spec: CausalLM, names: dict[str, str]) -> dict[str, Tensor] | None:
    """The tensors by their keys; None where one of them is not under its name."""
    found = {}
    for key, name in names.items():
        file = _file_with(spec, name)
        if file is None:
            return None
        with safe_open(file, framework="pt") as opened:
            if name not in opened.keys():  # noqa: SIM118  # it is no mapping
                return None
            found[key] = opened.get_tensor(name)
    return found


def _file_with(spec: CausalLM, name: str) -> Path | None:
    """The file of the model that should hold a tensor."""

    def path_of(file: str) -> Path | None:
        path = cached_file(
            spec.location, file, revision=spec.revision, _raise_exceptions_for_missing_entries=False
        )
        return None if path is None else Path(path)

    index = path_of("model.safetensors.index.json")
    if index is None:
        return path_of("model.safetensors")
    held = json.loads(index.read_text())["weight_map"].get(name)
    return None if held is None else path_of(held)
