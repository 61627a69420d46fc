"""What a causal LM hands to its head, and whether that is all that its loss needs to know."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from neo.models.head import gathered, head_of


def hidden_states(
    model: PreTrainedModel,
    input_ids: Int64[Tensor, "batch length"],
    position_ids: Int64[Tensor, "batch length"],
) -> Float[Tensor, "batch length d"]:
    """The backbone's last hidden states; a position that restarts at 0 begins a new example.

    `use_cache=False` is what makes transformers keep packed examples apart.
    """
    output = model.get_decoder()(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    return output.last_hidden_state


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compares the logits computed from hidden states with the model's own, on four tokens.

    They are compared as they are and with what the head gives enlarged to 100, where even a wide
    soft cap shows.

    Raises:
        ValueError: They differ: the model does something to its logits that we do not know.
    """
    positions = torch.arange(4, device=model.device).repeat(2, 1)
    input_ids = positions % model.config.get_text_config().vocab_size
    head = head_of(model)
    products = head.products(hidden_states(model, input_ids, positions))
    enlarge = products.new_tensor([1.0, 100 / products.abs().max().clamp(min=1e-3).item()])
    enlarge = enlarge[:, None, None]

    module = model.get_output_embeddings()
    hook = module.register_forward_hook(lambda _, __, out: out * enlarge)
    try:
        with gathered(module):
            forward = model(input_ids=input_ids, position_ids=positions, use_cache=False)
    finally:
        hook.remove()
    expected = forward.logits.float()
    logits = head.bounded((products * enlarge).float())
    scale = expected.abs().amax((1, 2), keepdim=True).clamp(min=1e-3)
    tolerance = 1e-4 if _in_float32(head.weight) else 3e-2
    if logits.shape != expected.shape or ((logits - expected).abs() > tolerance * scale).any():
        raise ValueError(
            f"{type(model).__name__} does more to its logits than a head, a scale and a soft cap; "
            "its loss cannot be computed from hidden states"
        )


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Compares the hidden states of a packed example with those it has alone, on four tokens.

    Raises:
        ValueError: They differ: the model carries something from one example into the next, as
            recurrent ones do.
    """
    order = torch.arange(8, device=model.device)[None]
    input_ids = order % model.config.get_text_config().vocab_size
    positions = order[:, :4]
    was_training = model.training
    model.eval()  # dropout would differ, too
    alone = hidden_states(model, input_ids[:, 4:], positions)
    packed = hidden_states(model, input_ids, positions.repeat(1, 2))[:, 4:]
    model.train(was_training)
    tolerance = 1e-3 if _in_float32(alone) else 5e-2
    if ((packed - alone).abs() > tolerance * alone.abs().max()).any():
        raise ValueError(
            f"data.packing=true: {type(model).__name__} carries state from one packed example into "
            "the next; set data.packing=false"
        )


def _in_float32(tensor: Tensor) -> bool:
    autocast = torch.is_autocast_enabled(tensor.device.type)
    return tensor.dtype == torch.float32 and not autocast
