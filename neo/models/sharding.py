"""Models of which each process holds its part: FSDP2, loaded from the files into the parts.

No process ever holds a whole model: transformers reads of each file what belongs to the process
(`DistributedConfig`), and the student with its branch is put together around weights that take no
memory until the parts are given to it.

Units of FSDP are every decoder layer and the backbone around them. The fused loss never calls the
causal LM around both, so that is none; nor the head, which `head_of` gathers for the loss.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from neo.models.causal_lm import CausalLM
from neo.models.hidden import check_head
from neo.models.start import Start, attach_known, take_out
from neo.models.student import inner
from neo.models.variants import Variant


@dataclasses.dataclass(frozen=True)
class Parts:
    """This process's part of a model's weights.

    Args:
        weights: Along the first dimension, by name; tied ones by each of theirs.
        buffers: Whole, by name.
    """

    weights: dict[str, DTensor]
    buffers: dict[str, Tensor]


def sharded_student(
    spec: CausalLM,
    variant: Variant,
    mesh: DeviceMesh,
    seed: int,
    start: Start | None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """The student in train mode, its weights and its branch split over the processes of the mesh.

    Args:
        spec: The base.
        variant: The branch, or all weights.
        mesh: Of one dimension.
        seed: Of what is drawn: each process draws the whole branch and keeps its part.
        start: Of a branch that does not begin as drawn; computed elsewhere, since it takes whole
            weights or whole models.
        compute_dtype: Of what is gathered of a layer, where all weights are trained and autocast
            would round them anyway; None gathers each in its own dtype.

    Raises:
        ValueError: The weights cannot be read, or the model cannot be split.
    """
    trained = variant.adapter is None
    parts = _load_parts(spec, mesh, trained=trained, seed=seed)
    base = _hollow(spec, parts)
    if trained:
        student: nn.Module = base.requires_grad_(True)
    else:
        student = attach_known(base, variant, seed, start)
        _set_magnitudes(student, parts, start)
    state, tied = _parts_of_base(student, parts), _tied(inner(student))
    _fully_shard(inner(student), mesh, layer_dtype=compute_dtype, keep_backbone=True)
    _fill(student, state, tied, mesh)
    if start is not None:
        take_out(student, start, _in_parts(mesh))
    with torch.autocast(mesh.device_type, compute_dtype, enabled=compute_dtype is not None):
        _finish(student, spec)
    return student.train()


def sharded_teacher(spec: CausalLM, mesh: DeviceMesh, *, offload: bool) -> PreTrainedModel:
    """A frozen model in eval mode, its weights split over the processes of the mesh.

    Args:
        spec: The model.
        mesh: Of one dimension.
        offload: Keep the parts in the CPU's memory and copy them to the device layer by layer.

    Raises:
        ValueError: The weights cannot be read, or the model cannot be split.
    """
    parts = _load_parts(spec, mesh, trained=False, seed=0)
    model = _hollow(spec, parts).requires_grad_(False)
    state, tied = _parts_of_base(model, parts), _tied(model)
    pin = mesh.device_type == "cuda"
    placed = CPUOffloadPolicy(pin_memory=pin) if offload else OffloadPolicy()
    # the embedding of a tied head is wanted once more, for the loss
    _fully_shard(model, mesh, offload=placed, keep_backbone=bool(tied))
    if offload:
        state = {name: cast(DTensor, part.cpu()) for name, part in state.items()}
    _fill(model, state, tied, mesh)
    _finish(model, spec)
    return model.eval()


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the backbone, in order.

    Raises:
        ValueError: It has none that transformers calls so.
    """
    decoder = model.get_decoder()
    layers = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} cannot be split: it has no decoder layers")
    return layers


