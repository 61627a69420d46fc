"""What a branch begins with where that is computed: of the base's weights, or of training rows.

PiSSA, OLoRA, CorDA and LoRA-GA take what their branch holds at the start, `s B0 A0`, out of the
base; KaSA takes out of it what its branch does not hold; EVA leaves it as it is. A start is
computed once and kept: a run that goes on, and every process but the first, take it as it is.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from neo.models.calibration import Calibration, corda_branch, eva_branch, lora_ga_branch
from neo.models.kasa import base_left_whole, smallest_directions
from neo.models.variants import Variant, config_of

# PEFT's values of init_lora_weights, by how they begin.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga")
FROM_ROWS: dict[str, Callable[[PreTrainedModel, Variant, Calibration], nn.Module]] = {
    "eva": eva_branch,
    "corda": corda_branch,
    "lora_ga": lora_ga_branch,
}
# What PEFT's EVA decides about a branch besides its weights.
DECIDED = ("rank_pattern", "alpha_pattern", "target_modules")


class Start(NamedTuple):
    """A computed start, of plain types that a checkpoint can hold.

    Args:
        tensors: A and B as attached, on the CPU, named as PEFT stores them. Where the base is
            changed it is less `s B A` of these; in KaSA the branch itself begins otherwise.
        keys: PEFT's keys that were decided with them.
    """

    tensors: dict[str, Tensor]
    keys: dict[str, Any]


def changes_the_base(config: LoraConfig | None) -> bool:
    """Whether attaching the branch takes something out of the base's weights."""
    return _init(config).startswith(CHANGE_THE_BASE) or is_kasa(config)


def is_kasa(config: LoraConfig | None) -> bool:
    """Whether the branch is KaSA's."""
    return getattr(config, "kasa_config", None) is not None


def needs_rows(config: LoraConfig | None) -> bool:
    """Whether the start is computed from training rows."""
    return _init(config) in FROM_ROWS


def is_computed(config: LoraConfig | None) -> bool:
    """Whether the start is more than drawn from the seed."""
    return changes_the_base(config) or needs_rows(config)


def start_of(student: nn.Module) -> Start | None:
    """The start that was computed for a student; None where there was nothing to compute."""
    return getattr(student, "start", None)


def attach_branch(
    base: PreTrainedModel,
    variant: Variant,
    seed: int,
    start: Start | None = None,
    calibration: Calibration | None = None,
) -> nn.Module:
    """The base with its branch, in train mode; what is drawn for it is drawn from `seed`.

    Args:
        base: Of which all weights may be changed.
        variant: The branch.
        seed: Of what is drawn.
        start: `start_of` the same student attached before: nothing is computed again.
        calibration: What a start is computed of that needs rows.

    Raises:
        ValueError: The branch does not fit a layer, or its start needs rows and there are none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = _attach(base, variant, start, calibration)
    return student.train()


def attach_known(
    base: PreTrainedModel, variant: Variant, seed: int, start: Start | None
) -> nn.Module:
    """As `attach_branch`, but nothing is taken out of the base: `take_out` does that later.

    The base's weights need not be there yet. A branch that begins as drawn has no start.
    """
    assert variant.adapter is not None
    assert (start is None) is not is_computed(variant.adapter)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = variant.attach(base) if start is None else _attach_again(base, variant, start)
    cast(Any, student).start = start
    return student


@torch.no_grad()
def take_out(student: nn.Module, start: Start, split: Callable[[Tensor], DTensor]) -> None:
    """Takes the start out of a base that is split over processes, one layer at a time."""
    if not changes_the_base(config_of(student)):
        return
    for weight, taken in _taken(student, start.tensors):
        part, less = cast(DTensor, weight.data).to_local(), split(taken).to_local()
        part.copy_((part.float() - less).to(part.dtype))


def attach_without_start(model: PreTrainedModel, variant: Variant) -> nn.Module:
    """The model with a branch of the right shapes, whose start is drawn and not computed.

    Raises:
        ValueError: The branch does not fit a layer.
    """
    if not is_computed(variant.adapter):
        return variant.attach(model)
    student = variant.attach_drawn(model)
    _check_branch(student)
    return student


def _attach(
    base: PreTrainedModel,
    variant: Variant,
    start: Start | None,
    calibration: Calibration | None,
) -> nn.Module:
    config = variant.adapter
    if not is_computed(config):
        return variant.attach(base)
    in_place = _init(config) == "olora"  # where PEFT 0.21 overwrites a float32 base
    whole = {
        p: p.data.clone() if in_place and p.dtype == torch.float32 else p.data
        for p in base.parameters()
    }
    if start is not None or is_kasa(config):
        student = _attach_again(base, variant, start)
        if start is None:
            _check_branch(student)
    elif needs_rows(config):
        if calibration is None:
            raise ValueError(
                f"lora.init_lora_weights={_init(config)}: is computed from training rows, and "
                "there are none here"
            )
        student = FROM_ROWS[_init(config)](base, _with_targets(base, variant), calibration)
    else:
        student = variant.attach(base)
        _check_branch(student)
    if start is None:
        start = _keep(student)
    _check_finite(start, config_of(student))
    if changes_the_base(config):
        _take_out_start(student, whole, start.tensors)
    cast(Any, student).start = start
    return student


def _with_targets(base: PreTrainedModel, variant: Variant) -> Variant:
    """The variant with every layer it is for named in full, which PEFT's calibrations need."""
    assert variant.adapter is not None
    with torch.device("meta"):
        skeleton = attach_without_start(type(base)(base.config), variant)
    adapter = copy.copy(variant.adapter)
    adapter.target_modules = {
        name.removeprefix("base_model.model.")
        for name, module in skeleton.named_modules()
        if isinstance(module, LoraLayer)
    }
    return dataclasses.replace(variant, adapter=adapter)


