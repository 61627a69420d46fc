"""Time of an optimizer step under every LoRA variant, as a multiple of plain LoRA's.

A step is what training does: rows, the student's and the teacher's forward pass, the fused loss,
backward, clipping, AdamW. All variants of `conf/lora` train at one rank on the same rows. They take
turns in one process, so that drift hits all alike. LoRA has two turns in a round, with whose mean a
variant is compared. Results go to `benchmarks/results/variants.{json,md}`.

Usage: python benchmarks/variants.py [--rounds 9] [--rows 6] [--threads N]
"""

import argparse
import json
import logging
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from peft.tuners.lora.layer import LoraLayer
from rich.console import Console
from step import RESULTS, R
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from workload import MAX_LENGTH, STUDENT, TEACHER, VOCAB, write_workload

from neo.config import build, conf_dir, resolve
from neo.data.packing import Batch, RowReport, collate, pack
from neo.data.prompt import PromptEncoder
from neo.models.causal_lm import CausalLM
from neo.models.hidden import hidden_states
from neo.models.student import inner, trained_parameters
from neo.models.variants import Variant
from neo.teachers.online import FrozenTeacher, OnlineTeacher
from neo.train import compose
from neo.training.frozen_linear import speed_up_frozen
from neo.training.module import NeoModule

CPU = torch.device("cpu")
AGAIN = "lora again"
LEFT_OUT = {
    "none": "has no branch",
    "lora_r16": "is lora at the rank that all have here",
    "qlora": "needs a GPU",
}
# Linear layers and heads as torch calls them; attention's products are other operators.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=6, help="of a step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="variants", help="of the two files of results")
    arguments = parser.parse_args()
    if arguments.rounds < 2 or arguments.rows < 1:
        parser.error("--rounds must be at least 2, for a spread, and --rows at least 1")
    torch.set_num_threads(arguments.threads)
    _quiet()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_workload(folder, arguments.rows)
        rows = Rows(folder)
        teacher = OnlineTeacher(path=str(folder / "teacher")).load_frozen(CPU)
        speed_up_frozen(teacher.model.get_decoder())
        sides = {variant: Side(variant, folder, teacher) for variant in variants()}
        sides[AGAIN] = sides["lora"]
    seconds = alternate(sides, rows, arguments.rounds)
    report = summarise(sides, seconds, rows, arguments)
    Console(width=160).print(as_markdown(report), markup=False)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / f"{arguments.name}.md").write_text(as_markdown(report))


def variants() -> list[str]:
    """The files of conf/lora that are compared, `lora` first."""
    names = {file.stem for file in (conf_dir() / "lora").glob("*.yaml")} - LEFT_OUT.keys()
    return sorted(names, key=lambda name: (name != "lora", name))


class Rows:
    """The rows of a step, read anew for each: `batch()` is what a student is given."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "student")
        self.encoder = PromptEncoder(self.tokenizer, MAX_LENGTH)
        self.lines = (folder / "rows.jsonl").read_text().splitlines()

    def batch(self) -> Batch:
        """All rows, encoded and packed."""
        examples = [self.encoder.encode(json.loads(line)["messages"]) for line in self.lines]
        packed = list(pack(examples, MAX_LENGTH))
        return collate(packed, self.tokenizer.pad_token_id, True, RowReport())


class Side:
    """A student with one variant's branch, its optimizer, and the steps that it takes.

    Args:
        name: A file of conf/lora; its keys are taken as they are, at the benchmark's rank.
        folder: Where the workload lies.
        teacher: Shared by all sides.
    """

    def __init__(self, name: str, folder: Path, teacher: FrozenTeacher) -> None:
        config = composed(name)
        variant: Variant = build(config["lora"])
        assert variant.adapter is not None
        self.start = str(variant.adapter.init_lora_weights)
        self.from_rows = variant.calibration_rows > 0
        if self.from_rows:  # its start costs time before the first step, which is then LoRA's
            variant = build(composed("lora")["lora"])
        self.clip, self.optim = config["trainer"]["gradient_clip_val"], build(config["optim"])
        self.module = NeoModule(
            CausalLM(path=str(folder / "student")),
            None,
            variant,
            build(config["loss"]),
            self.optim,
            vocab=VOCAB,
        )
        self.module.configure_model()
        self.module.teacher = teacher
        self.trained = list(trained_parameters(self.module.student).values())
        self.optimizer = self.optim.build(trained_parameters(self.module.student))
        self.backbone = inner(self.module.student).get_decoder()
        self.clock = [0.0, 0.0]  # the backbone's last forward pass: when it began and ended
        self.backbone.register_forward_pre_hook(lambda *_: self._note(0))
        self.backbone.register_forward_hook(lambda *_: self._note(1))

    def _note(self, which: int) -> None:
        self.clock[which] = time.perf_counter()

    def step(self, rows: Rows) -> dict[str, float]:
        """Takes a step; seconds of all of it, and of the student's part alone.

        That part is the backbone's forward and backward pass, clipping and the optimizer: all that
        a variant has a hand in.
        """
        began = time.perf_counter()
        sums = self.module.token_sums(rows.batch(), with_teacher=True)
        before = time.perf_counter()
        sums.loss.backward()
        self.update(sums.tokens)
        ended = time.perf_counter()
        return {"step": ended - began, "student": ended - before + self.clock[1] - self.clock[0]}

    def update(self, tokens: Tensor) -> None:
        """Clips the mean gradient and lets the optimizer move the weights."""
        gradients = [p.grad for p in self.trained if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / tokens)
        if (penalty := self.module.specs[2].penalty) is not None:
            self.module._add_gradient(penalty(self.module.student))
        nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optim.set_rates(self.optimizer, 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def student_part(self, batch: Batch) -> None:
        """The student's part of a step without the rest, for the profiler."""
        hidden = hidden_states(inner(self.module.student), batch.input_ids, batch.position_ids)
        hidden.sum().backward()
        self.update(torch.tensor(batch.num_supervised))


