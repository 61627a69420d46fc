"""Optuna's parts by the names a config gives them: samplers, pruners, distributions, storages.

Files that import Optuna at their top are imported by others only when they are needed: the package
is an extra.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    SuccessiveHalvingPruner,
)
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from neo.config import meant
from neo.training.space import Choices, Dimension

# Names and options are Optuna's own.
SAMPLERS = {"tpe": ("n_startup_trials", "multivariate"), "random": (), "grid": ()}
PRUNERS: dict[str, tuple[Callable[..., BasePruner], tuple[str, ...]]] = {
    "median": (
        MedianPruner, ("n_startup_trials", "n_warmup_steps", "interval_steps", "n_min_trials")),
    "successive_halving": (
        SuccessiveHalvingPruner,
        ("min_resource", "reduction_factor", "min_early_stopping_rate", "bootstrap_count")),
    "hyperband": (
        HyperbandPruner, ("min_resource", "max_resource", "reduction_factor", "bootstrap_count")),
}  # fmt: skip


def named(key: str, given: Any, legal: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Name and options of a sampler or pruner, given as a name or a mapping with `name`.

    Raises:
        ValueError: There is none of that name, or it has no such option.
    """
    node = {"name": given} if isinstance(given, str) else given
    name = str(node.get("name")) if isinstance(node, Mapping) else ""
    if name not in legal:
        raise ValueError(f"{key}={given!r}: must be {', '.join(legal)}, or a mapping with its name")
    for option in node.keys() - {"name"}:
        if option not in legal[name]:
            takes = ", ".join(legal[name]) or "none"
            raise ValueError(
                f"{key}.{option}: no option of {name}{meant(option, legal[name])}; it takes {takes}"
            )
    return dict(node)


def build_pruner(spec: Mapping[str, Any] | None) -> BasePruner:
    """Optuna's pruner; one that never prunes for None."""
    if spec is None:
        return NopPruner()
    options = {key: value for key, value in spec.items() if key != "name"}
    return PRUNERS[spec["name"]][0](**options)


def build_sampler(spec: Mapping[str, Any], seed: int, number: int) -> BaseSampler:
    """The sampler of one trial: a search that was stopped goes on to draw what it would have."""
    options = {key: value for key, value in spec.items() if key != "name"}
    drawn = (seed * 1_000_003 + number) % 2**32
    return TPESampler(seed=drawn, **options) if spec["name"] == "tpe" else RandomSampler(drawn)


def distribution(dimension: Dimension) -> BaseDistribution:
    """Optuna's words for a dimension."""
    if isinstance(dimension, Choices):
        return CategoricalDistribution(dimension.values)
    if dimension.whole:
        step = 1 if dimension.step is None else int(dimension.step)
        return IntDistribution(int(dimension.low), int(dimension.high), dimension.log, step)
    return FloatDistribution(dimension.low, dimension.high, dimension.log, dimension.step)


def suggest(trial: optuna.Trial, key: str, dimension: Dimension) -> Any:
    """The trial's value of a dimension: drawn now, or what was drawn before."""
    drawn = distribution(dimension)
    if isinstance(drawn, CategoricalDistribution):
        return trial.suggest_categorical(key, drawn.choices)
    if isinstance(drawn, IntDistribution):
        return trial.suggest_int(key, drawn.low, drawn.high, step=drawn.step, log=drawn.log)
    assert isinstance(drawn, FloatDistribution)
    return trial.suggest_float(key, drawn.low, drawn.high, step=drawn.step, log=drawn.log)


def open_storage(place: str, *, there: bool = False) -> BaseStorage:
    """The journal at a path, or the database at a URL.

    Raises:
        ValueError: The journal should be there and is not, or the URL is none.
    """
    if "://" in place:
        try:
            return RDBStorage(place)
        except Exception as error:  # of SQLAlchemy, or of whatever driver the URL names
            raise ValueError(f"storage={place}: {' '.join(str(error).split())}") from error
    # absolute: Optuna looks at the age of a lock left behind by whatever path it was given
    path = Path(place).absolute()
    if there and not path.is_file():
        raise ValueError(f"storage={place}: there is no such journal")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileOpenLock(str(path))
    backend = JournalFileBackend(str(path), lock_obj=lock)
    _mend(path, lock)
    return JournalStorage(backend)


def _mend(path: Path, lock: JournalFileOpenLock) -> None:
    """Cuts off a last line that was torn by a full disk or a power cut, which hides all others."""
    if _is_torn(path):
        lock.acquire()
        try:
            if _is_torn(path):
                content = path.read_bytes()
                with path.open("r+b") as file:
                    file.truncate(content.rfind(b"\n") + 1)
        finally:
            with suppress(RuntimeError):
                lock.release()


def _is_torn(path: Path) -> bool:
    return not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
