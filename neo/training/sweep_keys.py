"""What the keys of a sweeper must be, asked before anything is run."""

from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from neo.config import ConfigError
from neo.results.metrics import metric_info

EXTRA = "needs Optuna: pip install 'llm-neo[sweeps]'"


def require_optuna(what: str) -> None:
    """Raises ConfigError where the package is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError([f"{what}: {EXTRA} ({error})"]) from error


def metric_problems(metric: Any, key: str = "metric") -> Iterator[str]:
    """What is wrong with a metric that something is to be chosen by."""
    try:
        info = metric_info(str(metric))
    except ValueError as error:
        yield f"{key}: {error}"
        return
    if info.better is None:
        yield f"{key}={metric}: has no better end to choose by"
    elif not str(metric).startswith(("val/", "eval/")):
        yield f"{key}={metric}: is not measured on rows that are held out; use one of val/"


def seed_problems(key: str, seeds: Any) -> Iterator[str]:
    """What is wrong with a list of seeds."""
    seeds = plain(seeds)
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
        yield f"{key}={seeds!r}: must be a list of integers, such as [100, 101]"
    elif len(set(seeds)) < len(seeds):
        yield f"{key}={seeds!r}: each once"


def plain(node: Any) -> Any:
    """The node of a config without OmegaConf's classes."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
