"""A search: Optuna proposes trials, a sweep runs them, and the study remembers them."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from neo.config import ConfigError
from neo.results.records import RunRecord, write_atomically
from neo.training.command_line import console
from neo.training.space import Choices, Space, grid, read_space, spelt, typed
from neo.training.sweep import SweepFailed
from neo.training.sweep_keys import metric_problems, plain, require_optuna, seed_problems
from neo.training.trying import Trying

if TYPE_CHECKING:
    from neo.training.study import StudySpec, Told, Trials

UNWANTED = ("interrupted", "failed", "oom")  # the others are what a search finds out


class Search(Trying):
    """Looks for the best values of some keys.

    Args:
        params: Key to what is searched (`interval`, `range`, `choice`, `tag(log, ...)`), or to the
            one value that all trials have.
        metric: What is to be best, of the validation rows.
        n_trials: How many there are to be, of all searches that share the study, failed ones too;
            null with sampler=grid is the whole grid.
        n_jobs: How many are asked for at a time, for a launcher that runs several at once.
        sampler: tpe, random or grid; or a mapping with that name and Optuna's options.
        pruner: null, median, successive_halving or hyperband; or a mapping with that name and
            Optuna's options, whose steps are optimizer steps.
        seed: Of the sampler.
        seeds: Of the runs of each trial; null for the one of the config.
        storage: The path of a journal or the URL of a database; null for a journal in the
            experiment's folder.
        study_name: null for the experiment's name.
    """

    def __init__(
        self,
        params: Any = None,  # as all others checked by `sweep`, which names every mistake at once
        metric: Any = "val/kd",
        n_trials: Any = None,
        n_jobs: Any = 1,
        sampler: Any = "tpe",
        pruner: Any = None,
        seed: Any = 0,
        seeds: Any = None,
        storage: Any = None,
        study_name: Any = None,
    ) -> None:
        super().__init__(params)
        self.metric, self.n_trials, self.n_jobs = metric, n_trials, n_jobs
        self.sampler, self.pruner, self.seed, self.seeds = sampler, pruner, seed, seeds
        self.storage, self.study_name = storage, study_name

    def sweep(self, arguments: list[str]) -> list[RunRecord | None]:
        """Runs trials until there are as many as asked for, and says which is best.

        Raises:
            ConfigError: The search or one of its corners cannot run; nothing was started.
            SweepFailed: Trials have failed, or none came to its end.
        """
        require_optuna("hydra/sweeper=optuna")
        from neo.training.study import Trials

        space, shared = self._space(arguments)
        checked = self.check([[*shared, *typed(corner)] for corner in corners(space)])
        config = checked[0].config
        if config["dry_run"]:
            return self.run_jobs([job.overrides for job in checked])
        spec = self._spec(space, config, checked[0].identity)
        folder = Path("runs") / config["experiment_name"]
        try:
            trials = Trials(spec, folder, self.n_trials)
        except ValueError as error:
            raise ConfigError([str(error)]) from error
        if config["retry"] and (num := trials.retry()):
            console.print(f"{num} trials that failed are run again")
        self.try_out([(trials, shared)], self._seeds(), self.n_jobs)
        return self._end(trials, folder)

    def _space(self, arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
        problems = list(self._problems())
        space: dict[str, Any] = {}
        shared: list[str] = []
        try:
            space, shared = read_space(self.params, arguments)
            if self._sampler()["name"] == "grid":
                list(grid(space))
        except ValueError as error:
            problems += str(error).splitlines()
        given = {key.lstrip("+") for key in (*space, *(text.split("=")[0] for text in shared))}
        own = {"prune": "a search sets it itself", "experiment_name": "one for all trials"}
        problems += [f"{key}: {why}" for key, why in own.items() if key in given & space.keys()]
        if "seed" in space or ("seed" in given and self.seeds is not None):
            problems.append("seed: a trial's seeds are given by seeds, such as seeds: [100, 101]")
        if problems:
            raise ConfigError([f"hydra.sweeper: {problem}" for problem in dict.fromkeys(problems)])
        return space, shared

    def _problems(self) -> Iterator[str]:
        yield from metric_problems(self.metric)
        for key in ("n_trials", "n_jobs"):
            value = getattr(self, key)
            if not (key == "n_trials" and value is None) and (type(value) is not int or value < 1):
                yield f"{key}={value!r}: must be an integer of at least 1"
        if type(self.seed) is not int or self.seed < 0:
            yield f"seed={self.seed!r}: must be an integer of at least 0"
        if self.seeds is not None:
            yield from seed_problems("seeds", self.seeds)
        for key in ("storage", "study_name"):
            if not isinstance(getattr(self, key), str | None):
                yield f"{key}={getattr(self, key)!r}: must be a text, or null"
        try:
            sampler = self._sampler()
            if sampler["name"] != "grid" and self.n_trials is None:
                yield "n_trials: missing; sampler=grid alone has an end of its own"
        except ValueError as error:
            yield str(error)
        try:
            self._pruner()
        except ValueError as error:
            yield str(error)

    def _sampler(self) -> dict[str, Any]:
        from neo.training.optuna_parts import SAMPLERS, build_sampler, named

        sampler = named("sampler", plain(self.sampler), SAMPLERS)
        _built("sampler", sampler, lambda: build_sampler(sampler, 0, 0))
        return sampler

    def _pruner(self) -> dict[str, Any] | None:
        from neo.training.optuna_parts import PRUNERS, build_pruner, named

        if self.pruner is None:
            return None
        legal = {name: options for name, (_, options) in PRUNERS.items()}
        pruner = named("pruner", plain(self.pruner), legal)
        _built("pruner", pruner, lambda: build_pruner(pruner))
        return pruner

    def _seeds(self) -> list[int | None]:
        return [None] if self.seeds is None else list(self.seeds)

    def _spec(self, space: Space, config: Mapping[str, Any], identity: str) -> "StudySpec":
        """The study; a run of a corner tells whether all that is not searched is the same."""
        from neo.training.study import StudySpec

        problems = []
        if config["eval_split"] == "test":
            problems.append("eval_split=test: a search answers no test rows; use null or val")
        if config["rerun"]:
            problems.append("rerun=true: trials are told once; use another experiment_name")
        if problems:
            raise ConfigError(problems)
        name = config["experiment_name"]
        return StudySpec(
            name=(self.study_name or name).replace("/", "-"),
            storage=self.storage or f"runs/{name}/optuna.journal",
            metric=self.metric,
            space=space,
            sampler=self._sampler(),
            pruner=self._pruner(),
            seed=self.seed,
            shared={"seeds": self._seeds(), "run": identity},
        )

    def _end(self, trials: "Trials", folder: Path) -> list[RunRecord | None]:
        """Says what came out, and writes the best as it can be typed."""
        told = trials.told()
        best = trials.best()
        print_trials(trials.spec, told, best)
        if best is None:
            raise SweepFailed(f"none of {len(told)} trials came to its end")
        command = shlex.join(o.removeprefix("++") for o in typed(best.point))
        write_atomically(folder / "chosen.txt", f"{command}\n".encode())
        console.print(f"best: trial {best.number}, {self.metric} {best.value:.5g}: {command}")
        console.print(f"written to {folder / 'chosen.txt'}")
        if num := sum(trial.status in UNWANTED for trial in told):
            raise SweepFailed(
                f"{num} of {len(told)} trials have failed; retry=failed runs them again"
            )
        if left := [trial.number for trial in told if trial.status == "running"]:
            mine = [number for number in left if number in trials.had]
            if mine:
                raise SweepFailed(
                    f"trials {', '.join(map(str, mine))} were interrupted; start the search again"
                )
            console.print(f"{len(left)} trials are still run by another search")
        return []


def corners(space: Space) -> list[dict[str, Any]]:
    """Points that have between them every choice, and both ends of every interval."""
    ends = {
        key: d.points() if isinstance(d, Choices) else [d.low, d.high] for key, d in space.items()
    }
    first = {key: values[0] for key, values in ends.items()}
    found = [first]
    for key, values in ends.items():
        found += [first | {key: value} for value in values[1:]]
    return found


def print_trials(spec: "StudySpec", told: Sequence["Told"], best: "Told | None") -> None:
    """A line for every trial: its value or what became of it, and its parameters."""
    table = Table(
        title=f"study {spec.name}: {len(told)} trials",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for header in ("trial", spec.metric, "", ""):
        table.add_column(header, justify="right" if header else "left", overflow="fold")
    for trial in told:
        value = "" if trial.value is None else f"{trial.value:.5g}"
        state = "" if trial.status == "ok" else f"{trial.status}: {trial.error or ''}"
        style = "bold" if trial == best else None
        table.add_row(str(trial.number), value, spelt(trial.point), state, style=style)
    console.print(table, markup=False)


def _built(key: str, spec: Mapping[str, Any], build: Any) -> None:
    try:
        build()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key}={dict(spec)}: {' '.join(str(error).split())}") from error
