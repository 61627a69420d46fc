"""What to say, and to change, when a run needs more memory than there is."""

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

_UNITS = {"B": 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_NUMBER = r"([\d.]+) (bytes|KiB|MiB|GiB|TiB|B)\b"
# Which part of a run a frame belongs to: by its file, and a word of its line. The innermost frame
# decides, but whatever runs inside the backward pass, recomputed activations too, is of it. Forward
# and backward run inside the optimizer's step, called back by Lightning.
_PARTS = (
    ("torch/autograd/graph.py", "", "the backward pass"),
    ("torch/optim/", "", "the optimizer's step"),
    ("lightning/pytorch/loops/optimization/", "", None),
    ("neo/losses/", "", "the loss"),
    ("neo/training/token_loss.py", "given_by(", "the teacher's forward pass"),
    ("neo/training/token_loss.py", "of_student = ", "the student's forward pass"),
    ("neo/training/module.py", ".load", "loading a model"),
    ("neo/models/sharding.py", "", "loading a model"),
    ("neo/training/module.py", "attach", "building the branch"),
    ("neo/training/exact_match.py", "", "answering"),
)


class OutOfMemory(torch.OutOfMemoryError):
    """Memory ran out; says in which part, by how much, and what would help."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had less memory than was asked for."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in said  # torch's allocator of the CPU
        or "CUDA out of memory" in said  # some of torch's own libraries raise it as RuntimeError
        or "CUBLAS_STATUS_ALLOC_FAILED" in said
    )


def explained(error: BaseException, config: Mapping[str, Any]) -> OutOfMemory:
    """The error with all that is known about it, and without the tensors its frames hold on to."""
    part = part_of(error)
    head = f"out of memory in {part}" if part else "out of memory"
    said = shortage(str(error)) or (str(error).splitlines() or ["nobody knows by how much"])[0]
    lines = [f"{head}: {said}", "What would help:"]
    lines += [f"  {advice}" for advice in advice_for(config, part)]
    found = OutOfMemory("\n".join(lines))
    traceback.clear_frames(error.__traceback__)
    return found


def part_of(error: BaseException) -> str | None:
    """Which part of the run asked for the memory, told from the frames it was raised through."""
    found = None
    for frame in traceback.extract_tb(error.__traceback__):
        name, line = frame.filename.replace("\\", "/"), frame.line or ""
        for file, word, part in _PARTS:
            if file in name and word in line:
                if part == "the backward pass":
                    return part
                found = part
    return found


def shortage(said: str) -> str | None:
    """How much was asked for, how much was free, and so how much was missing; None if unknown.

    Example:
        >>> shortage("Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of "
        ...          "which 512.00 MiB is free.")
        '2.00 GiB were asked for, 0.50 GiB of 79.10 GiB were free: 1.50 GiB too little'
    """
    asked = _bytes(rf"[Tt]ried to allocate {_NUMBER}", said)
    if asked is None:
        return None
    free = _bytes(rf"of which {_NUMBER} is free", said)
    total = _bytes(rf"total capacity of {_NUMBER}", said)
    if "DefaultCPUAllocator" in said:
        free = _free_on_cpu()
    if free is None:
        return f"{_gib(asked)} were asked for"
    missing = max(0, asked - free)
    of_total = f" of {_gib(total)}" if total else ""
    text = f"{_gib(asked)} were asked for, {_gib(free)}{of_total} were free: "
    unused = _bytes(rf"{_NUMBER} is reserved by PyTorch but unallocated", said)
    if missing:
        text += f"{_gib(missing)} too little"
    else:
        text += "enough, but not in one piece"
    if unused and unused >= max(missing, 2**28):
        text += (
            f"; {_gib(unused)} are held unused in pieces, which "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True can join"
        )
    return text


def advice_for(config: Mapping[str, Any], part: str | None) -> Iterator[str]:
    """What this config could change, what costs least first.

    All but the length and a quantised teacher leave a run's numbers as they were.
    """
    data, trainer, student = config["data"], config["trainer"], config["student"]
    teacher = config["teacher"].get("path")
    size, accumulate = data.get("batch_size", 8), trainer["accumulate_grad_batches"]
    if part not in ("loading a model", "building the branch", "the optimizer's step"):
        if size > 1:
            half = max(1, size // 2)
            yield (
                f"data.batch_size={half} trainer.accumulate_grad_batches="
                f"{-(-size * accumulate // half)} (was {size} and {accumulate}): less per pass"
            )
        else:
            yield f"data.max_length below {data.get('max_length', 2048)}: data.batch_size is 1"
        if part in (None, "the loss", "the backward pass"):
            yield "loss.chunk_gib smaller than it is: fewer tokens' logits at a time"
        if not student.get("activation_checkpointing") and part != "the teacher's forward pass":
            yield "student.activation_checkpointing=true: activations are computed again, not kept"
    if trainer.get("strategy") != "fsdp":
        yield "trainer=fsdp: every device holds a part of student and teacher"
        if teacher and config.get("sharding") != "teacher":
            yield "sharding=teacher: every device holds a part of the teacher alone"
    if teacher and not config["teacher"].get("quantization"):
        yield "teacher.quantization=int8 or int4: a smaller teacher"
    if part == "answering":
        yield "eval_split=null: the trained weights lie in the newest checkpoint already"


def _free_on_cpu() -> float | None:
    """Bytes that this process could still have been given: by the machine, and by its own limit."""
    free = []
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ImportError):
        import resource  # not on Windows

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            free.append(max(0, limit - held))
    return float(min(free)) if free else None


def _bytes(pattern: str, said: str) -> float | None:
    found = re.search(pattern, said)
    return None if found is None else float(found[1]) * _UNITS[found[2]]


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
