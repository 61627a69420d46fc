"""Runs -> lm-evaluation-harness and answers to your own prompts -> numbers in their records.

Usage: python -m neo.evaluate run=RUNS tasks=TASKS [models=student,base,teacher] [key=value ...]
       python -m neo.evaluate tasks=list

`run` is the folder of a run, of an experiment (all its finished runs), a glob, or a list of them.
`tasks` are names of the harness (`tasks=[arc_easy,gsm8k]`, globs too), or a set of ours: mini_lab,
paper_general, paper_math. The student is evaluated as it was trained, its adapter attached to the
untouched base, or `model/` where all weights were trained. Base and teacher get records of their
own beside the runs, which a table selects by `where: {method: base}`.

  num_fewshot=N      examples before each question (default: each task's own)
  limit=N            rows of each task, or a share below 1 (default: all)
  batch_size=N       rows at once (default auto: up to 64, as many as fit)
  device=cuda:1      one device (default auto: a GPU where there is one); several are not used
  dtype=float32      of the weights (default auto: as they are stored)
  chat=true          put the chat template around prompts (default false, as the harness)
  generate.KEY=...   of answers: temperature top_p top_k min_p repetition_penalty do_sample
                     max_gen_toks; what is not given is the task's, and then the model's own
  seed=N             of examples and of sampling (default 1234)
  include_path=DIR   task files of your own; a list of folders, too
  prompts=FILE       rows of any schema that data.path takes: the last turn of the assistant is
                     answered (or the user's last turn), with no task needed
  rerun=true         evaluate what is recorded with the same settings again

Numbers are `eval/<task>/<metric>` in record.json, with `<metric>_stderr` beside each, and the
record's `evaluations` say how they were taken; a task has those of its newest only. Answers
are kept as evaluation/<model>/<task>.jsonl beside the record. The same numbers come out of
the command of the harness that is printed.

Exit status: 0 all evaluated; 1 a task has no numbers, such as one whose rows the hub did not give;
2 what was asked for is refused, before a model is loaded.
"""

import gc
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from neo.config import ConfigError
from neo.evaluation.candidates import candidates, find_runs
from neo.evaluation.settings import Generation, Settings, batch_size_of, chosen_device
from neo.results.metrics import metric_info, stderr_name
from neo.results.printing import MISSING as NOTHING
from neo.results.printing import number


@dataclass
class EvaluateConfig:
    """What the command line takes."""

    run: Any = MISSING
    tasks: Any = None
    models: Any = "student"
    prompts: str | None = None
    num_fewshot: int | None = None
    limit: Any = None
    batch_size: Any = "auto"
    device: str = "auto"
    dtype: str = "auto"
    chat: bool = False
    generate: Generation = field(default_factory=Generation)
    seed: int = 1234
    include_path: Any = None
    rerun: bool = False


def main() -> None:
    """The command line; exits as its help says."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if {"-h", "--help"} & set(sys.argv[1:]):
        console.print(__doc__, markup=False)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        typed = OmegaConf.merge(
            OmegaConf.structured(EvaluateConfig), OmegaConf.from_cli(sys.argv[1:])
        )
        if typed.tasks == "list":
            from neo.evaluation.harness import require_harness

            require_harness()
            from neo.evaluation.task_names import listing

            print(listing())
            return
        wanted = OmegaConf.to_object(typed)
        assert isinstance(wanted, EvaluateConfig)
        failures = evaluate(wanted, console)
    except (OmegaConfBaseException, ValueError) as error:
        usage = isinstance(error, OmegaConfBaseException)
        text = f"{str(error).splitlines()[0]}\n{__doc__}" if usage else str(error)
        console.print(text, markup=False)
        sys.exit(2)
    for failure in failures:
        console.print(f"no numbers: {failure}", markup=False)
    sys.exit(1 if failures else 0)


def evaluate(wanted: EvaluateConfig, console: Console | None = None) -> list[str]:
    """Evaluates, records, prints; returns a sentence for each task that has no numbers.

    Raises:
        ValueError: What was asked for cannot be done; nothing was loaded.
    """
    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    settings = settings_of(wanted)
    names, roles = _list(wanted.tasks), _list(wanted.models)
    if not names and wanted.prompts is None:
        raise ConfigError(["tasks: name some (tasks=list shows the sets), or give prompts=FILE"])
    problems = settings.problems()
    found = []
    try:
        found = candidates(find_runs(_list(wanted.run)), roles)
    except ConfigError as error:
        problems += error.problems
    from neo.evaluation.harness import require_harness

    harness = require_harness()
    from neo.evaluation.evaluating import Evaluation  # the harness takes seconds to import

    evaluation = Evaluation(
        settings=settings,
        harness=harness,
        include_paths=[Path(p).expanduser() for p in _list(wanted.include_path)],
        rerun=wanted.rerun,
        say=lambda text: console.print(text, markup=False),
        show=lambda label, numbers: _print(console, label, numbers),
    )
    evaluation.check(found, names, wanted.prompts, problems)
    for candidate in found:
        evaluation.evaluate(candidate)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return evaluation.failures


def settings_of(wanted: EvaluateConfig) -> Settings:
    """The settings of a command.

    Raises:
        ConfigError: A value is of no legal type.
    """
    try:
        size = batch_size_of(wanted.batch_size)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    limit = wanted.limit
    if isinstance(limit, bool) or not isinstance(limit, int | float | None):
        raise ConfigError([f"limit={limit!r}: must be a number of rows, a share below 1, or null"])
    return Settings(
        num_fewshot=wanted.num_fewshot,
        limit=limit,
        batch_size=size,
        device=chosen_device(wanted.device),
        dtype=wanted.dtype,
        chat=wanted.chat,
        generation=Generation(**asdict(wanted.generate)),
        seed=wanted.seed,
    )


def _list(given: Any) -> list[str]:
    """A list, or a text with commas, as a list of texts."""
    if given is None:
        return []
    parts = given if isinstance(given, list) else str(given).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def _print(console: Console, label: str, numbers: dict[str, float | int]) -> None:
    """One line for each metric, with its standard error."""
    table = Table(title=label, title_justify="left", box=None, pad_edge=False)
    table.add_column("number")
    table.add_column("value", justify="right")
    table.add_column("± standard error", justify="right")
    for name, value in numbers.items():
        info = metric_info(name)
        if name.split("/")[2].endswith("_stderr"):
            continue
        error = numbers.get(stderr_name(name))
        unit = f" {info.printed_unit}" if info.printed_unit else ""
        decimals = info.decimals + (info.scale == 100.0)
        table.add_row(
            name,
            number(value * info.scale, decimals) + unit,
            NOTHING if error is None else number(error * info.scale, decimals),
        )
    console.print(table)


if __name__ == "__main__":
    main()
