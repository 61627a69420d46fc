"""A search's memory: Optuna's study, in a journal or a database that several searches may share."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState

from neo.results.metrics import metric_info
from neo.training.optuna_parts import build_sampler, open_storage, suggest
from neo.training.space import Space, grid

# A trial whose parameters are at fault counts as worse than all that came to their end: as FAIL the
# sampler would learn nothing from it, and ask for its like again.
AT_FAULT = ("oom", "diverged")
RETRIED = ("failed", *AT_FAULT)


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """What makes a study; two searches share one if all of it is the same.

    Attributes:
        name: In the storage.
        storage: The path of a journal, or the URL of a database, such as sqlite:///search.db.
        metric: Of a run's record; it knows its own direction.
        space: What is searched.
        sampler: Name and options.
        pruner: Name and options; None lets every trial come to its end.
        seed: Of the sampler.
        shared: What all trials have in common, to be told apart from another study's.
    """

    name: str
    storage: str
    metric: str
    space: Space
    sampler: Mapping[str, Any]
    pruner: Mapping[str, Any] | None = None
    seed: int = 0
    shared: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """What is kept in the storage, in plain JSON types."""
        space = {key: repr(dimension) for key, dimension in self.space.items()}
        pruner = None if self.pruner is None else dict(self.pruner)
        kept = {"metric": self.metric, "space": space, "sampler": dict(self.sampler),
                "pruner": pruner, "seed": self.seed, **self.shared}  # fmt: skip
        return dict(json.loads(json.dumps(kept)))


@dataclass(frozen=True)
class Asked:
    """A trial that this process has to run."""

    number: int
    point: dict[str, Any]


@dataclass(frozen=True)
class Told:
    """A trial of the study; `value` is None where it has none, or not yet."""

    number: int
    point: dict[str, Any]
    status: str  # of a record, or "running"
    value: float | None
    error: str | None


class Trials:
    """The trials of a study, which any number of searches on the same folder ask for.

    A trial belongs to the process that holds its file lock. One that is running in the storage and
    whose lock is free was left by a search that died: it is handed out again as it was.

    Args:
        spec: The study; made where it is not there.
        folder: Of the file locks.
        num: How many trials there are to be, with those of other searches; None for a whole grid.

    Raises:
        ValueError: The study is there with other settings.
    """

    def __init__(self, spec: StudySpec, folder: Path, num: int | None) -> None:
        self.spec, self.num = spec, num
        self.locks = folder / ".trials"
        self.locks.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.locks / f"{spec.name}.lock")
        self.had: dict[int, FileLock] = {}  # held until the trial is told
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        better = metric_info(spec.metric).better
        with self.lock:
            self.storage = open_storage(spec.storage)
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=spec.name,
                direction="maximize" if better == "higher" else "minimize",
                load_if_exists=True,
            )
            self._agree()
            if spec.sampler["name"] == "grid":
                known = [_point_of(trial) for trial in self._all()]
                for point in itertools.islice(grid(spec.space), num):
                    if point not in known:
                        self.study.enqueue_trial(point)

    def _agree(self) -> None:
        settings, kept = self.spec.settings(), self.study.user_attrs.get("search")
        if kept is None:
            self.study.set_user_attr("search", settings)
        elif kept != settings:
            differing = [
                f"{key}: {kept.get(key)!r} then, {settings.get(key)!r} now"
                for key in {**kept, **settings}
                if kept.get(key) != settings.get(key)
            ]
            raise ValueError(
                f"study {self.spec.name!r} in {self.spec.storage} was begun otherwise: "
                f"{'; '.join(differing)}. Choose another experiment_name or study_name"
            )

    def ask(self, most: int) -> list[Asked]:
        """Up to so many trials to run: those that a dead search left, then new ones."""
        with self.lock:
            asked: list[Asked] = []
            for trial in self._all(TrialState.RUNNING):
                if len(asked) < most and (left := self._own(trial.number)) is not None:
                    asked.append(left)
            while len(asked) < most and self._is_one_due():
                number = len(self._all())
                self.study.sampler = build_sampler(self.spec.sampler, self.spec.seed, number)
                new = self._own(self.study.ask().number)
                assert new is not None
                asked.append(new)
            return asked

    def _is_one_due(self) -> bool:
        trials = self._all()
        if any(trial.state == TrialState.WAITING for trial in trials):  # of a grid, or to retry
            return True
        num = sum("retry_of" not in trial.user_attrs for trial in trials)
        return self.spec.sampler["name"] != "grid" and (self.num is None or num < self.num)

    def _own(self, number: int) -> Asked | None:
        """The trial with its parameters, unless it is somebody's, or was this process's."""
        lock = FileLock(self.locks / f"{self.spec.name}-{number}.lock")
        try:
            if number in self.had:
                return None
            lock.acquire(timeout=0)
        except Timeout:
            return None
        self.had[number] = lock
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(self._id, number)
        self.study.sampler = build_sampler(self.spec.sampler, self.spec.seed, number)
        trial = optuna.Trial(self.study, trial_id)
        point = {}
        for key, dimension in self.spec.space.items():  # drawn now, or what was drawn before
            point[key] = suggest(trial, key, dimension)
        return Asked(number, point)

    def tell(self, asked: Asked, status: str, value: float | None, error: str | None) -> None:
        """Notes how a trial ended, by the status of its record; an interrupted one is left."""
        try:
            if status == "interrupted":
                return
            trial_id = self.storage.get_trial_id_from_study_id_trial_number(
                self._id, asked.number)  # fmt: skip
            self.storage.set_trial_user_attr(trial_id, "status", status)
            self.storage.set_trial_user_attr(trial_id, "error", error)
            if status == "ok":
                self.study.tell(asked.number, value)
            elif status == "pruned" or status in AT_FAULT:
                self.study.tell(asked.number, state=TrialState.PRUNED)
            else:
                self.study.tell(asked.number, state=TrialState.FAIL)
        finally:
            self.had[asked.number].release()

    def retry(self) -> int:
        """Puts trials that failed into the queue again; returns how many."""
        with self.lock:
            trials = self._all()
            again = {trial.user_attrs.get("retry_of") for trial in trials}
            failed = [
                trial
                for trial in trials
                if trial.user_attrs.get("status") in RETRIED and trial.number not in again
            ]
            for trial in failed:
                self.study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})
            return len(failed)

    def others(self) -> bool:
        """Whether other processes run trials, or have left them."""
        return any(trial.number not in self.had for trial in self._all(TrialState.RUNNING))

    def told(self) -> list[Told]:
        """All trials that have begun, by number; of one that was run again, the last."""
        again = {trial.user_attrs.get("retry_of") for trial in self._all()}
        return [
            Told(
                trial.number,
                {key: trial.params[key] for key in self.spec.space if key in trial.params},
                trial.user_attrs["status"] if trial.state.is_finished() else "running",
                trial.value if trial.state == TrialState.COMPLETE else None,
                trial.user_attrs.get("error"),
            )
            for trial in self._all()
            if trial.state != TrialState.WAITING and trial.number not in again
        ]

    def best(self) -> Told | None:
        """The best of the trials that came to their end."""
        pick = max if metric_info(self.spec.metric).better == "higher" else min
        ended = [trial for trial in self.told() if trial.value is not None]
        return pick(ended, key=lambda trial: trial.value, default=None)  # type: ignore[arg-type, return-value]

    @property
    def _id(self) -> int:
        return self.storage.get_study_id_from_name(self.spec.name)

    def _all(self, *states: TrialState) -> Sequence[FrozenTrial]:
        return self.storage.get_all_trials(self._id, deepcopy=False, states=states or None)


def _point_of(trial: FrozenTrial) -> dict[str, Any]:
    fixed: dict[str, Any] = trial.system_attrs.get("fixed_params", trial.params)
    return fixed
