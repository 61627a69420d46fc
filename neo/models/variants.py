"""LoRA variants: how a student is trained, one file of PEFT's own keys each (`conf/lora/`)."""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from jaxtyping import Float
from peft import EvaConfig, KasaConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from neo.models.kasa import kasa_penalty, kasa_problems
from neo.models.lora_fa import freeze_a, lora_fa_problems
from neo.models.moslora import MoSLoRAConfig, moslora_problems


@dataclass(frozen=True)
class Variant:
    """The branch a student trains; all its weights where `adapter` is None.

    Args:
        adapter: PEFT's keys of the branch.
        finish: Done to the model once the branch is attached.
        calibration_rows: Training rows that the branch's start is computed from, at least.
        penalty: Added to the loss of every optimizer step; of the model with its branch.
    """

    adapter: LoraConfig | None
    finish: Callable[[nn.Module], nn.Module] | None = None
    calibration_rows: int = 0
    penalty: Callable[[nn.Module], Float[Tensor, ""]] | None = None

    def attach(self, model: PreTrainedModel) -> nn.Module:
        """The model with what is to be trained, and nothing else, requiring gradients.

        Raises:
            ValueError: `target_modules` match no layer, or one of them matches none.
        """
        if self.adapter is None:
            return model.requires_grad_(True)
        self._check_targets(model)
        student = get_peft_model(model, copy.deepcopy(self.adapter))
        return student if self.finish is None else self.finish(student)

    def attach_drawn(self, model: PreTrainedModel) -> nn.Module:
        """As `attach`, but a start that would be computed is drawn; the config names it still.

        Raises:
            ValueError: As `attach`.
        """
        adapter = copy.copy(self.adapter)
        assert adapter is not None
        if (start := adapter.init_lora_weights) not in (True, "gaussian"):
            adapter.init_lora_weights = True
        student = replace(self, adapter=adapter).attach(model)
        config_of(student).init_lora_weights = start
        return student

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


def config_of(student: nn.Module) -> LoraConfig:
    """PEFT's config of a student's branch."""
    assert isinstance(student, PeftModel)
    return cast(LoraConfig, student.peft_config[student.active_adapter])


def lora(**keys: Any) -> Variant:
    """A LoRA branch; the keys are `peft.LoraConfig`'s own.

    Raises:
        ValueError: A value that PEFT would only trip over later, or silently accept.
    """
    _refuse([*_problems(keys), *_problems_of_start(keys)])
    return Variant(LoraConfig(**{"task_type": "CAUSAL_LM", **keys}))


lora.passes_keys_to = LoraConfig  # type: ignore[attr-defined]


def calibrated(
    *, init_lora_weights: Literal["eva", "corda", "lora_ga"], calibration_rows: int, **keys: Any
) -> Variant:
    """A LoRA branch whose start is computed from training rows; the keys are LoRA's.

    Args:
        init_lora_weights: What computes it.
        calibration_rows: Whole micro-batches are taken, the first of training, until they hold so
            many rows; however many devices train, one process computes on the same rows.
        keys: Among them `eva_config`, `corda_config` or `lora_ga_config`, a mapping of PEFT's keys.

    Raises:
        ValueError: As for `lora`; or another start, or a key that its start does not have.
    """
    problems = _problems(keys)
    if calibration_rows < 1:
        problems.append(f"lora.calibration_rows={calibration_rows}: must be at least 1")
    key, settings = CALIBRATED[init_lora_weights]
    problems += [
        f"lora.{other}: is not a key of init_lora_weights={init_lora_weights}; {key} is"
        for other, _ in CALIBRATED.values()
        if other != key and keys.get(other) is not None
    ]
    given = keys.get(key) or {}
    problems += _problems_of_settings(key, given, settings)
    _refuse(problems)
    keys |= {"init_lora_weights": init_lora_weights, key: settings(**given)}
    adapter = LoraConfig(**{"task_type": "CAUSAL_LM", **keys})
    return Variant(adapter, calibration_rows=calibration_rows)


