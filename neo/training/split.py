"""A student that is split over the processes of a run, and the whole one that it ends as."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from neo.models.sharding import is_sharded, sharded_student
from neo.models.start import is_computed, start_of
from neo.models.student import build_student, inner
from neo.training.attaching import attached_here

if TYPE_CHECKING:
    from neo.training.module import NeoModule


def split_student(module: "NeoModule") -> nn.Module:
    """The module's student, split over the processes; a start is computed by the first of them.

    For that it holds the base whole, in its own dtype, and the teacher, too, where the start is one
    of the loss; both go before the parts are loaded.
    """
    student, _, lora = module.specs
    strategy: Any = module.trainer.strategy
    start = module.start
    if is_computed(lora.adapter) and start is None:
        if module.trainer.is_global_zero:
            base = student.load(strategy.root_device, trained=False, seed=module.seed)
            base.to(strategy.root_device)
            start = start_of(attached_here(module, base, lora, strategy.root_device))
            del base
        start = strategy.broadcast(start)
    mixed = module.trainer.precision == "bf16-mixed" and lora.adapter is None
    return sharded_student(
        student,
        lora,
        strategy.mesh,
        module.seed,
        start,
        compute_dtype=torch.bfloat16 if mixed else None,
    )


def whole_student(module: "NeoModule") -> nn.Module | None:
    """The trained student in the first process, None in the others; all of them must call.

    One that is split is put together again around the base, whole in its own dtype on the CPU.
    """
    strategy: Any = module.trainer.strategy
    if not is_sharded(inner(module.student)):
        return module.student if strategy.is_global_zero else None
    state = strategy.lightning_module_state_dict()
    if not strategy.is_global_zero:
        return None
    student, _, lora = module.specs
    whole = build_student(
        student, lora, strategy.root_device, module.seed, start_of(module.student)
    )
    whole.load_state_dict(
        {name.removeprefix("student."): value for name, value in state.items()}, strict=False
    )
    return whole
