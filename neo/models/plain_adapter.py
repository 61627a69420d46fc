"""An adapter for the untouched base, which plain PEFT loads, of whatever was trained.

PiSSA, OLoRA, CorDA and LoRA-GA take what their branch holds at the start, `s B0 A0`, out of the
base, KaSA what is smallest in it. On the untouched base the trained student is the branch
`s (B A - B0 A0)`: a plain LoRA of twice the rank, with `A` over `A0` and `B` beside `-B0`. That is
why the start is kept.
"""

import copy
import re
from typing import NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor

from neo.models.kasa import fold_singular_values
from neo.models.moslora import fold_moslora, is_moslora
from neo.models.start import changes_the_base, is_kasa, needs_rows, start_of
from neo.models.variants import config_of

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


def plain_adapter(student: PeftModel) -> Plain:
    """The student's branch as an adapter for the untouched base.

    This is where a variant's conversion is chosen.
    """
    config = config_of(student)
    if changes_the_base(config):
        name = "KaSA" if is_kasa(config) else str(config.init_lora_weights)
        return Plain(*_without_start(student), f"{name}, converted to plain LoRA of rank 2r")
    if is_moslora(student):
        return Plain(*fold_moslora(student), "MoSLoRA, folded into plain LoRA (B W times A)")
    config, origin = copy.deepcopy(config), "as trained"
    if needs_rows(config):  # what it began with is behind it
        origin = f"{config.init_lora_weights}, a plain LoRA once it has begun"
        config.init_lora_weights, config.eva_config = True, None
    config.inference_mode = True
    # PEFT would add the frozen base's embedding where the head is adapted.
    return Plain(get_peft_model_state_dict(student, save_embedding_layers=False), config, origin)


def _without_start(student: PeftModel) -> tuple[dict[str, Tensor], LoraConfig]:
    """A over A0 and B beside -B0, with the scaling that every layer had.

    PEFT 0.21 has this, too, but leaves DoRA's magnitudes and modules_to_save behind, and refuses
    rsLoRA with patterns.
    """
    start = start_of(student)
    assert start is not None
    state = {}
    trained = get_peft_model_state_dict(student, save_embedding_layers=False)
    for name, value in fold_singular_values(trained).items():
        found = _A_OR_B.search(name)
        if found is None:
            state[name] = value
            continue
        began = start.tensors[name].to(value)
        parts, dim = ([value, began], 0) if found[1] == "A" else ([value, -began], 1)
        state[name] = torch.cat(parts, dim)
    config = copy.deepcopy(config_of(student))
    # s = alpha / r, or alpha / sqrt(r): it must be what it was at twice the rank.
    factor: int | float = 2**0.5 if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha = cast(int, config.lora_alpha * factor)
    config.rank_pattern = {key: 2 * r for key, r in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {
        key: cast(int, alpha * factor) for key, alpha in (config.alpha_pattern or {}).items()
    }
    config.init_lora_weights, config.inference_mode = True, True
    config.corda_config = config.lora_ga_config = config.kasa_config = None
    return state, config