calibrated.passes_keys_to = LoraConfig  # type: ignore[attr-defined]
# How PEFT calls them, the key of their settings, and the settings.
CALIBRATED: dict[str, tuple[str, Any]] = {
    "eva": ("eva_config", EvaConfig),
    "corda": ("corda_config", CordaConfig),
    "lora_ga": ("lora_ga_config", LoraGAConfig),
}
# Settings that are not for a run: it keeps its own start, and knows what is supervised.
NO_SETTINGS = (
    "cache_file", "covariance_file", "prune_temporary_fields", "verbose", "label_mask_value"
)  # fmt: skip
# Values that PEFT 0.21 has and that are not what their paper means by them.
WRONG_IN_PEFT = {
    ("scale", "weight_svd"): "in PEFT it is computed from the gradient's singular values, too",
    ("direction", "random"): "PEFT gives A and B the same directions",
}


def moslora(**keys: Any) -> Variant:
    """A LoRA branch with a trained mixer between A and B; the keys are LoRA's, and `mixer`.

    Raises:
        ValueError: As for `lora`; or a key that cannot go together with a mixer.
    """
    _refuse([*_problems(keys), *moslora_problems(keys), *_clashes(keys, "a mixer")])
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


def kasa(*, kasa_config: dict[str, Any] | None = None, **keys: Any) -> Variant:
    """KaSA's branch, base and penalties; the keys are LoRA's, and those of PEFT's `KasaConfig`.

    Raises:
        ValueError: As for `lora`; or a key that cannot go together with KaSA.
    """
    given = kasa_config or {}
    settings = _problems_of_settings("kasa_config", given, KasaConfig)
    _refuse([*_problems(keys), *kasa_problems(keys), *_clashes(keys, "KaSA"), *settings])
    keys |= {"task_type": "CAUSAL_LM", "kasa_config": KasaConfig(**given)}
    return Variant(LoraConfig(**keys), penalty=kasa_penalty)


kasa.passes_keys_to = LoraConfig  # type: ignore[attr-defined]


def none() -> Variant:
    """No branch: all weights of the student are trained."""
    return Variant(None)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


def _clashes(keys: Mapping[str, Any], what: str) -> list[str]:
    """Keys of PEFT's own variants, and of layers that no other variant is for."""
    others = {f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    return [
        f"lora.{key}={keys[key]!r}: does not go together with {what}"
        for key in sorted({*others, "fan_in_fan_out", "target_parameters"})
        if keys.get(key)
    ]


def _problems_of_start(keys: Mapping[str, Any]) -> list[str]:
    """Starts that `lora` does not have, since PEFT would leave the branch or the base half done."""
    start = keys.get("init_lora_weights", True)
    if start in CALIBRATED:
        return [
            f"lora.init_lora_weights={start}: is computed from training rows; take lora=eva, "
            "lora=corda or lora=loraga"
        ]
    if start == "loftq":
        return [
            "lora.init_lora_weights=loftq: is not supported; it puts a quantised base in the place "
            "of the one that the adapter would be used with"
        ]
    return []


def _problems_of_settings(key: str, given: Any, settings: Any) -> list[str]:
    if not isinstance(given, Mapping):
        return [f"lora.{key}={given!r}: must be a mapping"]
    legal = [f.name for f in fields(settings) if f.name not in NO_SETTINGS]
    if unknown := sorted(given.keys() - set(legal)):
        return [f"lora.{key}.{name}: no such key; it takes {', '.join(legal)}" for name in unknown]
    if not given.get("stable_gamma", 1) > 0:
        return [f"lora.{key}.stable_gamma={given['stable_gamma']!r}: must be above 0"]
    hints = get_type_hints(settings)
    for name, value in given.items():
        choices = [c for c in get_args(hints[name]) if (name, c) not in WRONG_IN_PEFT]
        if get_origin(hints[name]) is Literal and value not in choices:
            why = f" ({WRONG_IN_PEFT[name, value]})" if (name, value) in WRONG_IN_PEFT else ""
            return [f"lora.{key}.{name}={value!r}{why}: must be one of {', '.join(choices)}"]
    try:
        settings(**given)
    except (ValueError, TypeError) as error:
        return [f"lora.{key}={dict(given)}: {error}"]
    return []


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
    if keys.get("kasa_config") is not None:  # where it is a key, it is a parameter of its own
        given = keys["kasa_config"]
        problems.append(f"lora.kasa_config={given!r}: take lora=kasa, which has its penalties, too")
    return problems
