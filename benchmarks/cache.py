"""What a cache of teacher targets takes: bytes per kind, and the time to make it and to read it.

All at the sizes of Llama-3.1-8B into 1B, with random heads and a teacher whose entropy is 1 nat on
average; bytes also with one as sure of its tokens as the mini-lab's (`peaked_teacher.py`). Making
is compared with its matrix products, reading (look-up, checksum, unpacking, eight rows at a time,
from the system's page cache) with copying the same bytes and their crc32. Results go to
`benchmarks/results/cache.{json,md}`. Takes 5 GiB of memory.

Usage: python benchmarks/cache.py [--tokens 400] [--rounds 3] [--read-rows 32] [--threads N]
"""

import argparse
import json
import math
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from peaked_teacher import describe_states, mini_entropies, peaked_states
from rich.console import Console
from torch import Tensor

from neo.losses.fused import CHUNK_GIB
from neo.losses.given import HiddenStates
from neo.losses.head import Head
from neo.losses.products import times, times_transposed
from neo.teachers.fields import Shapes
from neo.teachers.manifest import begin, finish
from neo.teachers.measure import measured
from neo.teachers.shard_writers import ShardWriter
from neo.teachers.shards import RECORD, RowKey, bin_file, padded
from neo.teachers.store import CacheFolder
from neo.teachers.stored import Stored
from neo.teachers.unpack import given_of, unpacked

RESULTS = Path(__file__).parent / "results"
VOCAB, D_STUDENT, D_TEACHER = 128_256, 2048, 4096
# Infinity-Instruct as the paper uses it.
PAPER_ROWS, PAPER_TOKENS = 1_000_000, 400
BATCH = 8  # rows that are looked up together
SHARD = "rows-00000"
WAYS = {
    "projected, float32": Stored(kind="projected"),
    "projected, bfloat16": Stored(kind="projected", values="bfloat16"),
    "projected, int8": Stored(kind="projected", values="int8"),
    "hidden, bfloat16": Stored(kind="hidden", values="bfloat16"),
    **{f"top_k, {k}": Stored(kind="top_k", k=k) for k in (8, 32, 64, 256)},
    **{f"top_p, {p}": Stored(kind="top_p", p=p) for p in (0.9, 0.95, 0.99)},
    **{f"sampled, {n}": Stored(kind="sampled", samples=n) for n in (16, 64)},
    "sampled, 16 + the top 16": Stored(kind="sampled", k=16, samples=16),
}
VARYING = ("top_p", "sampled")  # whose lists are as long as the teacher is unsure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=400, help="supervised, of a row")
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    parser.add_argument("--read-rows", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--d-student", type=int, default=D_STUDENT)
    parser.add_argument("--d-teacher", type=int, default=D_TEACHER)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="cache", help="of the two files of results")
    arguments = parser.parse_args()
    if min(arguments.tokens, arguments.rounds) < 1 or arguments.read_rows % BATCH:
        parser.error(f"--tokens and --rounds must be at least 1, --read-rows a multiple of {BATCH}")
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    report: dict[str, Any] = {
        "machine": describe_machine(arguments.threads, "torch", "numpy"),
        "settings": {k: v for k, v in vars(arguments).items() if k != "name"},
        "full_logits_bytes": 2 * arguments.vocab,
    }
    head, student = heads(arguments, generator)
    of_mini = mini_entropies()
    report["mini_lab"] = {"tokens": len(of_mini), "entropy_nats": of_mini.mean().item()}
    # Squares of normal numbers: a quarter are below 0.1 nats, one in twenty is above 3.8.
    unsure = torch.randn(arguments.tokens, generator=generator).square()
    unsure.clamp_(max=math.log(arguments.vocab) / 2)
    drawn = torch.randint(len(of_mini), (arguments.tokens,), generator=generator)
    teachers = {"1 nat": unsure / unsure.mean(), "mini-lab's": of_mini[drawn]}
    states = {name: peaked_states(head, each, generator) for name, each in teachers.items()}
    report["teachers"] = {name: describe_states(head, each) for name, each in states.items()}
    first, second = states
    report["making"], blobs = making(
        HiddenStates(hidden=states[first], head=head), student, arguments
    )
    given = HiddenStates(hidden=states[second], head=head)
    surer = {name: make(given, student, stored) for name, stored in WAYS.items() if varies(stored)}
    report["bytes_per_token"] = {
        first: {name: bytes_per_token(blob, arguments.tokens) for name, blob in blobs.items()},
        second: {
            name: bytes_per_token(blob, arguments.tokens) for name, blob in (blobs | surer).items()
        },
    }
    report["reading"] = {
        name: reading(name, blob, head, student, arguments) for name, blob in blobs.items()
    }
    Console(width=140).print(as_markdown(report), markup=False)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / f"{arguments.name}.md").write_text(as_markdown(report))


