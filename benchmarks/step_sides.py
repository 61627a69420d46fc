"""The sides of `step.py`: each a training run over the same rows in a process of its own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from workload import MAX_LENGTH

from neo.teachers.store import CacheFolder

BATCH, R, LR = 8, 16, 2e-4
SAMPLES = 64  # ids of a list, drawn or most likely
# What is kept for `teacher=cached`, as arguments of neo.cache.
CACHES = {
    "projected": ("teacher.kind=projected",),
    "hidden": ("teacher.kind=hidden",),
    "top_k": ("teacher.kind=top_k", f"teacher.k={SAMPLES}"),
    "sampled": ("teacher.kind=sampled", f"teacher.samples={SAMPLES}"),
}


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to train.

    Args:
        what: For the reader.
        plain: By `plain.py`, with these options; None: by neo.train.
        packed: Rows share sequences.
        teacher: `online`, `none` for plain LoRA fine-tuning, or one of `CACHES`.
        rounds: In which it takes part: `all`, the first `plain` ones, or the first `kinds` ones.
    """

    what: str
    plain: tuple[str, ...] | None = None
    packed: bool = False
    teacher: str = "online"
    rounds: str = "all"


PACKED = f"rows packed, {BATCH} x {MAX_LENGTH} a step"
# What is compared stands side by side, so that a machine's slow minutes hit both.
SIDES = {
    "plain": Side(
        what="transformers' Trainer, PEFT, padded batches of 8, full logits, the model's own CE",
        plain=(),
        rounds="plain",
    ),
    "plain_gathered": Side(
        what="the same, CE and KL on the supervised rows of the logits alone",
        plain=("--gathered",),
        rounds="plain",
    ),
    "neo": Side(what=f"python -m neo.train data.packing=false: {BATCH} rows of like length a step"),
    "lora": Side(what="the same with method=lora: no teacher at all", teacher="none"),
    "neo_cached": Side(
        what="neo with teacher=cached: projected, float32, written before", teacher="projected"
    ),
    "neo_packed": Side(what=f"python -m neo.train, the default: {PACKED}", packed=True),
    "lora_packed": Side(what="the same with method=lora", packed=True, teacher="none"),
    "neo_cached_packed": Side(
        what="neo_packed with teacher=cached: projected, float32", packed=True, teacher="projected"
    ),
    "hidden_packed": Side(
        what="the same, the teacher's hidden states", packed=True, teacher="hidden", rounds="kinds"
    ),
    "top_k_packed": Side(
        what=f"the same, its {SAMPLES} most likely ids",
        packed=True,
        teacher="top_k",
        rounds="kinds",
    ),
    "sampled_packed": Side(
        what=f"the same, {SAMPLES} ids drawn", packed=True, teacher="sampled", rounds="kinds"
    ),
}


def write_caches(folder: Path, threads: int, names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Writes what the sides of these names read, each kind once.

    Returns:
        Of each kind the bytes that its files have of a supervised token, the teacher's head left
        out, and the seconds that it took to write, with the start and the certificate.
    """
    written: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(SIDES[name].teacher for name in names):
        if kind not in CACHES:
            continue
        began = time.perf_counter()
        command = ("-m", "neo.cache", *_common(), "teacher.path=./teacher", *CACHES[kind])
        _call(f"cache of kind {kind}", folder, threads, *command, f"out={_cache(kind)}")
        seconds = time.perf_counter() - began
        cache = CacheFolder.open(folder / _cache(kind))
        num_bytes = sum(
            file.stat().st_size
            for part in ("bin", "index")
            for file in cache.path.glob(f"*.{part}")
        )
        num_tokens = sum(map(cache.num_tokens, cache.keys()))
        written[kind] = {"bytes_per_token": num_bytes / num_tokens, "seconds": seconds}
    return written


def run_side(name: str, folder: Path, threads: int, seed: int) -> dict[str, float]:
    """One training run over all rows in a fresh process: tokens/s, peak memory, and waiting."""
    side = SIDES[name]
    if side.plain is not None:
        script = Path(__file__).resolve().parent / "plain.py"
        options = [f"--batch={BATCH}", f"--r={R}", f"--lr={LR}", f"--seed={seed}", *side.plain]
        printed = _call(name, folder, threads, str(script), ".", *options)
        return json.loads(printed.splitlines()[-1])
    taught = {
        "online": ("teacher.path=./teacher",),
        "none": ("method=lora",),
    }.get(side.teacher, ("teacher=cached", f"teacher.path={_cache(side.teacher)}"))
    run_dir = f"{name}_{seed}"
    packing = f"data.packing={str(side.packed).lower()}"
    command = ("-m", "neo.train", *_common(), packing, *taught, f"seed={seed}")
    _call(name, folder, threads, *command, "trainer.max_epochs=1", f"run_dir={run_dir}")
    record = json.loads((folder / run_dir / "record.json").read_text())
    metrics = record["metrics"]
    result = {
        "tokens": record["num_tokens"],
        "tokens_per_s": metrics["perf/tokens_per_s"],
        "peak_gib": metrics["perf/peak_mem_gib"],
    }
    cached = {key: value for key, value in metrics.items() if key.startswith("cache/")}
    if computed := cached.get("cache/rows_computed"):
        raise SystemExit(
            f"{name}: the teacher ran over {computed:.0f} rows; none was to be lacking"
        )
    return result | cached


def _common() -> tuple[str, ...]:
    """Arguments of every run of ours and of the caches."""
    return (
        *("data=jsonl", "data.path=rows.jsonl", "data.val_share=0"),
        *(f"data.max_length={MAX_LENGTH}", f"data.batch_size={BATCH}"),
        *("student.path=./student", f"lora.r={R}", f"optim.lr={LR}"),
        *("trainer=cpu", "trainer.enable_progress_bar=false"),
    )


def _cache(kind: str) -> str:
    return f"cache_{kind}"


def _call(name: str, folder: Path, threads: int, *command: str) -> str:
    """What a Python of its own prints."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=folder
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    return done.stdout
