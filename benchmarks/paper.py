"""Plans of Llama-3.1-8B distilled into Llama-3.2-1B, for `experiments/plan/`; nothing is loaded.

`python benchmarks/plan.py --paper` renders them. The two architectures are made here of their
numbers; the ids that they share are all of the vocabulary.
"""

import csv
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig
from workload import _tokenizer

from neo.losses.distillation import Distillation
from neo.models.causal_lm import CausalLM
from neo.models.variants import lora, none
from neo.teachers.online import OnlineTeacher
from neo.training.device_plan import GIB, Placement, Plan, placed
from neo.training.optim import AdamW
from neo.training.step_cost import StepCost, Workload, count_step

VOCAB = 128_256
ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
SHARED: dict[str, Any] = {
    "vocab_size": VOCAB, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
    "bos_token_id": 128_000, "eos_token_id": 128_001,
}  # fmt: skip
LLAMAS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "tie_word_embeddings": True, "rope_parameters": ROPE | {"factor": 32.0},
    },
    "Llama-3.1-8B": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "head_dim": 128,
        "tie_word_embeddings": False, "rope_parameters": ROPE | {"factor": 8.0},
    },
}  # fmt: skip
NUM_PARAMETERS = {"Llama-3.2-1B": 1_235_814_400, "Llama-3.1-8B": 8_030_261_248}
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


def llama(name: str, folder: Path) -> Path:
    """A folder with the architecture and no weights."""
    LlamaConfig(**SHARED | LLAMAS[name]).save_pretrained(folder / name)
    _tokenizer().save_pretrained(folder / name)  # never asked: the vocabulary is given
    return folder / name


def counted(variant: int | None, *, checkpointing: bool, fsdp: bool, folder: Path) -> StepCost:
    """A step of the pair in bf16, all tokens supervised.

    Raises:
        ValueError: The models do not have the numbers of parameters that they are known by.
    """
    import torch

    paths = {name: str(llama(name, folder)) for name in LLAMAS}
    student = CausalLM(
        path=paths["Llama-3.2-1B"], random_init=True, activation_checkpointing=checkpointing
    )
    teacher = OnlineTeacher(path=paths["Llama-3.1-8B"], random_init=True)
    for spec, name in ((student, "Llama-3.2-1B"), (teacher, "Llama-3.1-8B")):
        num = sum(p.numel() for p in spec.meta().parameters())
        if num != NUM_PARAMETERS[name]:
            raise ValueError(f"{name} has {num:,} parameters, not {NUM_PARAMETERS[name]:,}")
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
    with tempfile.TemporaryDirectory() as name:
        for student, variant in STUDENTS.items():
            for checkpointing in (False, True):
                keys: dict[str, Any] = {"checkpointing": checkpointing, "folder": Path(name)}
                whole = counted(variant, fsdp=False, **keys)
                split = counted(variant, fsdp=True, **keys) if variant is None else whole
                for num in NUM_DEVICES:
                    for placement in placements(num):
                        cost = split if placement.fsdp else whole
                        plan = placed(cost, placement, WORKLOAD)
                        yield PaperRow(student, checkpointing, plan)


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
        f"Llama-3.1-8B ({NUM_PARAMETERS['Llama-3.1-8B']:,} parameters) into Llama-3.2-1B "
        f"({NUM_PARAMETERS['Llama-3.2-1B']:,}), bf16-mixed; each device {BATCH_SIZE} sequences of "
        f"{LENGTH:,} tokens a step, all supervised. GiB of one device when it is fullest; "
        "all-gather, reduce-scatter and all-reduce are GiB of whole tensors.",
        "",
        *("| " + " | ".join(line) + " |" for line in [COLUMNS, ["---"] * len(COLUMNS), *lines]),
        "",
        "Rendered by `python benchmarks/plan.py --paper`.",
    ]
    (folder / "table.md").write_text("\n".join(text) + "\n")
