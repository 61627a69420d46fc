"""Supervised tokens/s and peak memory of one process, against the plain way and the limit.

The plain way is `plain.py`: transformers' Trainer, PEFT, padded batches, full logits of both
models. Our sides are `python -m neo.train`, as a user would type it: with a teacher that runs, with
one that is cached, with none. Every run is a process of its own; the sides take turns, and medians
are compared. Results go to `benchmarks/results/`.

Usage: python benchmarks/step.py [--rows 64] [--runs 3] [--plain-runs 3] [--kinds-runs 1]
           [--threads N]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from rich.console import Console
from rich.table import Table
from step_sides import BATCH, SIDES, R, run_side, write_caches
from transformers import AutoTokenizer
from workload import MAX_LENGTH, STUDENT, TEACHER, VOCAB, describe, llama_config, write_workload

from neo.data.prompt import PromptEncoder
from neo.losses.products import times_transposed

RESULTS = Path(__file__).parent / "results"
TARGET_SPEED, TARGET_MEMORY = 3.0, 0.6
# Of a cached teacher: time over that of no teacher at all, tokens/s over those of an online one and
# of the plain way, and the share of time that the step waits for the cache.
TARGET_OVER_LORA, TARGET_OVER_ONLINE, TARGET_OVER_PLAIN = 1.1, 1.6, 5.0
TARGET_WAIT = 0.01
# A cached side with the online one and the one without a teacher that it is compared with.
CACHED = {"neo_cached": ("neo", "lora"), "neo_cached_packed": ("neo_packed", "lora_packed")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--plain-runs", type=int, default=3, help="of the plain sides, at most")
    parser.add_argument("--kinds-runs", type=int, default=1, help="of further kinds of cache")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="step", help="of the two files of results")
    arguments = parser.parse_args()
    if min(arguments.runs, arguments.plain_runs, arguments.kinds_runs + 1) < 1:
        parser.error("--runs and --plain-runs must be at least 1, --kinds-runs not negative")
    rounds = {
        "all": arguments.runs,
        "plain": min(arguments.runs, arguments.plain_runs),
        "kinds": min(arguments.runs, arguments.kinds_runs),
    }
    sides = [name for name, side in SIDES.items() if rounds[side.rounds]]
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_workload(folder, arguments.rows)
        caches = write_caches(folder, arguments.threads, sides)
        examples = read_examples(folder)
        rates = [matmul_rate()]
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for number in range(arguments.runs):
            for side in (name for name in sides if number < rounds[SIDES[name].rounds]):
                result = run_side(side, folder, arguments.threads, seed=number)
                runs[side].append(result)
                console.print(
                    f"run {number + 1} {side:17} {result['tokens_per_s']:7.0f} tokens/s "
                    f"{result['peak_gib']:.2f} GiB"
                )
            rates.append(matmul_rate())
    report = summarise(runs, caches, examples, max(rates), arguments)
    console.print(as_table(report))
    console.print("\n".join(verdict(report)))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / f"{arguments.name}.md").write_text(as_markdown(report))


def read_examples(folder: Path) -> list[Any]:
    """The rows as both sides see them."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    encoder = PromptEncoder(tokenizer, MAX_LENGTH)
    lines = (folder / "rows.jsonl").read_text().splitlines()
    return [encoder.encode(json.loads(line)["messages"]) for line in lines]


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

    a_head = 2 * VOCAB * counts["supervised_tokens"]
    parts = {
        "teacher_backbone": backbone(TEACHER),
        "teacher_head": a_head * TEACHER[0],
        "student_backbone": 2 * backbone(STUDENT),
        "student_head": 2 * a_head * STUDENT[0],
    }
    return {name: flop / 1e9 for name, flop in parts.items()}