def _keep(student: nn.Module) -> Start:
    config = config_of(student)
    keys = {key: _plain(getattr(config, key)) for key in DECIDED}
    if is_kasa(config):
        return Start(smallest_directions(student), keys)
    state = get_peft_model_state_dict(cast(PeftModel, student), save_embedding_layers=False)
    tensors = {
        name: value.detach().cpu().clone()
        for name, value in state.items()
        if ".lora_" in name and "magnitude" not in name
    }
    return Start(tensors, keys)


def _plain(value: Any) -> Any:
    """Sets as sorted lists: a checkpoint is read without code."""
    return sorted(value) if isinstance(value, set) else copy.deepcopy(value)


@torch.no_grad()
def _attach_again(base: PreTrainedModel, variant: Variant, start: Start | None) -> nn.Module:
    """The branch with the start it had, or as KaSA's is drawn; the base is as it was."""
    adapter = copy.copy(variant.adapter)
    for key, value in ({} if start is None else start.keys).items():
        setattr(adapter, key, copy.deepcopy(value))
    with base_left_whole():
        student = dataclasses.replace(variant, adapter=adapter).attach_drawn(base)
    if start is not None and not is_kasa(variant.adapter):
        set_peft_model_state_dict(cast(PeftModel, student), start.tensors)
    return student


@torch.no_grad()
def _take_out_start(
    student: nn.Module, whole: Mapping[nn.Parameter, Tensor], start: Mapping[str, Tensor]
) -> None:
    """Makes each base weight what is left of it, given what it was, in one arithmetic for all.

    PEFT 0.21 takes A and B out of a base in half precision before it rounds them to that precision:
    the base would lack what the branch does not have.
    """
    for weight, taken in _taken(student, start):
        weight.data = (whole[weight].float() - taken).to(weight.dtype)


def _taken(
    student: nn.Module, start: Mapping[str, Tensor]
) -> Iterator[tuple[nn.Parameter, Float[Tensor, "out in"]]]:
    """Each weight of the base with what the start takes out of it."""
    for path, layer in _lora_layers(student).items():
        weight = layer.get_base_layer().weight
        for name in layer.lora_A:  # none on an embedding
            down, up = (start[f"{path}.lora_{ab}.weight"].to(weight.device) for ab in "AB")
            taken = layer.scaling[name] * up @ down
            yield weight, taken.T if layer.fan_in_fan_out else taken


def _lora_layers(student: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in student.named_modules() if isinstance(m, LoraLayer)}


def _check_branch(student: nn.Module) -> None:
    """What PEFT would do to a branch with a computed start, without saying so or too late."""
    config = config_of(student)
    init, name = _init(config), _called(config)
    if config.target_parameters:
        raise ValueError(
            f"lora.target_parameters={sorted(config.target_parameters)}: with "
            f"{name} only target_modules can be exported"
        )
    reached = set(cast(Any, student).get_base_model().get_decoder().modules())
    for path, layer in _lora_layers(student).items():
        place = path.removeprefix("base_model.model.")
        if needs_rows(config) and layer not in reached:
            raise ValueError(
                f"lora.target_modules: {place} lies outside the backbone, and {name} is computed "
                "from what goes through that"
            )
        is_embedding = bool(layer.lora_embedding_A)  # which begins as in LoRA under PiSSA, OLoRA
        if not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
            if is_embedding and not needs_rows(config) and not is_kasa(config):
                continue
            raise ValueError(
                f"lora.target_modules: {place} is no linear layer, and {name} is for those alone"
            )
        width, rows = layer.in_features, layer.out_features
        most, why = min(width, rows), f"is a layer of rank {min(width, rows)}"
        if init == "eva":
            rho = cast(Any, config.eva_config).rho
            most, why = int(width / rho), f"has inputs of {width} numbers, eva_config.rho is {rho}"
        elif init == "lora_ga":
            most, why = most // 2, f"{why} and A and B take r directions each"
        elif is_kasa(config):
            most, why = most - 1, f"{why}, of which one at least stays"
        r = max(layer.r.values())
        if r > most:
            raise ValueError(
                f"lora.r={r}: {place} {why}, and {name} takes its directions from the layer; use "
                f"at most {most} (lora.rank_pattern for this layer alone)"
            )


def _check_finite(start: Start, config: LoraConfig) -> None:
    for name, value in start.tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"lora.{_called(config)}: the start computed for {name} is not finite")


def _init(config: LoraConfig | None) -> str:
    return str(getattr(config, "init_lora_weights", True)).lower()


def _called(config: LoraConfig) -> str:
    """The key that asks for the start, as in a message."""
    return "kasa_config" if is_kasa(config) else f"init_lora_weights={_init(config)}"
