"""A fair comparison: each choice at a rate of its own, found alike, then over paired seeds."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from neo.config import ConfigError, open_groups
from neo.results.choice import Choice, choose, notes, overrides
from neo.results.records import RunRecord, read_record, write_atomically
from neo.results.summary import lookup, spell
from neo.results.table_spec import ChooseSpec, RowSpec
from neo.training.command_line import console
from neo.training.compare_checks import (
    SAME,
    refuse_second_look,
    refuse_unequal,
    refuse_unfinished,
)
from neo.training.compare_table import write_table
from neo.training.space import Choices
from neo.training.sweep import POLL_S, SweepFailed
from neo.training.sweep_check import Job
from neo.training.sweep_keys import metric_problems, plain, require_optuna, seed_problems
from neo.training.trying import Trying

SEARCH_KEYS = ("key", "values", "seeds", "metric")
HALVING_KEYS = ("factor", "first")


class Compare(Trying):
    """Compares choices of a group (or values of a key), fair by construction.

    First each choice is run at every rate of one grid, with seeds that are not reported; no test
    row is answered. Then each is run at its best rate, all with the same seeds.

    Args:
        over: The group or key that is compared.
        choices: Of it.
        baseline: The choice that the others are compared with.
        search: `key`, `values`, `seeds` and `metric` of the first stage.
        seeds: Of the second.
        halving: None, or `factor` and `first`: behind step `first`, and again behind `factor` times
            as many, a rate goes on if its first seed is among the best 1 in `factor` of those of
            its choice that came as far before it. That is Optuna's asynchronous halving, in the
            order of the grid: it never stops the first rate, and saves more the earlier in the
            grid a good one stands. What is stopped can only be worse at that step.
        params: None: a comparison makes its own runs.
    """

    def __init__(
        self,
        over: Any,
        choices: Any,
        baseline: Any,
        search: Any,
        seeds: Any,
        halving: Any = None,
        params: Any = None,
    ) -> None:
        super().__init__(params)
        self.over, self.choices, self.baseline = over, plain(choices), plain(baseline)
        self.search, self.seeds, self.halving = plain(search), plain(seeds), plain(halving)

    def sweep(self, arguments: list[str]) -> list[RunRecord | None]:
        """Runs both stages, and renders the table.

        Raises:
            ConfigError: The comparison is not a fair one, or some runs cannot run; none was
                started.
            SweepFailed: A choice has no rate, or runs have failed.
        """
        shared = self._shared(arguments)
        grid: list[Any] = self.search["values"]
        first = self._searched(shared, dict.fromkeys(self.choices, grid))
        final = self._final(shared, dict.fromkeys(self.choices, grid[:1]))
        checked = self.check([job for jobs in (first, final) for job in jobs.values()])
        if checked[0].config["dry_run"]:
            return self.run_jobs([*first.values(), *final.values()])
        refuse_unequal([job.config for job in checked], self.over)
        steps = checked[0].config["trainer"]["max_steps"]
        if self.halving is not None and 0 < steps <= self.halving["first"]:
            raise ConfigError(
                [
                    f"hydra.sweeper.halving.first={self.halving['first']}: must be less than "
                    f"trainer.max_steps={steps}, or nothing is ever stopped"
                ]
            )
        name = checked[-1].config["experiment_name"]
        folder = Path("runs") / name
        searched = checked[: len(first)]
        if self.halving is None:
            self.run_jobs(list(first.values()))
        else:
            self._halve(shared, f"{name}_search", dict(zip(first, searched, strict=True)))
        refuse_unfinished(dict(zip(first, searched, strict=True)))
        runs = [
            read_record(job.folder / "record.json")
            for job in searched
            if (job.folder / "record.json").exists()
        ]
        chosen, without = self._choose(runs)
        jobs = self._final(shared, {choice.value: [choice.setting] for choice in chosen})
        last = self.check(list(jobs.values())) if jobs else []
        if last:
            now = {choice: job.config for (choice, _, _), job in zip(jobs, last, strict=True)}
            refuse_second_look(folder, self.over, self.search["key"], now)
        self._write_choice(chosen, without, folder)
        if self.baseline in without or len(chosen) < 2:
            raise SweepFailed("there is nothing to compare:\n  " + "\n  ".join(without.values()))
        records = self.run_checked(last)
        found = [record for record in records if record is not None]
        text = write_table(folder, self.over, self.search, self.baseline, chosen, found,
                           notes(self._choose_spec(), chosen), self.halving)  # fmt: skip
        console.print(text, markup=False)
        console.print(f"written to {folder}; python -m neo.report {name} experiments=runs draws it")
        if without:
            raise SweepFailed("left out:\n  " + "\n  ".join(without.values()))
        return self.finish(records)

    def _shared(self, arguments: list[str]) -> list[str]:
        """The overrides of all runs.

        Raises:
            ConfigError: With all that is wrong with the keys and with what was typed.
        """
        problems = [f"hydra.sweeper.{problem}" for problem in self._problems()]
        own = {"seed": "seeds and search.seeds", "prune": "halving",
               str(self.over): "choices", str(self._key()): "search.values"}  # fmt: skip
        for text in arguments:
            try:
                override = OverridesParser.create().parse_override(text)
            except HydraException as error:
                problems.append(f"{text}: {' '.join(str(error).split())}")
                continue
            key = override.key_or_group
            if key in own:
                problems.append(f"{key}: is given by hydra.sweeper.{own[key]}")
            elif override.is_sweep_override():
                problems.append(f"{key}: is one value for all runs; a comparison sweeps by itself")
        if self.halving is not None and not problems:
            require_optuna("hydra.sweeper.halving")
        if problems:
            raise ConfigError(problems)
        return arguments

    def _problems(self) -> Iterator[str]:
        if not isinstance(self.over, str) or not self.over:
            yield f"over={self.over!r}: must be a group or key, such as lora"
        elif self.over.split(".")[0] in SAME:
            yield f"over={self.over}: belongs to the budget, which is the same for all"
        values = self.choices
        if (
            not isinstance(values, list)
            or len(values) < 2
            or len(set(map(str, values))) < len(values)
        ):
            yield f"choices={values!r}: must be two or more, each once"
        elif self.baseline not in values:
            legal = ", ".join(map(str, values))
            yield f"baseline={self.baseline!r}: is none of the choices; they are {legal}"
        if self.params:
            yield "params: a comparison makes its own runs; what all have is typed without a sweep"
        yield from seed_problems("seeds", self.seeds)
        if isinstance(self.seeds, list) and len(self.seeds) < 2:
            yield f"seeds={self.seeds}: two at least, or a difference has no interval"
        if not isinstance(self.search, dict) or self.search.keys() != set(SEARCH_KEYS):
            yield f"search={self.search!r}: must have the keys {', '.join(SEARCH_KEYS)}"
        else:
            yield from self._search_problems()
        yield from self._halving_problems()

    def _search_problems(self) -> Iterator[str]:
        key, values, seeds = (self.search[name] for name in ("key", "values", "seeds"))
        if not isinstance(key, str) or key in (self.over, "seed"):
            yield f"search.key={key!r}: must be a key besides what is compared, such as optim.lr"
        if not isinstance(values, list) or not values or any(
            type(v) not in (int, float) for v in values
        ) or len(set(values)) < len(values):  # fmt: skip
            yield f"search.values={values!r}: must be a list of numbers, each once"
        yield from seed_problems("search.seeds", seeds)
        yield from metric_problems(self.search["metric"], "search.metric")
        if not str(self.search["metric"]).startswith("val/"):
            yield f"search.metric={self.search['metric']}: is not of the validation rows"
        if all(isinstance(s, list) for s in (seeds, self.seeds)) and set(seeds) & set(self.seeds):
            both = ", ".join(str(seed) for seed in seeds if seed in self.seeds)
            yield f"seeds: {both} are seeds of the search, too; what is chosen by is not reported"

    def _halving_problems(self) -> Iterator[str]:
        halving = self.halving
        if halving is None:
            return
        if not isinstance(halving, dict) or halving.keys() != set(HALVING_KEYS):
            yield f"halving={halving!r}: must be null, or have the keys {', '.join(HALVING_KEYS)}"
            return
        for name, least in (("factor", 2), ("first", 1)):
            if type(halving[name]) is not int or halving[name] < least:
                yield f"halving.{name}={halving[name]!r}: must be an integer of at least {least}"

    def _key(self) -> Any:
        return self.search.get("key") if isinstance(self.search, dict) else None

    def _searched(
        self, shared: list[str], rates: Mapping[Any, list[Any]]
    ) -> dict[tuple[Any, Any, int], list[str]]:
        """The first stage: no run of it answers test rows."""
        assert self.config is not None
        own = [f"experiment_name={self.config['experiment_name']}_search", "eval_split=null"]
        return self._jobs(shared, rates, self.search["seeds"], own)

    def _final(
        self, shared: list[str], rates: Mapping[Any, list[Any]]
    ) -> dict[tuple[Any, Any, int], list[str]]:
        """The second stage, of what was chosen."""
        return self._jobs(shared, rates, self.seeds, [])

    def _jobs(
        self, shared: list[str], rates: Mapping[Any, list[Any]], seeds: list[int], own: list[str]
    ) -> dict[tuple[Any, Any, int], list[str]]:
        jobs = {}
        for choice in rates:
            for rate, seed in itertools.product(rates[choice], seeds):
                typed = open_groups(
                    [f"{self.over}={spell(choice)}", f"{self.search['key']}={spell(rate)}"]
                )
                jobs[choice, rate, seed] = [*shared, *own, *typed, f"seed={seed}"]
        return jobs

    def _halve(
        self, shared: list[str], name: str, jobs: Mapping[tuple[Any, Any, int], Job]
    ) -> None:
        """The first stage, where hopeless rates are stopped early: one study a choice."""
        from neo.training.study import StudySpec, Trials

        seeds, searches = self.search["seeds"], []
        for choice in self.choices:
            own = [f"experiment_name={name}", "eval_split=null"]
            own += open_groups([f"{self.over}={spell(choice)}"])
            spec = StudySpec(
                name=f"{self.over}-{spell(choice)}".replace("/", "-"),
                storage=f"runs/{name}/optuna.journal",
                metric=self.search["metric"],
                space={self.search["key"]: Choices(tuple(map(spell, self.search["values"])))},
                sampler={"name": "grid"},
                pruner={
                    "name": "successive_halving",
                    "min_resource": self.halving["first"],
                    "reduction_factor": self.halving["factor"],
                },
                shared={
                    "seeds": seeds,
                    "run": jobs[choice, self.search["values"][0], seeds[0]].identity,
                },
            )
            trials = Trials(spec, Path("runs") / name, None)
            if next(iter(jobs.values())).config["retry"]:
                trials.retry()
            searches.append((trials, [*shared, *own]))
        self.try_out(searches, seeds)
        while any(trials.others() for trials, _ in searches):  # another comparison's, or left by it
            time.sleep(POLL_S)
            self.try_out(searches, seeds)

    def _choose_spec(self) -> ChooseSpec:
        return ChooseSpec(by=self.over, key=self.search["key"], metric=self.search["metric"])

    def _choose(self, runs: Sequence[RunRecord]) -> tuple[list[Choice], dict[Any, str]]:
        """What was chosen, and why there is no choice for some."""
        spec, chosen, without = self._choose_spec(), [], {}
        for choice in self.choices:
            own = [run for run in runs if lookup(run, self.over) == choice]
            where = {self.over: [choice], self.search["key"]: list(self.search["values"])}
            try:
                chosen += choose(spec, [RowSpec(label=spell(choice), where=where)], own)
            except ValueError as error:
                without[choice] = f"{self.over}={spell(choice)}: its search is incomplete: {error}"
        return chosen, without

    def _write_choice(
        self, chosen: Sequence[Choice], without: Mapping[Any, str], folder: Path
    ) -> None:
        spec = self._choose_spec()
        said = [*notes(spec, chosen), *without.values()] if chosen else list(without.values())
        for line in said:
            console.print(line, markup=False)
        comments = "".join(f"# {line}\n" for text in said for line in text.splitlines() if line)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "chosen.txt", (comments + overrides(spec, chosen)).encode())