def reshard(model: PreTrainedModel) -> None:
    """Frees what the backbone has kept of a forward pass that no backward pass will follow."""
    decoder: Any = model.get_decoder()
    if isinstance(decoder, FSDPModule):
        decoder.reshard()


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether its weights are split over processes."""
    return isinstance(model.get_decoder(), FSDPModule)


def _load_parts(spec: CausalLM, mesh: DeviceMesh, *, trained: bool, seed: int) -> Parts:
    device = torch.device(mesh.device_type)
    config = DistributedConfig(fsdp_size=mesh.size())
    with _as_local_rank(mesh):
        model = spec.load_weights(device, trained=trained, seed=seed, distributed_config=config)
    split = _in_parts(mesh)
    weights = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if isinstance(weight, DTensor):  # on a mesh of transformers' own
            local = cast(DTensor, weight.detach()).to_local()
            if local.untyped_storage().nbytes() > local.nbytes:  # of a file that is mapped whole
                local = local.clone()
            weights[name] = DTensor.from_local(
                local, mesh, [Shard(0)], shape=weight.shape, stride=weight.stride()
            )
        else:
            weights[name] = split(weight.detach())
    return Parts(weights, dict(model.named_buffers()))


@contextmanager
def _as_local_rank(mesh: DeviceMesh) -> Iterator[None]:
    """Within it transformers, which goes by LOCAL_RANK, takes the device that this process has.

    SLURM calls it otherwise, and `trainer.devices` may choose others than the first.
    """
    if mesh.device_type != "cuda":
        yield
        return
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    try:
        yield
    finally:
        os.environ.pop("LOCAL_RANK")
        if before is not None:
            os.environ["LOCAL_RANK"] = before


def _in_parts(mesh: DeviceMesh) -> Callable[[Tensor], DTensor]:
    """Splits a tensor that all processes have alike: each keeps a copy of its part."""

    def split(tensor: Tensor) -> DTensor:
        tensor = tensor.to(mesh.device_type)
        part = distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)
        return DTensor.from_local(
            part.to_local().clone(), mesh, [Shard(0)], shape=part.shape, stride=part.stride()
        )

    return split


def _hollow(spec: CausalLM, parts: Parts) -> PreTrainedModel:
    """The model with weights of the right shape, dtype and device that hold one number each.

    On the meta device PEFT would put the branch there, too, and draw nothing.
    """
    model = spec.meta()
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # tied weights stay one
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            if id(weight) not in made:
                part = parts.weights[f"{path}.{name}".lstrip(".")]
                number = torch.zeros((), dtype=part.dtype).expand(weight.shape)
                made[id(weight)] = weight, nn.Parameter(number, requires_grad=False)
            module._parameters[name] = made[id(weight)][1]
        for name in module._buffers:
            module._buffers[name] = parts.buffers[f"{path}.{name}".lstrip(".")]
    if spec.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.eval()


def _name_in_base(name: str) -> str:
    """What a student's weight is called in its base.

    Example:
        >>> _name_in_base("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
        'model.layers.0.mlp.up_proj.weight'
    """
    name = name.removeprefix("base_model.model.")
    for wrapper in (".base_layer.", ".original_module.", ".modules_to_save.default."):
        name = name.replace(wrapper, ".")
    return name


def _parts_of_base(student: nn.Module, parts: Parts) -> dict[str, DTensor]:
    """The parts by the names that the student has for them; its own weights move to meta."""
    state: dict[str, DTensor] = {}
    on_meta: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for path, module in student.named_modules():
        for name, weight in module._parameters.items():
            full_name = f"{path}.{name}".lstrip(".")
            part = parts.weights.get(_name_in_base(full_name))
            if weight is None:
                continue
            if id(weight) in on_meta:
                module._parameters[name] = on_meta[id(weight)][1]
            elif part is not None:
                # a trained copy, beside what it is a copy of
                own = part.clone() if ".modules_to_save." in full_name else part
                state[full_name] = cast(DTensor, own.to(weight.dtype))
                meta = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
                on_meta[id(weight)] = weight, meta
                module._parameters[name] = meta
    return state


@torch.no_grad()
def _set_magnitudes(student: nn.Module, parts: Parts, start: Start | None) -> None:
    """DoRA's magnitudes, which PEFT has computed of the hollow weights, one layer at a time."""
    for path, layer in student.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for adapter, magnitude in layer.lora_magnitude_vector.items():
            weight = parts.weights[_name_in_base(f"{path}.weight")].full_tensor()
            stub = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            stub.weight = nn.Parameter(weight.cpu(), requires_grad=False)
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            if start is not None:  # what it holds then is taken out of the base again
                up = torch.zeros_like(up)
            before = magnitude.weight
            magnitude.update_layer(
                base_layer=stub, lora_A=down, lora_B=up, scaling=layer.scaling[adapter]
            )
            magnitude.weight = nn.Parameter(magnitude.weight.to(before.dtype), before.requires_grad)


def _fully_shard(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    *,
    layer_dtype: torch.dtype | None = None,
    offload: OffloadPolicy | None = None,
    keep_backbone: bool,
) -> None:
    keys: dict[str, Any] = {"mesh": mesh, "offload_policy": offload or OffloadPolicy()}
    # Inputs stay as they are: what is added up from layer to layer is float32 under autocast.
    policy = MixedPrecisionPolicy(
        param_dtype=layer_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in decoder_layers(model):
        fully_shard(layer, reshard_after_forward=True, mp_policy=policy, **keys)
    # A tied head is the backbone's embedding, and there while the loss is computed.
    fully_shard(model.get_decoder(), reshard_after_forward=not keep_backbone, **keys)


def _fill(
    student: nn.Module, state: Mapping[str, Tensor], tied: list[nn.Module], mesh: DeviceMesh
) -> None:
    """Gives the student its parts; the head, which is no unit of FSDP's, is split here."""
    model: Any = inner(student)
    student.load_state_dict(dict(state), strict=False, assign=True)
    for module in tied:
        module.weight = model.get_input_embeddings().weight
    split = _in_parts(mesh)
    for module in model.get_output_embeddings().modules():
        for name, weight in module._parameters.items():
            if weight is not None and not isinstance(weight, DTensor):  # of a branch
                part = nn.Parameter(split(weight.detach()), weight.requires_grad)
                module._parameters[name] = part


def _tied(model: Any) -> list[nn.Module]:
    """The modules of the head whose weight is the embedding's, which FSDP will not find there."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weight = embedding.weight  # of the layer itself, where a branch is wrapped around it
    tied = [m for m in head.modules() if m._parameters.get("weight") is weight]
    model.head_is_embedding = head in tied
    return tied


def _finish(student: nn.Module, spec: CausalLM) -> None:
    model = inner(student)
    outside = [name for name, p in student.named_parameters() if not isinstance(p, DTensor)]
    if outside:
        raise ValueError(
            f"path={spec.path!r}: {len(outside)} weights lie outside backbone and head, such as "
            f"{outside[0]}, and cannot be split; use trainer=ddp"
        )
    missing = [name for name, p in student.named_parameters() if p.is_meta]
    assert not missing, missing
    check_head(model)
    reshard(model)