def summarise(
    runs: dict[str, list[dict[str, float]]],
    caches: dict[str, dict[str, float]],
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
    of_student = gflop["student_backbone"] + gflop["student_head"]
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
            "tokens_per_s_cached": counts["supervised_tokens"] / (of_student / rate),
        },
        "cached": {
            side: {
                "time_over_lora": median[lora]["tokens_per_s"] / median[side]["tokens_per_s"],
                "speed_over_online": median[side]["tokens_per_s"] / median[online]["tokens_per_s"],
                "memory_over_online": median[side]["peak_gib"] / median[online]["peak_gib"],
                "wait_share": max(result["cache/wait_share"] for result in runs[side]),
            }
            for side, (online, lora) in CACHED.items()
        },
        "caches": caches,
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
    for name in report["runs"]:
        values = report["median"][name]
        rows.append(
            [
                name,
                f"{values['tokens_per_s']:.0f}",
                f"{report['speed_over_plain'][name]:.2f}",
                f"{values['peak_gib']:.2f}",
                f"{report['memory_over_plain'][name]:.0%}",
                SIDES[name].what,
            ]
        )
    limit = report["limit"]
    at = f"at {limit['matmul_gflop_per_s']:.0f} GFLOP/s"
    for name, key, what in (
        ("limit", "tokens_per_s", "the matrix products of neo alone"),
        ("limit_cached", "tokens_per_s_cached", "those of the student alone"),
    ):
        ratio = limit[key] / report["median"]["plain"]["tokens_per_s"]
        rows.append([name, f"{limit[key]:.0f}", f"{ratio:.2f}", "", "", f"{what}, {at}"])
    return rows


HEADINGS = ["side", "supervised tokens/s", "x plain", "peak GiB", "of plain", "what"]


def as_table(report: dict[str, Any]) -> Table:
    """The table for a terminal."""
    table = Table(*HEADINGS)
    for row in cells(report):
        table.add_row(*row)
    return table


def verdict(report: dict[str, Any]) -> list[str]:
    """What ours reach with an online and with a cached teacher, against the targets."""
    speed, memory = report["speed_over_plain"], report["memory_over_plain"]
    lines = [
        f"{side}: {speed[side]:.2f} x the tokens/s of plain at {memory[side]:.0%} of its memory "
        f"(target {TARGET_SPEED} x at {TARGET_MEMORY:.0%})"
        for side in ("neo", "neo_packed")
    ]
    for side, found in report["cached"].items():
        online, lora = CACHED[side]
        lines.append(
            f"{side}: {found['time_over_lora']:.2f} x the time of {lora} "
            f"(at most {TARGET_OVER_LORA}), {found['speed_over_online']:.2f} x the tokens/s of "
            f"{online} ({TARGET_OVER_ONLINE}) at {found['memory_over_online']:.0%} of its memory, "
            f"{speed[side]:.2f} x those of plain ({TARGET_OVER_PLAIN:.0f}); waits for the cache "
            f"{found['wait_share']:.2%} of the time (at most {TARGET_WAIT:.0%})"
        )
    return lines


def as_markdown(report: dict[str, Any]) -> str:
    """The table for readers, with workload and machine."""
    work = report["workload"]
    num_runs = {SIDES[side].rounds: len(results) for side, results in report["runs"].items()}
    what = {"plain": "of plain", "kinds": "of other kinds of cache", "all": "of the others"}
    counted = ", ".join(f"{num_runs[key]} {of}" for key, of in what.items() if key in num_runs)
    kept = ", ".join(
        f"{kind} {cache['bytes_per_token']:,.0f}" for kind, cache in report["caches"].items()
    )
    lines = ["| " + " | ".join(row) + " |" for row in [HEADINGS, ["---"] * 6, *cells(report)]]
    return "\n".join(
        [
            *lines,
            "",
            *(f"* {line}." for line in verdict(report)),
            "",
            f"Medians of alternating runs ({counted}) over {work['rows']} rows of "
            f"{work['mean_tokens']:.0f} tokens ({work['mean_supervised_tokens']:.0f} supervised); "
            f"vocabulary {VOCAB:,}; student {STUDENT[0]} x {STUDENT[1]} layers, teacher "
            f"{TEACHER[0]} x {TEACHER[1]}, LoRA r = {R} on all linear layers, fp32. Memory is "
            "resident memory above that before the models were loaded, weights included. A cache "
            f"keeps so many bytes of a supervised token: {kept}.",
            "",
            f"{report['machine']}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
