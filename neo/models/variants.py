"""LoRA variants: how a student is trained, one file of PEFT's own keys each (`conf/lora/`)."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from neo.models.lora_fa import freeze_a, lora_fa_problems
from neo.models.moslora import MoSLoRAConfig, moslora_problems


@dataclass(frozen=True)
class Variant:
    """The branch a student trains; all its weights where `adapter` is None.

    Args:
        adapter: PEFT's keys of the branch.
        finish: Done to the model once the branch is attached.
    """

    adapter: LoraConfig | None
    finish: Callable[[nn.Module], nn.Module] | None = None

    def attach(self, model: PreTrainedModel) -> nn.Module:
        """The model with what is to be trained, and nothing else, requiring gradients.

        Raises:
            ValueError: `target_modules` match no layer, or one of them matches none.
        """
        if self.adapter is None:
            return model.requires_grad_(True)
        self._check_targets(model)
        student = get_peft_model(model, self.adapter)
        return student if self.finish is None else self.finish(student)

    def _check_targets(self, model: PreTrainedModel) -> None:
        assert self.adapter is not None
        targets = self.adapter.target_modules
        if targets is None or targets == "all-linear":
            return  # PEFT's choice
        names = [name for name, _ in model.named_modules()]
        if isinstance(targets, str):  # a regular expression
            missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
        else:
            missing = [
                target
                for target in sorted(targets)
                if not any(name == target or name.endswith(f".{target}") for name in names)
            ]
        if missing:
            head = model.get_output_embeddings()
            linear = {
                name.rpartition(".")[2]
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and module is not head
            }
            raise ValueError(
                f"lora.target_modules={missing}: match no layer; the linear layers are "
                f"{', '.join(sorted(linear))}, or take all-linear"
            )


def lora(**keys: Any) -> Variant:
    """A LoRA branch; the keys are `peft.LoraConfig`'s own.

    Raises:
        ValueError: A value that PEFT would only trip over later, or silently accept.
    """
    _refuse(_problems(keys))
    return Variant(LoraConfig(**{"task_type": "CAUSAL_LM", **keys}))


lora.passes_keys_to = LoraConfig  # type: ignore[attr-defined]


def moslora(**keys: Any) -> Variant:
    """A LoRA branch with a trained mixer between A and B; the keys are LoRA's, and `mixer`.

    Raises:
        ValueError: As for `lora`; or a key that cannot go together with a mixer.
    """
    _refuse([*_problems(keys), *moslora_problems(keys)])
    return Variant(MoSLoRAConfig(**{"task_type": "CAUSAL_LM", **keys}))


moslora.passes_keys_to = MoSLoRAConfig  # type: ignore[attr-defined]


def lora_fa(**keys: Any) -> Variant:
    """A LoRA branch of which only B is trained; the keys are LoRA's.

    Raises:
        ValueError: As for `lora`; or a key under which A does not follow from the seed.
    """
    _refuse([*_problems(keys), *lora_fa_problems(keys)])
    return Variant(LoraConfig(**{"task_type": "CAUSAL_LM", **keys}), freeze_a)


lora_fa.passes_keys_to = LoraConfig  # type: ignore[attr-defined]


def none() -> Variant:
    """No branch: all weights of the student are trained."""
    return Variant(None)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


def _problems(keys: Mapping[str, Any]) -> list[str]:
    r, alpha, dropout = keys.get("r", 8), keys.get("lora_alpha", 8), keys.get("lora_dropout", 0.0)
    targets = keys.get("target_modules", "all-linear")
    problems = []
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        problems.append(f"lora.r={r!r}: must be an integer of at least 1")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or alpha <= 0:
        problems.append(f"lora.lora_alpha={alpha!r}: must be a number above 0")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        problems.append(f"lora.lora_dropout={dropout!r}: must lie in [0, 1)")
    if targets is not None and not targets:
        problems.append("lora.target_modules=[]: must name at least one layer, or be all-linear")
    if keys.get("kasa_config") is not None:
        problems.append(
            f"lora.kasa_config={keys['kasa_config']!r}: KaSA is not supported; attaching it cuts "
            "the r smallest singular directions out of the base, and the two penalties that it "
            "is trained with are not in the loss"
        )
    return problems
