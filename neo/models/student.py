"""The student: a base model, what is trained of it, and how it is written to disk.

PiSSA, OLoRA and their like take what their branch holds at the start, `s B0 A0`, out of the base.
On the untouched base the trained student is the branch `s (B A - B0 A0)`: a plain LoRA of twice the
rank, with `A` over `A0` and `B` beside `-B0`. That is why the start is kept.
"""

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int64
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from neo.models.causal_lm import CausalLM
from neo.models.moslora import fold_moslora, is_moslora
from neo.models.variants import Variant

# PEFT's values of init_lora_weights that change the base, by how they begin.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga")
HALF = (torch.bfloat16, torch.float16)
PROBE = Path("checkpoints") / "probe.safetensors"  # in the folder of a run

_A_OR_B = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.weight)?$")


class Plain(NamedTuple):
    """An adapter for the untouched base, as PEFT stores it.

    Args:
        state: Its tensors, named as in `adapter_model.safetensors`.
        config: Its `adapter_config.json`.
        origin: What it was made of, in words.
    """

    state: dict[str, Tensor]
    config: LoraConfig
    origin: str


def build_student(
    spec: CausalLM,
    variant: Variant,
    device: torch.device,
    seed: int,
    initial: dict[str, Tensor] | None = None,
) -> nn.Module:
    """The student in train mode with its branch, whose weights are drawn from `seed`.

    Args:
        spec: The base.
        variant: The branch.
        device: Decides the base's dtype; the weights stay on the CPU.
        seed: Of the branch's weights, and of the base's where they are fresh.
        initial: `initial_adapter` of the same student built before: the base is changed by it,
            and no SVD is computed again.

    Raises:
        ValueError: The variant changes the base, and the branch does not fit a layer.
    """
    base = spec.load(device, trained=variant.adapter is None, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not changes_the_base(variant.adapter):
            student = variant.attach(base)
        elif initial:
            student = _attach_again(base, variant, initial)
        else:
            half = {p: p.data for p in base.parameters() if p.dtype in HALF}
            student = variant.attach(base)
            _take_out_start(student, half)
    _check_branch(student)
    keep_initial(student)
    return student.train()


def build_meta_student(spec: CausalLM, variant: Variant) -> nn.Module:
    """The student on the meta device: what would be trained, counted before a weight is read.

    Raises:
        ValueError: `target_modules` match no layer, or the branch does not fit one.
    """
    with torch.device("meta"):
        student = variant.attach(spec.meta())
    _check_branch(student)
    return student


def inner(student: nn.Module) -> PreTrainedModel:
    """The causal LM inside a student, with or without a PEFT wrapper around it."""
    return student.get_base_model() if isinstance(student, PeftModel) else student


def trained_parameters(student: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name; tied weights once."""
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


def changes_the_base(config: LoraConfig | None) -> bool:
    """Whether attaching the branch takes its start out of the base's weights."""
    begin = str(getattr(config, "init_lora_weights", True)).lower()
    return begin.startswith(CHANGE_THE_BASE)


def keep_initial(student: nn.Module) -> None:
    """Notes A and B as they are, where they were taken out of the base."""
    if isinstance(student, PeftModel) and changes_the_base(_config(student)):
        state = get_peft_model_state_dict(student, save_embedding_layers=False)
        cast(Any, student).initial_adapter = {
            name: value.detach().cpu().clone()
            for name, value in state.items()
            if _A_OR_B.search(name)
        }


def initial_adapter(student: nn.Module) -> dict[str, Tensor]:
    """A and B as they were attached, named as PEFT stores them; empty where the base is as it was.

    They are on the CPU, and in no state dict.
    """
    return getattr(student, "initial_adapter", {})


def plain_adapter(student: PeftModel) -> Plain:
    """The student's branch as an adapter for the untouched base.

    This is where a variant's conversion is chosen.
    """
    config = _config(student)
    if changes_the_base(config):
        name = str(config.init_lora_weights)
        return Plain(*_without_start(student), f"{name}, converted to plain LoRA of rank 2r")
    if is_moslora(student):
        return Plain(*fold_moslora(student), "MoSLoRA, folded into plain LoRA (B W times A)")
    config = copy.deepcopy(config)
    config.inference_mode = True
    # PEFT would add the frozen base's embedding where the head is adapted.
    return Plain(
        get_peft_model_state_dict(student, save_embedding_layers=False), config, "as trained"
    )


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


def _config(student: PeftModel) -> LoraConfig:
    return cast(LoraConfig, student.peft_config[student.active_adapter])


def _without_start(student: PeftModel) -> tuple[dict[str, Tensor], LoraConfig]:
    """A over A0 and B beside -B0, with the scaling that every layer had.

    PEFT 0.21 has this, too, but leaves DoRA's magnitudes and modules_to_save behind, and refuses
    rsLoRA with patterns.
    """
    state, initial = {}, initial_adapter(student)
    for name, value in get_peft_model_state_dict(student, save_embedding_layers=False).items():
        found = _A_OR_B.search(name)
        if found is None:
            state[name] = value
            continue
        start = initial[name].to(value)
        parts, dim = ([value, start], 0) if found[1] == "A" else ([value, -start], 1)
        state[name] = torch.cat(parts, dim)
    config = copy.deepcopy(_config(student))
    # s = alpha / r, or alpha / sqrt(r): it must be what it was at twice the rank.
    factor: int | float = 2**0.5 if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha = cast(int, config.lora_alpha * factor)
    config.rank_pattern = {key: 2 * r for key, r in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {
        key: cast(int, alpha * factor) for key, alpha in (config.alpha_pattern or {}).items()
    }
    config.init_lora_weights, config.inference_mode = True, True
    config.corda_config = config.lora_ga_config = None
    return state, config


@torch.no_grad()
def _attach_again(base: PreTrainedModel, variant: Variant, initial: dict[str, Tensor]) -> PeftModel:
    """The branch with the start it had, and the base without it, in PEFT's own arithmetic."""
    assert variant.adapter is not None
    wanted = variant.adapter.init_lora_weights
    adapter = copy.copy(variant.adapter)
    adapter.init_lora_weights = True
    student = dataclasses.replace(variant, adapter=adapter).attach(base)
    assert isinstance(student, PeftModel)
    _config(student).init_lora_weights = wanted
    set_peft_model_state_dict(student, initial)
    _take_out_start(student, {p: p.data for p in base.parameters()})
    return student


@torch.no_grad()
def _take_out_start(student: nn.Module, whole: dict[nn.Parameter, Tensor]) -> None:
    """Makes each base weight what is left of it, in PEFT's arithmetic, given what it was.

    PEFT 0.21 takes A and B out of a base in half precision before it rounds them to that precision:
    the base would lack what the branch does not have.
    """
    for layer in _lora_layers(student):
        weight = getattr(layer.get_base_layer(), "weight", None)
        if weight not in whole:
            continue
        for name, down in layer.lora_A.items():
            start = layer.scaling[name] * layer.lora_B[name].weight @ down.weight
            start = start.T if getattr(layer, "fan_in_fan_out", False) else start
            weight.data = (whole[weight].float() - start).to(weight.dtype)


def _lora_layers(student: nn.Module) -> list[Any]:
    return [module for module in student.modules() if isinstance(module, LoraLayer)]


def _check_branch(student: nn.Module) -> None:
    """What PEFT would do to a branch that starts from the base's weights, without saying so."""
    if not isinstance(student, PeftModel) or not changes_the_base(_config(student)):
        return
    config, name = _config(student), _config(student).init_lora_weights
    if config.target_parameters:
        raise ValueError(
            f"lora.target_parameters={sorted(config.target_parameters)}: with "
            f"init_lora_weights={name} only target_modules can be exported"
        )
    for path, module in student.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter, down in module.lora_A.items():
            r, up = module.r[adapter], module.lora_B[adapter]
            shapes = [tuple(down.weight.shape), tuple(up.weight.shape)]
            if shapes != [(r, module.in_features), (module.out_features, r)]:
                most = min(module.in_features, module.out_features)
                raise ValueError(
                    f"lora.r={r}: {path.removeprefix('base_model.model.')} is a layer of rank "
                    f"{most}, and init_lora_weights={name} takes its directions from the layer; "
                    f"use at most {most} (lora.rank_pattern for this layer alone)"
                )
