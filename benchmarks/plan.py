"""The plan of a run against what it takes: peak memory on a CPU; and the plans of experiments/plan.

Every case is trained for a few steps by `neo.train` in a process of its own, after a tiny run of
the same kind that loads code and libraries. Measured is the resident memory above what the process
held before; planned is what `neo.plan` says of the same config. glibc keeps freed tensors of less
than 32 MiB and cannot always use them again, so each case runs twice: with every tensor's memory
given back when it is freed (`MALLOC_MMAP_THRESHOLD_`), which is what a plan can know, and as usual.
Results go to `benchmarks/results/plan.{json,md}`.

Usage: python benchmarks/plan.py [--threads 2] [--only NAME ...]
       python benchmarks/plan.py --paper      renders experiments/plan/
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from paper import write_paper
from rich.console import Console
from workload import VOCAB, _rows, _tokenizer, llama_config

from neo.config import SPECS, build, resolve
from neo.train import compose, train
from neo.training.preflight import plan_run, sample_of, workload_of

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
WITHIN = 0.10
# (hidden size, layers, heads) over the vocabulary of `workload.py`.
SHAPES = {
    "tiny": (64, 2, 2), "100M": (640, 10, 10), "300M": (1024, 18, 16), "1B": (2048, 16, 32),
}  # fmt: skip
BF16 = ("student.dtype=bfloat16", "teacher.dtype=bfloat16")
CHECKPOINTING = "student.activation_checkpointing=true"
# Memory of a tensor of more bytes than this goes back to the system when it is freed.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """One run: the models by the names of `SHAPES`, or the shipped ones, and what is typed."""

    student: str
    teacher: str
    overrides: tuple[str, ...]
    steps: int = 3


CASES = {
    "mini, lora": Case("mini", "mini", ()),
    "mini, none": Case("mini", "mini", ("method=kd",)),
    "100M, lora, fp32": Case("100M", "100M", ("data.batch_size=4",)),
    "100M, lora": Case("100M", "300M", ("data.batch_size=4", *BF16)),
    "100M, dora": Case("100M", "300M", ("data.batch_size=4", "lora=dora", *BF16)),
    "100M, lora, autocast": Case("100M", "300M", ("data.batch_size=4", *BF16,
                                                  "trainer.precision=bf16-mixed")),
    "100M, none": Case("100M", "300M", ("data.batch_size=4", "method=kd", *BF16)),
    "300M, lora": Case("300M", "300M", ("data.batch_size=4", *BF16)),
    "300M, lora, checkpointing": Case("300M", "300M", ("data.batch_size=4", CHECKPOINTING, *BF16)),
    "300M, none": Case("300M", "300M", ("data.batch_size=2", "method=kd", *BF16)),
    "1B, lora": Case("1B", "1B", ("data.batch_size=2", *BF16), steps=2),
    "1B, lora, checkpointing": Case("1B", "1B", ("data.batch_size=2", CHECKPOINTING, *BF16), 2),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=CASES, help="some of the cases")
    parser.add_argument("--once", action="store_true", help="not as usual, too")
    parser.add_argument("--replan", action="store_true", help="plan again, keep what was measured")
    parser.add_argument("--paper", action="store_true", help="render experiments/plan/ and stop")
    parser.add_argument("--run", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.paper:
        write_paper(Path(__file__).parents[1] / "experiments" / "plan")
        return
    torch.set_num_threads(arguments.threads)
    if arguments.run:
        print(json.dumps(measure(CASES[arguments.run], plan_only=arguments.replan)))
        return
    console = Console(width=140)
    file = RESULTS / "plan.json"
    report: dict[str, Any] = {"cases": {}}
    if (arguments.only or arguments.replan) and file.exists():
        report = json.loads(file.read_text())  # the others stay
    if not arguments.replan:
        report["machine"] = describe_machine(arguments.threads, "torch", "transformers", "peft")
    for name in arguments.only or (list(report["cases"]) if arguments.replan else CASES):
        found = child(name, arguments.threads, GIVEN_BACK, *["--replan"] * arguments.replan)
        if arguments.replan:
            found = report["cases"][name] | found
        elif not arguments.once:
            found["measured_gib_as_usual"] = child(name, arguments.threads, {})["measured_gib"]
        report["cases"][name] = found
        console.print(" | ".join(line(name, found)))
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(report, indent=2) + "\n")
        (RESULTS / "plan.md").write_text(as_markdown(report))


def child(name: str, threads: int, environment: dict[str, str], *options: str) -> dict[str, Any]:
    """A case measured in a process of its own."""
    command = [sys.executable, __file__, "--run", name, "--threads", str(threads), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: Case, *, plan_only: bool = False) -> dict[str, Any]:
    """Trains the case in this process; its peak memory and its plan."""
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_rows(folder / "rows.jsonl")
        composed = _config(folder, "run", case.student, case.teacher, case)
        config = resolve(composed)
        if not plan_only:
            tiny = "mini" if case.student == "mini" else "tiny"
            train(_config(folder, "warm", tiny, tiny, case))
            began = time.perf_counter()
            record = train(composed)
            assert record is not None
            found = {
                "measured_gib": record.peak_memory_gib,
                "num_parameters": record.num_parameters,
                "num_trainable_parameters": record.num_trainable_parameters,
                "seconds": time.perf_counter() - began,
            }
        specs = {key: build(config[key]) for key in SPECS}
        sample, meeting, _ = sample_of(config, specs)
        workload = workload_of(specs["data"], config["trainer"], meeting.vocab, sample)
        plan = plan_run(config, specs, workload)
    return found | {
        "planned_gib": plan.gib,
        "phase": plan.fullest,
        "parts_gib": {part: size / GIB for part, size in plan.parts.items()},
        "num_tokens": plan.workload.num_tokens,
    }


def _config(folder: Path, run: str, student: str, teacher: str, case: Case) -> Any:
    overrides = ["trainer=cpu", "trainer.enable_progress_bar=false", f"run_dir={folder / run}",
                 f"trainer.max_steps={case.steps}", *case.overrides]  # fmt: skip
    if student != "mini":
        overrides += ["data=jsonl", f"data.path={folder / 'rows.jsonl'}", "data.max_length=256",
                      "data.val_share=0"]  # fmt: skip
        for role, shape in (("student", student), ("teacher", teacher)):
            path = folder / f"{run}_{role}"
            llama_config(*SHAPES[shape]).save_pretrained(path)
            _tokenizer().save_pretrained(path)
            overrides += [f"{role}.path={path}", f"{role}.random_init=true"]
    return compose(*overrides)


def _write_rows(file: Path) -> None:
    rows = _rows(200, random.Random(0))
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))


def line(name: str, case: dict[str, Any]) -> list[str]:
    """A case in a line of the table."""
    planned, measured = case["planned_gib"], case["measured_gib"]
    usual = case.get("measured_gib_as_usual")
    parts = sorted(case["parts_gib"].items(), key=lambda item: -item[1])
    shown = ", ".join(f"{part} {size:.2g}" for part, size in parts if size >= planned / 50)
    return [
        name,
        f"{case['num_parameters'] / 1e6:,.1f}",
        f"{case['num_trainable_parameters'] / 1e6:,.2f}",
        f"{case['num_tokens']:,}",
        f"{planned:.3f}",
        f"{measured:.3f}",
        f"{planned / measured:.3f}",
        f"{usual:.3f}" if usual else "",
        f"{planned / usual:.3f}" if usual else "",
        f"{case['phase']}: {shown}",
    ]


HEADINGS = [
    "run", "M parameters", "M trained", "tokens", "planned GiB", "measured GiB", "ratio",
    "as usual GiB", "ratio", "planned parts",
]  # fmt: skip


def as_markdown(report: dict[str, Any]) -> str:
    """Everything for readers."""
    cases = report["cases"]
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(line(name, cases[name]) for name in cases)]
    ratios = [case["planned_gib"] / case["measured_gib"] for case in cases.values()]
    off = max(abs(ratio - 1) for ratio in ratios)
    within = sum(abs(ratio - 1) <= WITHIN for ratio in ratios)
    return "\n".join(
        [
            *("| " + " | ".join(row) + " |" for row in lines),
            "",
            f"Planned is within {WITHIN:.0%} of what was measured in {within} of {len(cases)} "
            f"runs, at most {off:.1%} off. Measured: resident memory above what the process held "
            "before the models were loaded, each run in a process of its own, with freed memory "
            "given back to the system; *as usual*: with what glibc keeps of it. The plan has no "
            "part for that: a tensor of less than 32 MiB is cut from a heap whose holes later "
            f"tensors do not always fit. A tokenizer of {VOCAB:,} ids, but for the mini pair; "
            "bfloat16 frozen weights but for fp32 and the mini pair, packed sequences of 256 "
            f"tokens. {report['machine']}.",
        ]
    ) + "\n"  # fmt: skip


if __name__ == "__main__":
    main()
