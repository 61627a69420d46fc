"""How several processes train one run: DDP, FSDP2, and DDP beside a teacher that is split.

Lightning's strategies, less what they would do to weights that do not train: a checkpoint is one
small file whatever the number of processes, and frozen weights are neither sent nor reduced.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

# What a config may call a strategy; `auto` is one process, or DDP.
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp")
SHARDINGS = (None, "teacher")


def build_strategy(name: str, num_processes: int, sharding: str | None = None) -> Strategy | str:
    """Lightning's strategy, or its name where one process trains as if there were no others."""
    if name == "fsdp":
        return FSDP()
    if name == "auto" and num_processes == 1:
        return "auto"
    return DDP(split_teacher=sharding == "teacher", find_unused_parameters=name.endswith("_true"))


class DDP(DDPStrategy):
    """Every process holds the student; the gradients of what trains are averaged, once per step.

    Args:
        split_teacher: Each process holds a part of the teacher, which is gathered layer by layer.
        find_unused_parameters: For students of which a batch may leave parts unused.
    """

    def __init__(self, *, split_teacher: bool, find_unused_parameters: bool = False) -> None:
        super().__init__(
            find_unused_parameters=find_unused_parameters,
            gradient_as_bucket_view=True,
            forward_sync_buffers=False,
        )
        self.split_student, self.split_teacher = False, split_teacher
        self._mesh: DeviceMesh | None = None

    @property
    def mesh(self) -> DeviceMesh:
        """Of all processes, in one dimension."""
        if self._mesh is None:
            self._mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        return self._mesh

    def setup(self, trainer: L.Trainer) -> None:
        """Leaves out of DDP what does not train: each process has read it from the same file."""
        module = cast(nn.Module, self.lightning_module)
        frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
        frozen += [name for name, _ in module.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
        super().setup(trainer)


class FSDP(ModelParallelStrategy):
    """FSDP2: each process holds a part of every weight of student, branch and teacher.

    The module splits its models itself (`neo.models.sharding`). Checkpoints are gathered tensor by
    tensor into one file, which any other strategy goes on from.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)
        self.split_student = self.split_teacher = True

    @property
    def mesh(self) -> DeviceMesh:
        """Of all processes, in one dimension."""
        return self.device_mesh["data_parallel"]

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands us the optimizer's state, as it does for one device."""
        return True

    def setup_environment(self) -> None:
        """All processes share the data, none the products."""
        self._data_parallel_size, self._tensor_parallel_size = self.world_size_planned, 1
        super().setup_environment()

    @property
    def world_size_planned(self) -> int:
        """How many processes there will be."""
        return self.num_nodes * self.num_processes

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Within it gradients of a branch stay where they are; those of all weights are too many.

        Lightning enters it for all micro-batches of a step but the last.
        """
        units = [m for m in cast(nn.Module, self.model).modules() if isinstance(m, FSDPModule)]
        few = any(not p.requires_grad for p in cast(Any, self.model).student.parameters())
        for unit in units if few else []:
            unit.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for unit in units if few else []:
                unit.set_requires_gradient_sync(True, recurse=False)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained weights, whole, in the first process; elsewhere nothing."""
        assert self.lightning_module is not None
        return self._gathered(self.lightning_module.state_dict())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Gives each process its part of the checkpoint's weights."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {
            name: like(value, own[name]) if name in own else value
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, whole, in the first process."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        return self._gathered(optimizer.state_dict())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Gives each process its part of the optimizers' states."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            parts = {
                number: {
                    key: like(value, weights[number])
                    if isinstance(value, Tensor) and value.shape == weights[number].shape
                    else value
                    for key, value in moments.items()
                }
                for number, moments in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": parts})

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The file, mapped: of each tensor a process reads its part, when that is taken."""
        return torch.load(
            checkpoint_path, map_location="cpu", mmap=True, weights_only=weights_only is not False
        )

    def _gathered(self, tree: Any) -> Any:
        """The tree with whole tensors on the CPU; all processes must call, the first keeps them."""
        if isinstance(tree, Mapping):
            found = {key: self._gathered(value) for key, value in tree.items()}
            return {k: v for k, v in found.items() if v is not _ELSEWHERE}
        if isinstance(tree, list):
            return [self._gathered(value) for value in tree]
        if not isinstance(tree, DTensor):
            return tree
        whole = tree.full_tensor()
        return whole.cpu() if self.is_global_zero else _ELSEWHERE


_ELSEWHERE = object()


def like(whole: Tensor, own: Tensor) -> Tensor:
    """The part of a whole tensor that lies here, where `own` is split; else the tensor itself."""
    if not isinstance(own, DTensor):
        return whole
    whole = whole.to(own.device)
    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which is the tensor itself where nothing is split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
