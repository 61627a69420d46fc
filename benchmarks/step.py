"""Supervised tokens/s and peak memory of one process, against the plain way and the limit.

The plain way is `plain.py`: transformers' Trainer, PEFT, padded batches, full logits of both
models. Our side is `python -m neo.train`, as a user would type it. Every run is a process of its
own; the sides take turns, and medians are compared. Results go to `benchmarks/results/`.

Usage: python benchmarks/step.py [--rows 64] [--runs 3] [--threads N]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from workload import MAX_LENGTH, STUDENT, TEACHER, VOCAB, describe, llama_config, write_workload

from neo.data.prompt import PromptEncoder
from neo.losses.products import times_transposed

RESULTS = Path(__file__).parent / "results"
BATCH, R, LR = 8, 16, 2e-4
TARGET_SPEED, TARGET_MEMORY = 3.0, 0.6
SIDES = {
    "plain": "transformers' Trainer, PEFT, padded batches of 8, full logits, the model's own CE",
    "plain_gathered": "the same, CE and KL on the supervised rows of the logits alone",
    "neo": "python -m neo.train data.packing=false: 8 rows of like length a step",
    "neo_packed": f"python -m neo.train, the default: rows packed, 8 x {MAX_LENGTH} a step",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="step", help="of the two files of results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_workload(folder, arguments.rows)
        examples = read_examples(folder)
        rates = [matmul_rate()]
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for number in range(arguments.runs):
            for side in SIDES:
                result = run_side(side, folder, arguments.threads, seed=number)
                runs[side].append(result)
                console.print(
                    f"run {number + 1} {side:14} {result['tokens_per_s']:7.0f} tokens/s "
                    f"{result['peak_gib']:.2f} GiB"
                )
            rates.append(matmul_rate())
    report = summarise(runs, examples, max(rates), arguments)
    console.print(as_table(report))
    console.print(verdict(report))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / f"{arguments.name}.md").write_text(as_markdown(report))


def read_examples(folder: Path) -> list[Any]:
    """The rows as both sides see them."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    encoder = PromptEncoder(tokenizer, MAX_LENGTH)
    lines = (folder / "rows.jsonl").read_text().splitlines()
    return [encoder.encode(json.loads(line)["messages"]) for line in lines]


def run_side(side: str, folder: Path, threads: int, seed: int) -> dict[str, float]:
    """One training run over all rows in a fresh process: its tokens/s and its peak memory."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}

    def call(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=folder
        )
        if done.returncode:
            raise SystemExit(f"{side}: {done.stderr[-3000:]}")
        return done.stdout

    if side.startswith("plain"):
        script = Path(__file__).resolve().parent / "plain.py"
        options = [f"--batch={BATCH}", f"--r={R}", f"--lr={LR}", f"--seed={seed}"]
        options += ["--gathered"] if side == "plain_gathered" else []
        return json.loads(call(str(script), ".", *options).splitlines()[-1])
    call(
        *("-m", "neo.train", "data=jsonl", "data.path=rows.jsonl", "data.val_share=0"),
        *(f"data.max_length={MAX_LENGTH}", f"data.batch_size={BATCH}"),
        f"data.packing={str(side == 'neo_packed').lower()}",
        *("student.path=./student", "teacher.path=./teacher", f"lora.r={R}", f"optim.lr={LR}"),
        *("trainer=cpu", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"),
        *(f"seed={seed}", f"run_dir={side}_{seed}"),
    )
    record = json.loads((folder / f"{side}_{seed}" / "record.json").read_text())
    metrics = record["metrics"]
    return {
        "tokens": record["num_tokens"],
        "tokens_per_s": metrics["perf/tokens_per_s"],
        "peak_gib": metrics["perf/peak_mem_gib"],
    }


def matmul_rate() -> float:
    """The machine's best rate at the largest product, the teacher's head, in GFLOP/s."""
    d = TEACHER[0]
    hidden, weight, out = torch.randn(160, d), torch.randn(VOCAB, d), torch.empty(160, VOCAB)
    by_torch = best_of(lambda: torch.mm(hidden, weight.T, out=out), 20)
    by_onednn = best_of(lambda: times_transposed(hidden, weight), 20)
    return 2 * out.numel() * d / min(by_torch, by_onednn) / 1e9


def best_of(function: Callable[[], Any], times: int) -> float:
    """Seconds of the fastest call."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def floor_gflop(examples: list[Any]) -> dict[str, float]:
    """GFLOP of the matrix products that no implementation can leave out, summed over the rows.

    Backbones on every token, heads on supervised ones; the student's backbone forward and backward
    to its activations (its weights are frozen), the branch and the update left out.
    """
    counts = describe(examples)
    squares = sum(len(example.input_ids) ** 2 for example in examples)

    def backbone(shape: tuple[int, int, int]) -> float:
        config = llama_config(*shape)
        d, layers = config.hidden_size, config.num_hidden_layers
        weights = layers * (4 * d * d + 3 * d * config.intermediate_size)
        return 2 * weights * counts["tokens"] + 2 * layers * d * squares  # causal attention

    heads = 2 * VOCAB * (2 * STUDENT[0] + TEACHER[0]) * counts["supervised_tokens"]
    parts = {
        "teacher_backbone": backbone(TEACHER),
        "student_backbone": 2 * backbone(STUDENT),
        "heads": heads,
    }
    return {name: flop / 1e9 for name, flop in parts.items()}


