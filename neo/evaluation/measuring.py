"""One unit of tasks on one model: the harness's numbers, at the largest batch that fits."""

import gc
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from neo.evaluation.harness import quiet_harness
from neo.evaluation.loading import Loaded, TooLarge, out_of_memory
from neo.evaluation.settings import LARGEST_BATCH, Settings

DEFAULT_MAX_GEN_TOKS = 256  # the harness's, for tasks that say none


class UnitFailed(RuntimeError):
    """Why a task, or a group, has no numbers; the others are not touched."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A task or a group whose rows are here.

    Attributes:
        name: As it is typed.
        tasks: The tasks that make it up, by name.
        groups: It and the groups below it, where it is one.
    """

    name: str
    tasks: Mapping[str, Task]
    groups: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came out of a unit.

    Attributes:
        numbers: By the names of `neo.results.metrics`.
        tasks: Each task and group with numbers: its version, shots and rows.
        samples: By task, what the harness keeps of each row.
        batch_size: That fitted.
        num_cut: Prompts that were cut off at their left, being too long for the model.
    """

    numbers: dict[str, float]
    tasks: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]] = field(repr=False)
    batch_size: int
    num_cut: int
    seconds: float


def load_unit(name: str, manager: TaskManager) -> Unit:
    """The unit with its rows, which the hub is asked for.

    Raises:
        UnitFailed: They cannot be had.
    """
    try:
        with quiet_harness():
            loaded = manager.load([name])
    except Exception as error:  # whatever network, data set and task file raise
        raise UnitFailed(f"{name}: its rows cannot be loaded: {_first_line(error)}") from error
    return Unit(name=name, tasks=loaded["tasks"], groups=loaded.get("groups", {}))


def room_problems(unit: Unit, settings: Settings, length: int) -> list[str]:
    """What of the unit leaves no room for a prompt in a model of so many tokens."""
    found = []
    for name, task in unit.tasks.items():
        if task.OUTPUT_TYPE != "generate_until":
            continue
        asked = dict(task.get_config("generation_kwargs") or {}) | settings.generation.given()
        with quiet_harness():
            longest = normalize_gen_kwargs(asked, DEFAULT_MAX_GEN_TOKS)["max_gen_toks"]
        if longest >= length:
            found.append(
                f"tasks: {name} may answer in {longest} tokens, and the model takes {length} in "
                f"all: give generate.max_gen_toks, less than {length}"
            )
    return found


def measure(
    loaded: Loaded, unit: Unit, settings: Settings, say: Callable[[str], None] = print
) -> Measured:
    """Runs the unit on the model.

    Where memory runs out the whole unit begins again with half as many rows at once, so that all
    its numbers are of one batch size: the last bits of a likelihood depend on it.

    Raises:
        UnitFailed: The harness cannot run it, or memory is too small for a single row.
    """
    size = settings.batch_size or LARGEST_BATCH
    began = time.perf_counter()
    while True:
        try:
            results, num_cut = _run(loaded, unit, settings, size)
            break
        except TooLarge as error:
            smaller, why = error.fits, "would likely not fit"
        except Exception as error:
            if not out_of_memory(error):
                raise UnitFailed(f"{unit.name}: {_first_line(error)}") from error
            smaller, why = size // 2, "ran out of memory"
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if settings.batch_size is not None:
            raise UnitFailed(
                f"{unit.name}: batch_size={settings.batch_size} {why}; batch_size=auto finds one"
            )
        if smaller < 1:
            raise UnitFailed(f"{unit.name}: a single row {why} on {settings.device}")
        size = 2 ** (smaller.bit_length() - 1)
        say(f"{unit.name}: {size} rows at once")
    return Measured(
        numbers=numbers_of(results["results"]),
        tasks=_tasks(results),
        samples=results["samples"],
        batch_size=size,
        num_cut=num_cut,
        seconds=round(time.perf_counter() - began, 3),
    )


def numbers_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The harness's numbers as `eval/<task>/<metric>`, standard errors as `<metric>_stderr`.

    A metric that was taken behind a named filter of the answers has its name as a third part.

    Example:
        >>> numbers_of({"gsm8k": {"alias": "x", "exact_match,strict-match": 0.5,
        ...                       "exact_match_stderr,strict-match": "N/A"}})
        {'eval/gsm8k/exact_match/strict-match': 0.5}
    """
    found = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or isinstance(value, str) or not hasattr(value, "__float__"):
                continue
            parts = [task, metric, *([] if kind in ("none", "") else [kind])]
            found["/".join(["eval", *(re.sub(r"[^\w.+-]", "_", part) for part in parts)])] = float(
                value
            )
    return found


def _run(loaded: Loaded, unit: Unit, settings: Settings, size: int) -> tuple[Any, int]:
    """The harness's results, and how many prompts it cut."""
    loaded.lm.batch_size_per_gpu = size
    loaded.lm.guard = settings.batch_size is None
    for task in unit.tasks.values():
        _prepare(task, settings)
    loaded.state.set()
    with quiet_harness() as cut:
        results = evaluate(
            lm=loaded.lm,
            task_dict={"tasks": unit.tasks, "groups": unit.groups},
            limit=settings.limit,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=settings.chat,
        )
    assert results is not None
    return results, cut.num


def _prepare(task: Task, settings: Settings) -> None:
    """Sets in the task what the harness's command sets from its options.

    As there, a task whose own file says no shots keeps to that.
    """
    if task.OUTPUT_TYPE == "generate_until" and (given := settings.generation.given()):
        task.set_config(key="generation_kwargs", value=given, update=True)
    own = task.get_config("num_fewshot")
    if settings.num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=settings.seed)


def _tasks(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, values in results["results"].items():
        known = {
            "version": _plain(results["versions"].get(name)),
            "num_fewshot": _plain(results["n-shot"].get(name)),
            "num_rows": _plain(values.get("sample_len")),
        }
        found[name] = {key: value for key, value in known.items() if value is not None}
    return found


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else str(value)


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
