"""Rows of the mini-lab: instruction tasks with exact answers, split by what they are about."""

from collections.abc import Iterator
from hashlib import blake2b
from random import Random
from typing import Any

from neo.data.mini_tasks import KINDS, Operands, Task

SPLITS = ("train", "val", "test", "teacher")

# so many draws in a row that give nothing new mean that a kind has no more rows
PATIENCE = 200_000


def mini_rows(
    split: str,
    num_rows: int,
    *,
    seed: int,
    label_noise: float = 0.0,
    kinds: tuple[str, ...] | None = None,
) -> list[dict[str, Any]]:
    """Rows of one split, each kind equally often, in an order fixed by the seed.

    A row holds `messages`, its `kind`, and whether its last answer is wrong on purpose (`noisy`).
    No operands of a test or validation row stand in a training row, whatever the wording; no row
    stands twice in a split.

    Args:
        split: `train`, `val`, `test`, or `teacher`: the operands of `train`, another sample.
        num_rows: How many rows.
        seed: Chooses the rows, their order and the wrong answers.
        label_noise: The share of training rows whose last answer is wrong: it ends in the result
            of another row of the kind. Other splits are always right.
        kinds: The kinds to draw from; all of them by default.
    """
    rng = Random(f"{split} {seed}")
    tasks = _tasks(split, num_rows, label_noise, kinds, rng)
    wrong = _wrong_answers(tasks, label_noise if split == "train" else 0.0, rng)
    return [
        {"messages": _messages(task, wrong.get(i)), "kind": kind, "noisy": i in wrong}
        for i, (kind, task) in enumerate(tasks)
    ]


def wrong_answers(split: str, num_rows: int, *, seed: int) -> list[str]:
    """For each of `mini_rows(split, num_rows, seed=seed)`, one that only looks right.

    It ends in the result of another row of the kind and form, as the wrong ones of training do.
    """
    rng = Random(f"{split} {seed}")
    tasks = _tasks(split, num_rows, 0.0, None, rng)
    wrong = _wrong_answers(tasks, 1.0, rng)
    return [wrong[i] for i in range(len(tasks))]


def split_of(operands: Operands) -> str:
    """The split that a tuple of operands belongs to: test, val, or train.

    Example:
        >>> split_of(("numbers", 12, 30))
        'train'
    """
    digest = blake2b(repr(operands).encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") % 100
    return "test" if place < 10 else "val" if place < 15 else "train"


def _tasks(
    split: str, num_rows: int, label_noise: float, kinds: tuple[str, ...] | None, rng: Random
) -> list[tuple[str, Task]]:
    """The tasks behind the rows, each with its kind, in the rows' order."""
    names = tuple(KINDS) if kinds is None else kinds
    _refuse(split, num_rows, label_noise, names)
    counts = [len(range(start, num_rows, len(names))) for start in range(len(names))]
    tasks = [
        (kind, task)
        for kind, count in zip(names, counts, strict=True)
        for task in _draw(kind, count, split, rng)
    ]
    rng.shuffle(tasks)
    return tasks


def _refuse(split: str, num_rows: int, label_noise: float, kinds: tuple[str, ...]) -> None:
    if split not in SPLITS:
        raise ValueError(f"mini rows: split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if num_rows < 0:
        raise ValueError(f"mini rows: num_rows is {num_rows}; it must be 0 or more")
    if not 0 <= label_noise <= 1:
        raise ValueError(f"mini rows: label_noise is {label_noise}; it must be from 0 to 1")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(
            f"mini rows: kinds are {list(kinds)}; they must be different ones of {', '.join(KINDS)}"
        )


def _draw(kind: str, count: int, split: str, rng: Random) -> Iterator[Task]:
    pool = "train" if split == "teacher" else split
    seen: set[tuple[tuple[str, str], ...]] = set()
    misses = 0
    while len(seen) < count:
        task = KINDS[kind](rng)
        if task.turns in seen or any(split_of(operands) != pool for operands in task.operands):
            misses += 1
            if misses > PATIENCE:
                raise ValueError(
                    f"mini rows: the {split} split has hardly more than {len(seen)} different rows"
                    f" of kind {kind}; ask for fewer than {count}"
                )
            continue
        misses = 0
        seen.add(task.turns)
        yield task


def _wrong_answers(tasks: list[tuple[str, Task]], share: float, rng: Random) -> dict[int, str]:
    """By place in `tasks`, an answer with the result of another task of the kind and form."""
    results: dict[tuple[str, str], list[str]] = {}
    for kind, task in tasks:
        results.setdefault((kind, task.form), []).append(task.result)
    wrong = {}
    for i in sorted(rng.sample(range(len(tasks)), round(share * len(tasks)))):
        kind, task = tasks[i]
        others = [result for result in results[kind, task.form] if result != task.result]
        wrong[i] = task.working + (rng.choice(others) if others else _other(kind, task, rng))
    return wrong


def _other(kind: str, task: Task, rng: Random) -> str:
    """The result of a fresh task of the kind and form, for samples too small to lend one."""
    while True:
        other = KINDS[kind](rng)
        if other.form == task.form and other.result != task.result:
            return other.result


def _messages(task: Task, wrong: str | None) -> list[dict[str, str]]:
    messages = []
    for question, answer in task.turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    if wrong is not None:
        messages[-1]["content"] = wrong
    return messages
