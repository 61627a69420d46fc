"""The plan of a run: memory of a device by part, FLOPs and traffic of a step.

Not counted: what the driver and the libraries take (half a GiB or so on a GPU), and memory that an
allocator holds without using it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from neo.models.traffic import (
    StepTraffic,
    Units,
    ddp_traffic,
    fsdp_traffic,
    sharded_teacher_traffic,
)
from neo.training.devices import num_processes, on_gpu
from neo.training.step_cost import AUTOCAST, StepCost, count_step
from neo.training.workload import Workload

GIB = 2**30
BACKWARD = ("backward", "recomputation")
# What comes to the parts of `step_cost` with several devices.
GATHERED, BUCKETS = "gathered units", "reduction buffers"


@dataclass(frozen=True)
class Placement:
    """Where a run's models lie.

    Args:
        device_type: cpu or cuda.
        num_processes: One for each device.
        fsdp: Student and teacher are split over all processes.
        sharded_teacher: The teacher is, under either strategy.
        offload: The teacher's parts stay in the CPU's memory.
        teacher_elsewhere: Its backbone has a device of its own, and only its head lies here.
    """

    device_type: str
    num_processes: int = 1
    fsdp: bool = False
    sharded_teacher: bool = False
    offload: bool = False
    teacher_elsewhere: bool = False

    @property
    def name(self) -> str:
        """As in the command line."""
        if self.fsdp:
            return "fsdp"
        if self.sharded_teacher:
            return "ddp sharding=teacher"
        return "ddp" if self.num_processes > 1 else "one device"


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Args:
        placement: Of its models.
        workload: Of each process.
        phases: Bytes by part on one device, for each phase of a step.
        flops: By phase, of one device in one optimizer step.
        model_flops: The same in all, without what is computed twice to save memory.
        traffic: Between the devices.
    """

    placement: Placement
    workload: Workload
    phases: dict[str, dict[str, int]]
    flops: dict[str, int]
    model_flops: int
    traffic: StepTraffic

    @property
    def fullest(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part on one device, at the fullest moment."""
        return self.phases[self.fullest]

    @property
    def most(self) -> dict[str, int]:
        """Bytes by part on one device, each when it has most."""
        names = dict.fromkeys(part for parts in self.phases.values() for part in parts)
        return {n: max(parts.get(n, 0) for parts in self.phases.values()) for n in names}

    @property
    def num_bytes(self) -> int:
        """The largest memory of one device."""
        return sum(self.parts.values())

    @property
    def gib(self) -> float:
        """The same in GiB."""
        return self.num_bytes / GIB

    @property
    def flops_per_step(self) -> int:
        """Of one device."""
        return sum(self.flops.values())

    @property
    def model_flops_per_token(self) -> float:
        """Of every token, supervised or not."""
        return self.model_flops / (self.workload.num_tokens * self.workload.accumulate)


def placement_of(config: Mapping[str, Any], specs: Mapping[str, Any]) -> Placement:
    """Where the models of a run's config lie, be the devices here or not."""
    trainer = config["trainer"]
    fsdp = "fsdp" in str(trainer.get("strategy", "auto"))
    teacher = specs.get("teacher")
    return Placement(
        device_type="cuda" if on_gpu(trainer) else "cpu",
        num_processes=num_processes(trainer),
        fsdp=fsdp,
        sharded_teacher=teacher is not None and (fsdp or config.get("sharding") == "teacher"),
        offload=bool(getattr(teacher, "offload", False)),
        teacher_elsewhere=getattr(teacher, "device", None) is not None,
    )


def make_plan(
    specs: Mapping[str, Any], trainer: Mapping[str, Any], workload: Workload, placement: Placement
) -> Plan:
    """The plan of a run.

    Args:
        specs: Student, teacher (or None), lora, loss and optim.
        trainer: The config's node.
        workload: Of each process.
        placement: Of the models.
    """
    precision = str(trainer.get("precision") or "32-true")
    gathered = torch.float32
    if placement.fsdp and specs["lora"].adapter is None:  # else in the dtype they are kept in
        gathered = AUTOCAST.get(precision, torch.float32)
    cost = count_step(
        specs,
        workload,
        device_type=placement.device_type,
        precision=precision,
        clip=trainer.get("gradient_clip_val"),
        gathered=gathered,
    )
    return placed(cost, placement, workload)


def placed(cost: StepCost, placement: Placement, workload: Workload) -> Plan:
    """The plan of a step that was counted on one device, on as many as there are."""
    phases = {
        phase: _on_device(phase, parts, cost, placement, workload)
        for phase, parts in cost.peaks.items()
    }
    times = workload.accumulate
    return Plan(
        placement=placement,
        workload=workload,
        phases={
            phase: {part: size for part, size in parts.items() if size}
            for phase, parts in phases.items()
        },
        flops={phase: flops * times for phase, flops in cost.flops.items()},
        model_flops=cost.model_flops * times,
        traffic=_traffic(cost, placement, times),
    )


def _on_device(
    phase: str, parts: dict[str, int], cost: StepCost, placement: Placement, workload: Workload
) -> dict[str, int]:
    """Bytes by part on one device in a phase."""
    parts, num = dict(parts), placement.num_processes
    gathered = 0
    if placement.sharded_teacher and cost.teacher is not None:
        parts["teacher"] = 0 if placement.offload else _share(parts.get("teacher", 0), num)
        gathered += _teacher_gathered(phase, cost.teacher)
    if placement.teacher_elsewhere and cost.teacher is not None:
        head = cost.teacher.head if cost.teacher.head is not None else cost.teacher.backbone
        parts["teacher"] = head.gathered()
        parts.pop("teacher activations", None)
    if placement.fsdp:
        gathered += _student_gathered(phase, cost.student)
        _shard_student(phase, parts, cost, num, workload)
    elif num > 1:
        # They lie in the buckets that DDP reduces, which it never gives back.
        parts["gradients"] = cost.student.gradient()
    if gathered:
        parts[GATHERED] = gathered
    return parts


def _shard_student(
    phase: str, parts: dict[str, int], cost: StepCost, num: int, workload: Workload
) -> None:
    """Leaves a process its part of the student, its gradients and its moments."""
    for part in ("student", "adapter", "gradients", "optimizer", "temporaries"):
        whole = part == "gradients" and workload.accumulate > 1 and _reduces_once(cost.student)
        if part in parts and not whole:
            parts[part] = _share(parts[part] * cost.kept_over_gathered, num)
    if phase in BACKWARD:  # a layer's gradients, and the buffer they are reduced from
        parts[BUCKETS] = 2 * cost.student.largest_layer_gradient


def _share(num_bytes: int, num_processes: int) -> int:
    return -(-num_bytes // num_processes)


def _reduces_once(student: Units) -> bool:
    """Whether gradients stay whole until the last micro-batch, as those of a branch do."""
    return any(not w.trained for unit in student.all for w in unit.weights)


def _student_gathered(phase: str, student: Units) -> int:
    """Bytes of the student's units that are whole in a phase; the next layer's among them."""
    if phase == "optimizer step":
        return 0
    layers = 2 * student.largest_layer if phase in ("student forward", *BACKWARD) else 0
    head = student.head.gathered() if phase == "loss" and student.head is not None else 0
    return student.backbone.gathered() + layers + head


def _teacher_gathered(phase: str, teacher: Units) -> int:
    if phase == "teacher forward":
        return teacher.backbone.gathered() + 2 * teacher.largest_layer
    if phase == "loss":
        head = teacher.head if teacher.head is not None else teacher.backbone
        return head.gathered()
    return 0


def _traffic(cost: StepCost, placement: Placement, accumulate: int) -> StepTraffic:
    student, num = cost.student, placement.num_processes
    teacher = cost.teacher if "teacher forward" in cost.peaks else None
    if placement.fsdp:
        once = _reduces_once(student)
        return fsdp_traffic(student, teacher, num, accumulate, reduces_once=once)
    if placement.sharded_teacher:
        return sharded_teacher_traffic(student, teacher, num, accumulate)
    return ddp_traffic(student, num, accumulate)
