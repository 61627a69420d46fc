"""Plans of Llama-3.1-8B distilled into Llama-3.2-1B, for `experiments/plan/`; nothing is loaded.

`python benchmarks/plan.py --paper` renders them. The ids that the two models share are all of the
vocabulary.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from neo.losses.distillation import Distillation
from neo.models.architectures import ARCHITECTURES
from neo.models.variants import lora, none
from neo.training.device_plan import GIB, Placement, Plan, placed
from neo.training.offline import OfflineStudent, OfflineTeacher
from neo.training.optim import AdamW
from neo.training.step_cost import StepCost, count_step
from neo.training.workload import Workload

STUDENT, TEACHER = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B"
VOCAB = ARCHITECTURES[STUDENT].keys["vocab_size"]
LENGTH, BATCH_SIZE, ACCUMULATE = 2048, 4, 1
NUM_DEVICES = (1, 8, 64)
STUDENTS = {"lora r=64": 64, "lora r=128": 128, "none": None}
COLUMNS = [
    "devices", "strategy", "student", "weights", "teacher", "adapter", "gradients", "optimizer",
    "activations", "loss chunk", "buffers", "total GiB", "fullest in", "TFLOP a step",
    "GFLOP a token", "all-gather", "reduce-scatter", "all-reduce", "sent GiB a step",
]  # fmt: skip


@dataclass(frozen=True)
class PaperRow:
    """One plan of the table."""

    student: str
    checkpointing: bool
    plan: Plan


def counted(variant: int | None, *, checkpointing: bool, fsdp: bool) -> StepCost:
    """A step of the pair in bf16, all tokens supervised.

    Raises:
        ValueError: The models do not have the numbers of parameters that they are known by.
    """
    import torch

    student = OfflineStudent(path=STUDENT, activation_checkpointing=checkpointing)
    teacher = OfflineTeacher(path=TEACHER)
    for spec in (student, teacher):
        num = sum(p.numel() for p in spec.meta().parameters())
        if num != (known := ARCHITECTURES[str(spec.path)].num_parameters):
            raise ValueError(f"{spec.path} has {num:,} parameters, not {known:,}")
    branch = none() if variant is None else lora(r=variant, target_modules="all-linear")
    specs = {
        "student": student,
        "teacher": teacher,
        "lora": branch,
        "loss": Distillation(),
        "optim": AdamW(lr=2e-4),
    }
    return count_step(
        specs,
        WORKLOAD,
        device_type="cuda",
        precision="bf16-mixed",
        clip=1.0,
        gathered=torch.bfloat16 if fsdp and variant is None else torch.float32,
    )


WORKLOAD = Workload(
    batch_size=BATCH_SIZE,
    length=LENGTH,
    num_supervised=BATCH_SIZE * LENGTH,
    packing=False,
    vocab=VOCAB,
    accumulate=ACCUMULATE,
)


def paper_rows() -> Iterator[PaperRow]:
    """Every plan of the table."""
    for student, variant in STUDENTS.items():
        for checkpointing in (False, True):
            whole = counted(variant, checkpointing=checkpointing, fsdp=False)
            split = whole
            if variant is None:
                split = counted(variant, checkpointing=checkpointing, fsdp=True)
            for num in NUM_DEVICES:
                for placement in placements(num):
                    cost = split if placement.fsdp else whole
                    yield PaperRow(student, checkpointing, placed(cost, placement, WORKLOAD))


def placements(num: int) -> list[Placement]:
    """The ways to lay the pair out on so many devices."""
    alone = Placement("cuda", num)
    if num == 1:
        return [alone]
    return [
        alone,
        replace(alone, sharded_teacher=True),
        replace(alone, fsdp=True, sharded_teacher=True),
    ]


def cells(row: PaperRow) -> list[str]:
    """A line of the table."""
    plan, parts = row.plan, row.plan.parts
    step = plan.traffic.step

    def gib(*names: str) -> str:
        return f"{sum(parts.get(name, 0) for name in names) / GIB:.2f}"

    def wire(size: int) -> str:
        return f"{size / GIB:.3f}" if size and plan.placement.num_processes > 1 else ""

    return [
        str(plan.placement.num_processes),
        plan.placement.name,
        row.student + (", checkpointing" if row.checkpointing else ""),
        gib("student"),
        gib("teacher"),
        gib("adapter"),
        gib("gradients", "backward"),
        gib("optimizer", "temporaries"),
        gib("activations", "teacher activations"),
        gib("loss chunk"),
        gib("gathered units", "reduction buffers", "batch"),
        f"{plan.gib:.2f}",
        plan.fullest,
        f"{plan.flops_per_step / 1e12:,.1f}",
        f"{plan.model_flops_per_token / 1e9:,.2f}",
        wire(step.all_gather),
        wire(step.reduce_scatter),
        wire(step.all_reduce),
        wire(step.moved),
    ]


def write_paper(folder: Path) -> None:
    """Writes `table.md` and `table.csv` into the folder."""
    lines = [cells(row) for row in paper_rows()]
    lines.sort(key=lambda line: int(line[0]))  # stable: as they come within a number of devices
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *lines])
    text = [
        f"Llama-3.1-8B ({ARCHITECTURES[TEACHER].num_parameters:,} parameters) into Llama-3.2-1B "
        f"({ARCHITECTURES[STUDENT].num_parameters:,}), bf16-mixed; each device {BATCH_SIZE} "
        f"sequences of {LENGTH:,} tokens a step, all supervised. GiB of one device when it is "
        "fullest; all-gather, reduce-scatter and all-reduce are GiB of whole tensors.",
        "",
        *("| " + " | ".join(line) + " |" for line in [COLUMNS, ["---"] * len(COLUMNS), *lines]),
        "",
        "Rendered by `python benchmarks/plan.py --paper`.",
    ]
    (folder / "table.md").write_text("\n".join(text) + "\n")