def varies(stored: Stored) -> bool:
    """Whether how much is kept of a token hangs on the teacher."""
    return stored.kind in VARYING


def heads(arguments: argparse.Namespace, generator: torch.Generator) -> tuple[Head, Head]:
    """The teacher's and the student's, random."""

    def head(d: int) -> Head:
        return Head(weight=torch.randn(arguments.vocab, d, generator=generator).div_(math.sqrt(d)))

    return head(arguments.d_teacher), head(arguments.d_student)


def shapes_of(head: Head, student: Head) -> Shapes:
    """Of the two heads."""
    vocab, d_teacher = head.weight.shape
    return Shapes(
        vocab=vocab,
        d_student=student.weight.shape[1],
        d_teacher=d_teacher,
        teacher_rows=vocab,
    )


def make(given: HiddenStates, student: Head, stored: Stored) -> bytes:
    """The blob of one row that has all the tokens."""
    num_tokens = len(given.hidden)
    targets = torch.arange(num_tokens) % len(given.head.weight)
    shapes = shapes_of(given.head, student)
    own = student if stored.kind == "projected" else None
    return measured(given, targets, stored, shapes, [(RowKey(0, 0), num_tokens)], own)[0]


def making(
    given: HiddenStates, student: Head, arguments: argparse.Namespace
) -> tuple[dict[str, dict[str, float]], dict[str, bytes]]:
    """Seconds of making a row, and of its products alone, taking turns; and the blobs."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    floors: dict[bool, list[float]] = {False: [], True: []}  # with the student's head or without
    blobs: dict[str, bytes] = {}
    for _ in range(arguments.rounds):
        for projected, found in floors.items():
            head = student if projected else None
            found.append(timed(lambda head=head: products(given, head)))
        for name, stored in WAYS.items():

            def run(name: str = name, stored: Stored = stored) -> None:
                blobs[name] = make(given, student, stored)

            seconds[name].append(timed(run))
    made = {
        name: {
            "tokens_per_s": len(given.hidden) / min(seconds[name]),
            "seconds": min(seconds[name]),
            "floor_seconds": min(floors[stored.kind == "projected"]),
        }
        for name, stored in WAYS.items()
    }
    return made, blobs


def products(given: HiddenStates, student: Head | None) -> None:
    """The matrix products of making a row, as many tokens at a time as `measured` takes."""
    for hidden in given.hidden.split(CHUNK_GIB["cpu"][1]):
        logits = times_transposed(hidden, given.head.weight)
        if student is not None:
            times(logits, student.weight)


def timed(function: Callable[[], Any]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def bytes_per_token(blob: bytes, num_tokens: int) -> float:
    """Of the files of a cache, with the padding and the record of the row."""
    return (padded(len(blob)) + RECORD.itemsize) / num_tokens


def reading(
    name: str, blob: bytes, head: Head, student: Head, arguments: argparse.Namespace
) -> dict[str, float]:
    """Seconds that a row takes, at best, of each part of reading."""
    stored = WAYS[name].resolved()
    shapes = shapes_of(head, student)
    keys = [RowKey(0, number) for number in range(arguments.read_rows)]
    batches = [keys[start : start + BATCH] for start in range(0, len(keys), BATCH)]
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        begin(folder, stored, shapes, {"benchmark": {"kind": name}}, growing=False)
        with ShardWriter(folder, SHARD) as writer:
            for key in keys:
                writer.add(key, arguments.tokens, 0, blob)
            entry = writer.close()
        counts = {"rows": len(keys), "tokens": len(keys) * arguments.tokens, "bad_rows": {}}
        finish(folder, [entry], counts, {})
        cache = CacheFolder.open(folder)
        size = padded(len(blob))
        file = np.memmap(bin_file(folder, SHARD), dtype=np.uint8, mode="r")

        def look_up() -> list[dict[str, Tensor]]:
            return [unpacked([cache.read(k) for k in batch], stored, shapes) for batch in batches]

        def floor() -> None:
            for number in range(len(keys)):
                zlib.crc32(file[number * size : (number + 1) * size].copy())

        tensors = look_up()

        def give() -> None:
            for each in tensors:
                given_of(each, stored, head=head)

        found: dict[str, list[float]] = {"seconds": [], "floor_seconds": [], "give_seconds": []}
        for _ in range(arguments.rounds):
            for part, function in zip(found, (look_up, floor, give), strict=True):
                found[part].append(timed(function) / len(keys))
    best = {key: min(values) for key, values in found.items()}
    return best | {"median_seconds": statistics.median(found["seconds"]), "bytes": size}


def in_all(bytes_per_token: float) -> str:
    """Of the paper's rows."""
    gigabytes = bytes_per_token * PAPER_ROWS * PAPER_TOKENS / 1e9
    return f"{gigabytes:,.0f} GB" if gigabytes < 1000 else f"{gigabytes / 1000:.1f} TB"


