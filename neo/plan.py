"""What runs would take, before anything runs: memory per device, FLOPs and traffic per step.

Usage: python -m neo.plan [group=choice ...] [key=value ...] [offline=true] [out=FILE.md]

The arguments are those of neo.train, sweeps (-m, experiment=NAME) too. Weights are not needed, and
neither are the devices. With `offline=true` no network is, and neither are tokenizers and rows: the
paper's models are known by their architectures (`neo.models.architectures`), whose names may stand
as `student.path` and `teacher.path`; all tokens are counted as supervised. `out` keeps the plans as
Markdown. Exits with 1 where a run does not fit `trainer.device_memory_gib`, with 2 where a config
is refused.
"""

import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from hydra_plugins._neo import SWEEPERS
from neo.config import ConfigError, conf_dir, open_groups, register, resolve, run_id
from neo.models.architectures import ARCHITECTURES
from neo.models.start import is_computed
from neo.results.records import command_line
from neo.training.command_line import REFUSED, console, explain, leave, quiet
from neo.training.consistency import check_config
from neo.training.device_plan import GIB, Plan
from neo.training.meet import Meeting, build_specs
from neo.training.offline import offline_specs
from neo.training.plan_table import (
    compute_line,
    parameters_line,
    parts_of,
    plan_table,
    short,
    traffic_line,
)
from neo.training.preflight import (
    NotPlannedError,
    limit_gib,
    plan_run,
    refusal,
    sample_of,
    workload_of,
)
from neo.training.sweep import Sweep

TEXTS = ("run", "fits", "overrides")  # columns that are read from the left
LOOKING = "dry_run=true"  # what is planned is not run
# Of a run in the table of a sweep; other parts of it are in GiB.
COUNTS = ("M parameters", "M trained", "M teacher")
LEAST = GIB / 2000  # bytes of a part that is shown there
# A table of many parts is not broken to the width of a terminal.
out = Console(highlight=False, width=240)


@dataclass(frozen=True)
class Planned:
    """One run and what was found.

    Args:
        name: Its id.
        overrides: As typed or swept.
        plan: None where there is none.
        meeting: What its models are, where they go together.
        limit: GiB of a device; None where it is not known.
        problem: Why it cannot run or does not fit.
        notes: What the plan leaves open.
        refused: Its config cannot run whatever the memory.
    """

    name: str
    overrides: str
    plan: Plan | None = None
    meeting: Meeting | None = None
    limit: float | None = None
    problem: str | None = None
    notes: tuple[str, ...] = ()
    refused: bool = False


def main() -> None:
    """The command line."""
    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    planned: list[Planned] = []
    try:
        arguments, file = split_out(sys.argv[1:])
        arguments, offline = split_offline(arguments)
    except ConfigError as error:
        leave(error, 2)
    command = shlex.join(command_line(sys.argv))

    def job(composed: DictConfig) -> None:
        planned.append(plan(composed, offline=offline))

    for sweeper in SWEEPERS:
        Plugins.instance().register(sweeper)
    # A sweep's folder would be made for runs that never begin.
    with tempfile.TemporaryDirectory() as folder:
        own = [LOOKING, f"hydra.sweep.dir={folder}", "hydra/launcher=basic"]
        sys.argv[1:] = [*open_groups(arguments), *own]
        entry = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
        Sweep.only_plans = True
        try:
            entry(job)()
        except REFUSED as error:
            leave(error, 2)
        finally:
            Sweep.only_plans = False
    if planned:
        if file is not None:
            file.write_text(markdown(planned, command), encoding="utf-8")
        sys.exit(show(planned))