def composed(name: str) -> dict[str, Any]:
    """The config of `neo-train lora=NAME` on a CPU, at the benchmark's rank."""
    return resolve(compose(f"lora={name}", f"lora.r={R}", "trainer=cpu"))


def alternate(sides: dict[str, Side], rows: Rows, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every step; the first round warms up and does not count.

    Each round has an order of its own, so that no variant always follows the same one.
    """
    seconds: dict[str, dict[str, list[float]]] = {n: {"step": [], "student": []} for n in sides}
    for number in range(rounds + 1):
        for name in random.Random(number).sample(list(sides), len(sides)):
            for part, value in sides[name].step(rows).items():
                if number:
                    seconds[name][part].append(value)
    return seconds


def least(layer: Any, tokens: int, input_gradient: bool) -> int:
    """Multiplications of a linear layer and its branch in a step, as the equations have them.

    Args:
        layer: PEFT's, of which the base is frozen.
        tokens: Padding included.
        input_gradient: Whether the layer's input needs a gradient; the first layer's does not.
    """
    ((adapter, down),) = layer.lora_A.items()
    d_in, d_out, r = layer.in_features, layer.out_features, layer.r[adapter]
    trains_a = down.weight.requires_grad
    passed_on = input_gradient or trains_a  # does anything before B need a gradient?
    base = (1 + input_gradient) * tokens * d_in * d_out
    branch = (1 + trains_a + input_gradient) * tokens * d_in * r
    branch += (2 + passed_on) * tokens * r * d_out
    if adapter in getattr(layer, "lora_mixer", {}):
        branch += (2 + passed_on) * tokens * r * r
    if adapter in layer.lora_magnitude_vector:
        branch += r * d_in * d_out  # B A, for the norms of the rows of W + s B A
    return base + branch


def least_of_student(side: Side, batch: Batch) -> int:
    """Multiplications of all its linear layers in a step."""
    total = 0

    def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal total
        (x,) = inputs
        total += least(layer, x.shape[:-1].numel(), x.requires_grad)

    layers = [layer for layer in side.backbone.modules() if isinstance(layer, LoraLayer)]
    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    hidden_states(inner(side.module.student), batch.input_ids, batch.position_ids)
    for hook in hooks:
        hook.remove()
    return total


def least_of_rest(teacher: nn.Module, batch: Batch) -> int:
    """Multiplications of the teacher's linear layers, and of both heads on supervised tokens."""
    weights = (m.weight.numel() for m in teacher.modules() if isinstance(m, nn.Linear))
    heads = VOCAB * (2 * STUDENT[0] + TEACHER[0]) * batch.num_supervised
    return sum(weights) * batch.input_ids.numel() + heads


def multiplied(function: Callable[[], Any]) -> int:
    """Multiplications in products of matrices that a call really makes, attention left out."""

    def onednn(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * a[:-1].numel() * b.numel()

    operator = torch.ops.mkldnn._linear_pointwise
    counter = FlopCounterMode(display=False, custom_mapping={operator: onednn})
    with counter:
        function()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm, operator)) // 2


def product_share(function: Callable[[], Any]) -> float:
    """The share of a call's time that its products of matrices take, attention left out.

    The median of three calls.
    """
    shares = []
    for _ in range(3):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            function()
        times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
        shares.append(sum(times.get(name, 0.0) for name in PRODUCTS) / sum(times.values()))
    return statistics.median(shares)