def table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """In Markdown."""
    return ["| " + " | ".join(r) + " |" for r in [headings, ["---"] * len(headings), *rows]]


def as_markdown(report: dict[str, Any]) -> str:
    """The tables for readers."""
    settings, full = report["settings"], report["full_logits_bytes"]
    first, second = report["teachers"]
    sizes, surer = (report["bytes_per_token"][name] for name in (first, second))
    full_row = ["all logits, bfloat16", f"{full:,}", "100%", in_all(full), "", ""]
    size_rows = [
        [
            name,
            f"{sizes[name]:,.0f}",
            f"{sizes[name] / full:.2%}",
            in_all(sizes[name]),
            f"{surer[name]:,.0f}",
            in_all(surer[name]),
        ]
        for name in WAYS
    ]
    read_rows = [
        [
            name,
            f"{1 / read['seconds']:,.0f}",
            f"{settings['tokens'] / read['seconds']:,.0f}",
            f"{read['bytes'] / read['seconds'] / 1e9:.2f}",
            f"{read['bytes'] / read['floor_seconds'] / 1e9:.2f}",
            f"{1000 * read['seconds']:.2f}",
            f"{1000 * read['give_seconds']:.2f}",
        ]
        for name, read in report["reading"].items()
    ]
    make_rows = [
        [
            name,
            f"{made['tokens_per_s']:,.0f}",
            f"{made['seconds'] / made['floor_seconds']:.2f}",
        ]
        for name, made in report["making"].items()
        if WAYS[name].kind != "hidden"  # which is copied
    ]
    means = " and ".join(
        f"{of['entropy_nats']:.2f} nats ({of['top_1_mass']:.0%} on the most likely id)"
        for of in report["teachers"].values()
    )
    paper = f"{PAPER_ROWS:,} rows of {PAPER_TOKENS} supervised tokens"
    return "\n".join(
        [
            "## Bytes",
            "",
            *table(
                ["kind", "bytes a token", "of all logits", "paper", f"bytes, {second}", "paper"],
                [full_row, *size_rows],
            ),
            "",
            f"*paper*: {paper}. Vocabulary {settings['vocab']:,}; student "
            f"{settings['d_student']:,} wide, teacher {settings['d_teacher']:,}. Files as written, "
            f"with padding and index, in rows of {settings['tokens']} tokens. Lists of top_p and "
            "sampled are the longer the less sure the teacher is. Its logits are random here, and "
            f"scaled token by token to entropies that are {means} on average: those of the left "
            "are squares of normal "
            "numbers, those of the right are drawn from the mini-lab's teacher on its validation "
            f"rows ({report['mini_lab']['entropy_nats']:.3f} nats over all).",
            "",
            "## Reading",
            "",
            *table(
                [
                    "kind",
                    "rows/s",
                    "tokens/s",
                    "GB/s",
                    "GB/s, copy and crc32",
                    "ms a row",
                    "ms more",
                ],
                read_rows,
            ),
            "",
            f"Look-up, checksum and unpacking in one thread, {BATCH} rows at a time, from the page "
            "cache; *copy and crc32* is what the same bytes take with nothing else done. *ms more* "
            "is what remains to the step, on the device: widening to float32, exponentials.",
            "",
            "## Making",
            "",
            *table(["kind", "tokens/s", "x the time of its products"], make_rows),
            "",
            "From hidden states to bytes, the teacher's backbone left out; products are the "
            "teacher's head and, of projected, the student's.",
            "",
            f"Best of {settings['rounds']}. {report['machine']}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
