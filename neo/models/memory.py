"""What a plan counts: bytes and multiplications of a step that is run on tensors without data.

Fake tensors (torch's `FakeTensorMode`) have shape, dtype and storage like real ones, and autograd
keeps of them what it would of real ones. So what a step holds is counted, and not computed by a
formula for each architecture: every storage is entered when an operator returns it, and struck out
when the last tensor on it is gone.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel

from neo.models.integer_weights import GROUP_SIZE

Part = str
Phase = str


def _product(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * input.numel() * weight.shape[0]


def _added_product(total: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)


# What torch's own table lacks: operators of the CPU, and products added in place.
FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.addmm_: _added_product,
    torch.ops.aten.baddbmm_: _added_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    FLOPS[torch.ops.mkldnn._linear_pointwise] = _product


class StepCounter(TorchDispatchMode):
    """Counts bytes by part and FLOPs by phase of what runs within it, inside a `FakeTensorMode`.

    A FLOP is a multiplication or an addition of a matrix product; attention counts whole, as if it
    were not causal. What a value decides that no tensor has here is decided by the arguments.

    Args:
        num_chosen: How many elements a boolean index chooses: the supervised tokens.
        number: What a tensor of one number is when it is asked for.

    Attributes:
        part: To which new tensors are counted.
        phase: To which the peak and the FLOPs are counted.
        peaks: For each phase, what was alive when it held most, in bytes by part.
        flops: By phase.
    """

    def __init__(self, num_chosen: int, number: float) -> None:
        super().__init__()
        self.num_chosen, self.number = num_chosen, number
        self.part: Part = "other"
        self.phase: Phase = "begin"
        self.live: dict[Part, int] = defaultdict(int)
        self.peaks: dict[Phase, dict[Part, int]] = {}
        self.flops: dict[Phase, int] = defaultdict(int)
        self._parts: dict[int, Part] = {}  # of every storage
        self._highest: dict[Phase, int] = defaultdict(int)
        self._total = 0

    @contextmanager
    def counting(self, part: Part, phase: Phase | None = None) -> Iterator[None]:
        """Within it new tensors belong to the part (and what happens to the phase)."""
        before = self.part, self.phase
        self.part, self.phase = part, phase or self.phase
        if phase is not None:
            self._look()
        try:
            yield
        finally:
            self.part, self.phase = before

    def move(self, tensor: Tensor, part: Part) -> None:
        """Counts a tensor's storage to another part, as when a result becomes a gradient."""
        key = tensor.untyped_storage()._cdata
        if (old := self._parts.get(key)) not in (None, part):
            size = tensor.untyped_storage().nbytes()
            self.live[old] -= size
            self.live[part] += size
            self._parts[key] = part

    def add(self, part: Part, num_bytes: int) -> None:
        """Counts bytes that no tensor here stands for; below 0 for those that are not there."""
        self.live[part] += num_bytes
        self._total += num_bytes

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.number
        mask = _boolean_index(func, args)
        if mask is None:
            out = func(*args, **kwargs)
        else:
            out = args[0].new_empty((self.num_chosen, *args[0].shape[mask.ndim :]))
        packet = func._overloadpacket
        if (own := FLOPS.get(packet)) is not None:
            self.flops[self.phase] += own(*args, **kwargs)
        elif (formula := flop_registry.get(packet)) is not None:
            self.flops[self.phase] += formula(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._enter(leaf.untyped_storage())
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._parts:
            return
        size = storage.nbytes()
        self._parts[key] = self.part
        self.live[self.part] += size
        self._total += size
        weakref.finalize(storage, self._strike_out, key, size)
        self._look()

    def _strike_out(self, key: int, size: int) -> None:
        part = self._parts.pop(key)
        self.live[part] -= size
        self._total -= size

    def _look(self) -> None:
        if self._total > self._highest[self.phase]:
            self._highest[self.phase] = self._total
            self.peaks[self.phase] = {part: size for part, size in self.live.items() if size}


def _boolean_index(func: Any, args: tuple[Any, ...]) -> Tensor | None:
    """The one boolean mask that an operator indexes its argument with, where it does so."""
    if func is not torch.ops.aten.index.Tensor:
        return None
    given = [index for index in args[1] if index is not None]
    masked = len(given) == 1 and given[0].dtype == torch.bool and args[1][0] is given[0]
    return given[0] if masked else None


def weight_dtype(name: str, weight: Tensor, frozen: torch.dtype) -> torch.dtype:
    """The dtype in which a run holds a weight: float32 what is trained and all of a branch.

    Args:
        name: In the student; of a teacher's weights it does not matter.
        weight: As it is on the meta device.
        frozen: The dtype of the base.
    """
    if not weight.is_floating_point():
        return weight.dtype
    in_branch = any(part.startswith("lora_") for part in name.split("."))
    return torch.float32 if weight.requires_grad or in_branch else frozen


def weight_bytes(model: nn.Module, frozen: torch.dtype) -> dict[str, int]:
    """Bytes of a model's weights by name, tied ones once, as a run holds them.

    Args:
        model: On the meta device.
        frozen: The dtype of its base.
    """
    return {
        name: weight.numel() * weight_dtype(name, weight, frozen).itemsize
        for name, weight in model.named_parameters()
    }


def quantized_bytes(kind: str, weight: Tensor, group_size: int = GROUP_SIZE) -> int:
    """Bytes that a quantised weight takes with the constants of its blocks.

    bitsandbytes (nf4, fp4): 4 bits, an absolute maximum in 8 bits for 64 weights, and one in 32
    bits for 256 of those (Dettmers et al. 2023, arXiv:2305.14314, section 3). As torchao stores
    them, int8: a float32 scale and a zero in 8 bits a row; int4: a scale and a zero in 16 bits for
    each group of a row.

    Example:
        >>> quantized_bytes("nf4", torch.empty(256, 64, device="meta"))  # 8192 + 256 + 4
        8452
    """
    num = weight.numel()
    if kind in ("nf4", "fp4"):
        return num // 2 + num // 64 + 4 * -(-num // (64 * 256))
    return num + 5 * len(weight) if kind == "int8" else num // 2 + 4 * -(-num // group_size)


def quantized_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that quantization makes small, by name: of linear layers, but for the head.

    A branch's own layers are none of them, and neither is what the head is tied to.
    """
    head = getattr(model.get_output_embeddings(), "weight", None)
    branch = {
        id(part)
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for part in layer.modules()
        if part is not layer.get_base_layer()
    }
    return {
        f"{path}.weight": module.weight
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and id(module) not in branch
        and module.weight is not head
        and not module.weight.requires_grad
    }


def make_fake(model: nn.Module, dtype_of: Callable[[str, nn.Parameter], torch.dtype]) -> None:
    """Puts fake tensors in the place of a meta model's weights and buffers; tied ones stay tied.

    Call it within a `FakeTensorMode`.

    Args:
        model: On the meta device.
        dtype_of: Of a weight, given its name.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old one is kept, or its id would be another's
    for path, module in model.named_modules():
        for kind in (module._parameters, module._buffers):
            for name, old in kind.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new: Tensor
                    if isinstance(old, nn.Parameter):
                        dtype = dtype_of(f"{path}.{name}".lstrip("."), old)
                        data = torch.empty(old.shape, dtype=dtype)
                        new = nn.Parameter(data, requires_grad=old.requires_grad)
                    else:
                        new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = old, new
                kind[name] = made[id(old)][1]
