"""The distillation loss alone: time and peak memory against peers and the limit.

From hidden states of student and teacher to the gradient of the student's; forward KL + CE with a
frozen head, float32, every second position supervised. All sides run in one process and take turns;
medians are compared. Peak memory is measured apart, each side in a process of its own. Results go
to `benchmarks/results/loss.{json,md}`.

Usage: python benchmarks/loss.py [--rounds 9] [--threads 2] [--only 0|1]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from loss_sides import SIDES, Inputs, Side, divergence_sides, make_inputs
from machine import describe_machine
from rich.console import Console

from neo.losses.distillation import Distillation
from neo.losses.divergences import (
    adaptive_kl,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)

RESULTS = Path(__file__).parent / "results"
TOKENS = 512
# (vocabulary, d_student, d_teacher) -> what is asked for: at most so many times the floor, at least
# so many times as fast as each peer.
WORKLOADS: dict[tuple[int, int, int], dict[str, float]] = {
    (32_000, 256, 512): {"floor": 1.5, "full_logits": 3.0, "liger": 2.5, "trl": 2.0},
    (128_256, 2_048, 4_096): {"floor": 1.25, "full_logits": 1.9, "liger": 4.0, "trl": 1.45},
}
MEANING = {
    "floor": "the three products over the supervised rows, multiplied as neo does (oneDNN)",
    "floor_mm": "the same products by torch.mm (MKL)",
    "neo": "neo.losses.fused.fused_sums",
    "full_logits": "logits of all positions, autograd: the paper's way",
    "liger": "LigerFusedLinearJSDLoss, beta 0, with its CE, not compiled",
    "trl": "ChunkedDivergenceFunction on the supervised rows; without CE",
}
DIVERGENCES = (
    forward_kl,
    reverse_kl,
    jsd,
    skew_forward_kl,
    skew_reverse_kl,
    adaptive_kl,
    total_variation,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", type=int, choices=range(len(WORKLOADS)), help="one workload")
    parser.add_argument("--name", default="loss", help="of the two files of results")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = list(WORKLOADS)
    if arguments.only is not None:
        shapes = [shapes[arguments.only]]
    if arguments.peak:
        print(peak_mib(SIDES[arguments.peak], make_inputs(TOKENS, *shapes[0])))
        return
    console = Console(width=120)
    report: dict[str, Any] = {
        "machine": describe_machine(
            arguments.threads, "torch", "liger_kernel", "trl", "transformers"
        ),
        "rounds": arguments.rounds,
        "workloads": [],
    }
    for shape in shapes:
        number = list(WORKLOADS).index(shape)
        peaks = {side: child_peak_mib(side, number, arguments.threads) for side in SIDES}
        inputs = make_inputs(TOKENS, *shape)
        seconds, losses = alternate(SIDES, inputs, arguments.rounds)
        report["workloads"].append(
            {"shape": shape, "seconds": seconds, "peak_mib": peaks, "loss": losses}
        )
        console.print(table(report["workloads"][-1]))
    inputs = make_inputs(TOKENS, *next(iter(WORKLOADS)))
    sides = divergence_sides({f.__name__: Distillation(divergence=f) for f in DIVERGENCES})
    report["divergences"] = {
        "shape": next(iter(WORKLOADS)),
        "seconds": alternate(sides, inputs, arguments.rounds)[0],
    }
    console.print(divergence_table(report["divergences"]))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / f"{arguments.name}.md").write_text(as_markdown(report))


def alternate(
    sides: dict[str, Side], inputs: Inputs, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every call, and each side's loss; the first round warms up and does not count."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    losses = {}
    order = list(sides)
    for number in range(rounds + 1):
        for side in order if number % 2 else reversed(order):
            began = time.perf_counter()
            losses[side], _ = sides[side](inputs)
            if number:
                seconds[side].append(time.perf_counter() - began)
    return seconds, losses


def child_peak_mib(side: str, number: int, threads: int) -> float:
    """Peak memory of one side above its inputs, in MiB, measured in a process of its own."""
    command = [sys.executable, __file__, f"--peak={side}", f"--only={number}"]
    done = subprocess.run(
        [*command, f"--threads={threads}"], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def peak_mib(side: Side, inputs: Inputs) -> float:
    """How much more memory the process holds at its peak than before, in MiB (Linux)."""
    # A small call first, so that code and threads are loaded.
    side(make_inputs(8, 64, 16, 16))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    side(inputs)
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def rows(workload: dict[str, Any]) -> list[list[str]]:
    """One line a side."""
    seconds = {side: statistics.median(values) for side, values in workload["seconds"].items()}
    required = WORKLOADS[tuple(workload["shape"])]
    floor = min(seconds["floor"], seconds["floor_mm"])
    lines = []
    for side, meaning in MEANING.items():
        ratio = seconds[side] / seconds["neo"]
        asked = f"at least {required[side]:g}" if side in required and side != "floor" else ""
        lines.append(
            [
                side,
                f"{1000 * seconds[side]:.0f}",
                f"{seconds[side] / floor:.2f}"
                + (f" (at most {required['floor']:g})" if side == "neo" else ""),
                f"{ratio:.2f}" + (f" ({asked})" if asked else ""),
                f"{workload['peak_mib'][side]:.0f}",
                f"{workload['loss'][side]:.5f}" if not side.startswith("floor") else "",
                meaning,
            ]
        )
    return lines


HEADINGS = ["side", "ms", "of the floor", "of neo's time", "peak MiB", "loss", "what"]


def table(workload: dict[str, Any]) -> str:
    """The workload's table in Markdown."""
    vocab, d_student, d_teacher = workload["shape"]
    peaks = workload["peak_mib"]
    return "\n".join(
        [
            f"V = {vocab:,}, d_student = {d_student:,}, d_teacher = {d_teacher:,}; {TOKENS} "
            "tokens, half of them supervised:",
            "",
            *markdown([HEADINGS, *rows(workload)]),
            "",
            f"Peak memory of neo: 1/{peaks['full_logits'] / peaks['neo']:.1f} of full logits.",
        ]
    )


def divergence_table(divergences: dict[str, Any]) -> str:
    """Closed form against autograd in Markdown."""
    seconds = {side: statistics.median(values) for side, values in divergences["seconds"].items()}
    lines = [
        [
            divergence.__name__,
            f"{seconds[divergence.__name__ + '/closed'] / seconds['floor']:.2f}",
            f"{seconds[divergence.__name__ + '/autograd'] / seconds['floor']:.2f}",
        ]
        for divergence in DIVERGENCES
    ]
    vocab, d_student, d_teacher = divergences["shape"]
    heading = f"Each divergence + CE at V = {vocab:,}, d = {d_student:,} and {d_teacher:,}:"
    columns = ["divergence", "closed form, of the floor", "autograd on a block, of the floor"]
    return "\n".join([heading, "", *markdown([columns, *lines])])


def markdown(lines: list[list[str]]) -> list[str]:
    """A table whose first line is its heading."""
    first, *rest = lines
    return ["| " + " | ".join(line) + " |" for line in [first, ["---"] * len(first), *rest]]


def as_markdown(report: dict[str, Any]) -> str:
    """Everything for readers."""
    parts = [
        *(table(workload) for workload in report["workloads"]),
        divergence_table(report["divergences"]),
        f"Medians of {report['rounds']} alternating runs in one process, float32; memory above the "
        f"inputs, each side in a process of its own. {report['machine']}.",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