def summarise(
    runs: dict[str, list[dict[str, float]]],
    examples: list[Any],
    rate: float,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Everything that is written down: medians, ratios, the limit, the machine."""
    median = {
        side: {
            key: statistics.median(result[key] for result in results)
            for key in ("tokens_per_s", "peak_gib")
        }
        for side, results in runs.items()
    }
    gflop = floor_gflop(examples)
    counts = describe(examples)
    return {
        "median": median,
        "speed_over_plain": {
            side: values["tokens_per_s"] / median["plain"]["tokens_per_s"]
            for side, values in median.items()
        },
        "memory_over_plain": {
            side: values["peak_gib"] / median["plain"]["peak_gib"]
            for side, values in median.items()
        },
        "limit": {
            "gflop": gflop,
            "matmul_gflop_per_s": rate,
            "tokens_per_s": counts["supervised_tokens"] / (sum(gflop.values()) / rate),
        },
        "runs": runs,
        "workload": {
            "student": STUDENT,
            "teacher": TEACHER,
            "vocab": VOCAB,
            "max_length": MAX_LENGTH,
            "batch": BATCH,
            "r": R,
            **counts,
        },
        "machine": describe_machine(arguments.threads, "torch", "transformers", "peft"),
    }


def cells(report: dict[str, Any]) -> list[list[str]]:
    """Rows of the table, the limit last."""
    rows = []
    for side, meaning in SIDES.items():
        values = report["median"][side]
        rows.append(
            [
                side,
                f"{values['tokens_per_s']:.0f}",
                f"{report['speed_over_plain'][side]:.2f}",
                f"{values['peak_gib']:.2f}",
                f"{report['memory_over_plain'][side]:.0%}",
                meaning,
            ]
        )
    limit = report["limit"]
    ratio = limit["tokens_per_s"] / report["median"]["plain"]["tokens_per_s"]
    meaning = f"its matrix products alone, at {limit['matmul_gflop_per_s']:.0f} GFLOP/s"
    return [*rows, ["limit", f"{limit['tokens_per_s']:.0f}", f"{ratio:.2f}", "", "", meaning]]


HEADINGS = ["side", "supervised tokens/s", "x plain", "peak GiB", "of plain", "what"]


def as_table(report: dict[str, Any]) -> Table:
    """The table for a terminal."""
    table = Table(*HEADINGS)
    for row in cells(report):
        table.add_row(*row)
    return table


def verdict(report: dict[str, Any]) -> str:
    """One line: what both ways of ours reach, against the target."""
    reached = [
        f"{side}: {report['speed_over_plain'][side]:.2f} x the tokens/s at "
        f"{report['memory_over_plain'][side]:.0%} of the memory"
        for side in ("neo", "neo_packed")
    ]
    return f"{'; '.join(reached)} (target {TARGET_SPEED} x at {TARGET_MEMORY:.0%})"


def as_markdown(report: dict[str, Any]) -> str:
    """The table for readers, with workload and machine."""
    work = report["workload"]
    lines = ["| " + " | ".join(row) + " |" for row in [HEADINGS, ["---"] * 6, *cells(report)]]
    return "\n".join(
        [
            *lines,
            "",
            f"{verdict(report)}.",
            "",
            f"Medians of {len(report['runs']['neo'])} alternating runs over {work['rows']} rows of "
            f"{work['mean_tokens']:.0f} tokens ({work['mean_supervised_tokens']:.0f} supervised); "
            f"vocabulary {VOCAB:,}; student {STUDENT[0]} x {STUDENT[1]} layers, teacher "
            f"{TEACHER[0]} x {TEACHER[1]}, LoRA r = {R} on all linear layers, fp32. Memory is "
            "resident memory above that before the models were loaded, weights included.",
            "",
            f"{report['machine']}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