def summarise(
    sides: dict[str, Side],
    seconds: dict[str, dict[str, list[float]]],
    rows: Rows,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Everything that is written down.

    Raises:
        SystemExit: A step multiplies less than was counted as the least; the count is wrong.
    """
    batch, lora = rows.batch(), sides["lora"]
    assert lora.module.teacher is not None
    rest = least_of_rest(lora.module.teacher.model.get_decoder(), batch)
    least_lora = least_of_student(lora, batch)
    done_lora = multiplied(partial(lora.step, rows)) - rest
    found = {}
    for name, side in sides.items():
        at_best = least_of_student(side, batch)
        done = multiplied(partial(side.step, rows)) - rest
        if done < at_best:
            raise SystemExit(f"{name}: multiplies {done} times, fewer than {at_best}, the least")
        found[name] = {
            part: ratios(seconds[name][part], seconds["lora"][part], seconds[AGAIN][part])
            for part in ("step", "student")
        } | {
            "step_at_best": (rest + at_best) / (rest + least_lora),
            "student_at_best": at_best / least_lora,
            "student_multiplied": done / done_lora,
            "giga_multiplications": {
                "rest": rest / 1e9,
                "least": at_best / 1e9,
                "done": done / 1e9,
            },
            "trained_parameters": sum(p.numel() for p in side.trained),
            "start": side.start,
            "start_left_out": side.from_rows,
        }
    median = {part: statistics.median(values) for part, values in seconds["lora"].items()}
    return {
        "variants": found,
        "left_out": LEFT_OUT,
        "lora": {
            "step_s": median["step"],
            "student_s": median["student"],
            "product_share_of_step": product_share(partial(lora.step, rows)),
            "product_share_of_student": product_share(partial(lora.student_part, batch)),
        },
        "seconds": seconds,
        "workload": {
            "student": STUDENT,
            "teacher": TEACHER,
            "vocab": VOCAB,
            "r": R,
            "rows": len(rows.lines),
            "batch": list(batch.input_ids.shape),
            "supervised_tokens": batch.num_supervised,
        },
        "machine": describe_machine(arguments.threads, "torch", "transformers", "peft"),
    }


def ratios(seconds: list[float], lora: list[float], again: list[float]) -> dict[str, float]:
    """Median, quartiles and extremes of what each round says."""
    values = [2 * mine / (a + b) for mine, a, b in zip(seconds, lora, again, strict=True)]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": first, "q3": third, "min": min(values), "max": max(values)}


HEADINGS = ["variant", "step, of lora's", "at best", "student's part, of lora's", "at best",
            "it multiplies", "trained parameters"]  # fmt: skip


def cells(report: dict[str, Any]) -> list[list[str]]:
    """Rows of the table."""

    def spread(part: dict[str, float]) -> str:
        return f"{part['median']:.2f} ({part['q1']:.2f} to {part['q3']:.2f})"

    return [
        [
            name + " \\*" * bool(found["start_left_out"]),
            spread(found["step"]),
            f"{found['step_at_best']:.3f}",
            spread(found["student"]),
            f"{found['student_at_best']:.3f}",
            f"{found['student_multiplied']:.3f}",
            f"{found['trained_parameters']:,}",
        ]
        for name, found in report["variants"].items()
    ]


def is_lora_step(found: dict[str, Any]) -> bool:
    """Whether a variant's step makes the same products as lora's."""
    return found["student_at_best"] == found["student_multiplied"] == 1


def as_markdown(report: dict[str, Any]) -> str:
    """The table for readers, with workload and machine."""
    work, lora = report["workload"], report["lora"]
    batch, length = work["batch"]
    table = [HEADINGS, ["---"] * len(HEADINGS), *cells(report)]
    parts = [
        "## The step of every variant, of lora's",
        "\n".join("| " + " | ".join(row) + " |" for row in table),
        f"A step of lora takes {1000 * lora['step_s']:.0f} ms, of which the student's part "
        "(forward and backward pass of its backbone, clipping, AdamW) is "
        f"{1000 * lora['student_s']:.0f} ms. Products of matrices are "
        f"{lora['product_share_of_step']:.0%} of the step and "
        f"{lora['product_share_of_student']:.0%} of the student's part, attention not counted.",
        "Medians, with quartiles, of the ratio to the mean of lora's two turns in the same round; "
        f"{len(report['seconds']['lora']['step'])} rounds in one process, in which the variants "
        "take turns. At best: the ratio of the multiplications that the equations ask for. It "
        "multiplies: the ratio of those that the student's part really makes.",
        f"A step is {work['rows']} rows packed into {batch} x {length} tokens "
        f"({work['supervised_tokens']} supervised); vocabulary {work['vocab']:,}; student "
        f"{work['student'][0]} x {work['student'][1]} layers, teacher {work['teacher'][0]} x "
        f"{work['teacher'][1]}, r = {work['r']} on all linear layers, fp32; forward KL and CE. "
        f"Left out: {', '.join(f'{name} ({why})' for name, why in report['left_out'].items())}.",
        f"{report['machine']}.",
    ]
    same = [n for n, found in report["variants"].items() if n != "lora" and is_lora_step(found)]
    if same:
        noise = f"{', '.join(same)} multiply as lora does: how far they lie from 1 is the noise."
        parts.insert(4, noise)
    if any(found["start_left_out"] for found in report["variants"].values()):
        note = "only its start is made from rows; at one rank for all layers its steps are lora's"
        parts.insert(2, f"\\* Timed with lora's branch: {note}.")
    return "\n\n".join(parts) + "\n"


def _quiet() -> None:
    """Silences what libraries say to each other."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    disable_progress_bar()
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)


if __name__ == "__main__":
    main()
