"""The student as a run left it: its base with the adapter it wrote, or the weights it wrote."""

import dataclasses
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

from neo.models.causal_lm import CausalLM


def load_trained(
    base: CausalLM, run: Path, device: torch.device, *, seed: int = 0
) -> PreTrainedModel | PeftModel:
    """The trained student, on the device, in eval mode; `student.inner` gives the causal LM in it.

    Args:
        base: The student's base, as the run had it.
        run: Holds `adapter/`, or `model/` where all weights were trained.
        device: Decides the base's dtype, too.
        seed: Of the run, for a base whose weights it drew.

    Raises:
        ValueError: The run holds neither, or the adapter does not fit the base.
    """
    if (run / "adapter").is_dir():
        model = with_adapter(base.load(device, trained=False, seed=seed), run / "adapter")
    elif (run / "model").is_dir():
        whole = dataclasses.replace(base, path=str(run / "model"), revision=None, random_init=False)
        model = whole.load(device, trained=True)
    else:
        raise ValueError(f"run={run}: holds neither adapter/ nor model/; did the run finish?")
    if base.quantization is None:  # else its weights lie there already
        model.to(device)
    return model.eval()


def with_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The base with the adapter of a folder in PEFT's format.

    Raises:
        ValueError: The adapter's weights cannot be read, or do not fit the base.
    """
    try:
        return PeftModel.from_pretrained(base, folder)
    except (SafetensorError, RuntimeError) as error:  # shapes that do not fit the base
        raise ValueError(f"{folder}: PEFT cannot load it: {str(error).splitlines()[0]}") from error