def split_out(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The arguments of a run, and the Markdown file that the plans are to be written to.

    Raises:
        ConfigError: There is no folder for it.

    Example:
        >>> split_out(["seed=1", "out=plan.md"])
        (['seed=1'], PosixPath('plan.md'))
    """
    kept, names = _take(arguments, "out")
    if not names:
        return kept, None
    file = Path(names[-1])
    if not file.parent.is_dir() or file.is_dir() or file.suffix != ".md":
        raise ConfigError([f"out={file}: must be a .md file in a folder that is there"])
    return kept, file


def split_offline(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments of a run, and whether it is planned offline, which is no key of a run.

    Raises:
        ConfigError: It is neither true nor false.

    Example:
        >>> split_offline(["seed=1", "offline=true"])
        (['seed=1'], True)
    """
    kept, values = _take(arguments, "offline")
    for value in values:
        if value.lower() not in ("true", "false"):
            raise ConfigError([f"offline={value}: must be true or false"])
    offline = bool(values) and values[-1].lower() == "true"
    return kept, offline


def _take(arguments: Sequence[str], key: str) -> tuple[list[str], list[str]]:
    """The arguments without a key of the plan's own, and the values that it was given."""
    kept = [a for a in arguments if not a.startswith(f"{key}=")]
    return kept, [a.partition("=")[2] for a in arguments if a.startswith(f"{key}=")]


def plan(composed: DictConfig, *, offline: bool = False) -> Planned:
    """The plan of one run.

    Args:
        composed: Its config.
        offline: The hub is not asked, nor tokenizers and rows.
    """
    overrides = ""
    if HydraConfig.initialized():
        given = HydraConfig.get().overrides.task
        overrides = " ".join(o.removeprefix("++") for o in given if o.lower() != LOOKING)
    try:
        config = resolve(composed)
        quiet()
        check_config(config, here=False)
        return _plan(config, overrides, offline=offline)
    except ConfigError as error:
        problem = explain(error)
        unread = [line for line in error.problems if "as a model of the hub it cannot" in line]
        if any(repr(name) in line for line in unread for name in ARCHITECTURES):
            problem += "\n  offline=true plans the models of the paper without the hub"
        return Planned("-", overrides, problem=problem, refused=True)


def _plan(config: dict[str, Any], overrides: str, *, offline: bool) -> Planned:
    specs = build_specs(config)
    if offline:
        specs = offline_specs(specs)
    trainer, notes = config["trainer"], []
    sample, meeting, note = sample_of(config, specs, offline=offline)
    if note is not None:
        notes.append(note)
    notes += meeting.notes
    if is_computed(specs["lora"].adapter):
        notes.append("what computing the branch's start takes, before training, is not in it")
    workload = workload_of(specs["data"], trainer, meeting.vocab, sample)
    name = run_id(config)
    try:
        found = plan_run(config, specs, workload)
    except NotPlannedError as error:
        return Planned(name, overrides, problem=f"cannot be planned: {error}", refused=True)
    limit = limit_gib(trainer, found.placement)
    problem = None if limit is None else refusal(config, specs, found, limit)
    return Planned(name, overrides, found, meeting, limit, problem, tuple(notes))


def show(planned: list[Planned]) -> int:
    """Prints what was found; returns the exit status."""
    if len(planned) == 1 and planned[0].plan is not None:
        _show_one(planned[0], planned[0].plan)
    elif any(run.plan is not None for run in planned):
        out.print(_sweep_table(planned))
    for run in planned:
        for note in run.notes if len(planned) == 1 else ():
            out.print(f"note: {note}")
    failed = [run for run in planned if run.problem is not None]
    for run in failed:
        where = f"{run.name} ({run.overrides}): " if len(planned) > 1 else ""
        console.print(f"{where}{run.problem}", markup=False)
    if any(run.refused for run in failed):
        return 2
    return 1 if failed else 0


def _show_one(run: Planned, found: Plan) -> None:
    placement, size = found.placement, found.workload
    title = f"run {run.name}, {placement.name}"
    if placement.num_processes > 1:
        title += f" on {placement.num_processes} devices"
    out.print(plan_table(found, title))
    if run.meeting is not None:
        out.print(f"parameters: {parameters_line(run.meeting)}")
    out.print(
        f"batch: {size.batch_size} x {size.length} tokens, {size.num_supervised:,} supervised, "
        f"{size.accumulate} a step"
    )
    flops = ", ".join(f"{phase} {short(n / 1e12)}" for phase, n in found.flops.items())
    out.print(f"compute: {compute_line(found)} ({flops})")
    if (traffic := traffic_line(found)) is not None:
        out.print(f"traffic: {traffic}")
    out.print(f"fits: {_verdict(run)}")


def _sweep_table(planned: list[Planned]) -> Table:
    """For a terminal."""
    title, columns, rows = _sweep(planned)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in TEXTS else "right")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(planned: list[Planned], command: str) -> str:
    """The same for a file, with the command that makes it."""
    title, columns, rows = _sweep(planned)
    rule = ["---" if column in TEXTS else "--:" for column in columns]
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows)]
    notes = dict.fromkeys(note for run in planned for note in run.notes)
    said = "".join(f"- {note}\n" for note in notes)
    return (
        f"## The plan of `{title}`\n\n" + "\n".join(lines) + "\n\n"
        "GiB of one device when it is fullest, by part; counts in millions of parameters.\n\n"
        f"- Command: `{command}`\n{said}"
    )


def _sweep(planned: list[Planned]) -> tuple[str, list[str], list[list[str]]]:
    """What all runs share, columns, and a line a run with what only some have."""
    shared = set.intersection(*(set(run.overrides.split()) for run in planned))
    title = " ".join(word for word in planned[0].overrides.split() if word in shared)
    parts: dict[str, None] = {}
    for run in planned:
        if run.plan is not None:
            parts |= dict.fromkeys(
                p for p in parts_of(run.plan) if run.plan.parts.get(p, 0) > LEAST
            )
    columns = ["run", *COUNTS, *parts, "total GiB", "TFLOP a step", "fits", "overrides"]
    rows = []
    for run in planned:
        own = " ".join(word for word in run.overrides.split() if word not in shared)
        if run.plan is None or run.meeting is None:
            empty = [""] * (len(COUNTS) + len(parts) + 2)
            rows.append([run.name, *empty, "refused", own])
            continue
        counts = (
            run.meeting.num_parameters,
            run.meeting.num_trainable_parameters,
            run.meeting.num_teacher_parameters,
        )
        rows.append(
            [
                run.name,
                *(short(count / 1e6) if count else "" for count in counts),
                *(f"{run.plan.parts.get(part, 0) / GIB:.3f}" for part in parts),
                f"{run.plan.gib:.3f}",
                short(run.plan.flops_per_step / 1e12),
                _verdict(run).partition(":")[0],
                own,
            ]
        )
    return title, columns, rows


def _verdict(run: Planned) -> str:
    if run.limit is None:
        return "not checked: trainer.device_memory_gib=null"
    return f"{'no' if run.problem else 'yes'}, of {run.limit:g} GiB"


if __name__ == "__main__":
    main()
