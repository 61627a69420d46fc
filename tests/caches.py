"""Caches for tests: small models, written in this process or in forked ones that may be killed."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from fits import settings
from lab import compose_raw
from omegaconf import DictConfig, OmegaConf

from neo.cache import write_cache
from neo.training import cache_estimate

# Of questions and answers of many lengths; every seventh has nothing to learn from.
ROWS = [
    {"prompt": f"What is {i} + {i * 7 % 13}?", "completion": f"It is {i + i * 7 % 13}. " * (i % 7)}
    for i in range(60)
]
NUM_BAD = 9
KINDS: dict[str, tuple[str, ...]] = {
    "projected": (),
    "int8": ("teacher.kind=projected", "teacher.values=int8"),
    "hidden": ("teacher.kind=hidden",),
    "top_k": ("teacher.kind=top_k", "teacher.k=5"),
    "top_p": ("teacher.kind=top_p", "teacher.p=0.5"),
    "sampled": ("teacher.kind=sampled", "teacher.samples=6", "teacher.k=2"),
}


def typed(student: Path, teacher: Path, rows: Path, *more: str) -> list[str]:
    """The overrides of a cache, as they are typed."""
    own = (f"data.path={rows}", "data.batch_size=4")
    return settings(student, teacher, rows.parent / "run", *own, *more)


def composed(overrides: Sequence[str]) -> DictConfig:
    """The config of a command line; Hydra is asked once for each choice of groups."""
    groups = tuple(o for o in overrides if "." not in o.partition("=")[0])
    config = _composed(groups).copy()
    OmegaConf.set_struct(config, False)
    for override in overrides:
        key, _, value = override.partition("=")
        if "." in key:
            OmegaConf.update(config, key, yaml.safe_load(value), force_add=True)
    return config


@cache
def _composed(groups: tuple[str, ...]) -> DictConfig:
    return compose_raw(*groups)


def write(out: Path, overrides: Sequence[str]) -> None:
    """What `python -m neo.cache ... out=OUT` does, in this process."""
    write_cache(composed(overrides), out)


@contextmanager
def small_shards(rows: int = 8) -> Iterator[None]:
    """Within it no shard of a cache that is begun has more rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_estimate, "LEAST_BATCHES", 1)
        patch.setattr(cache_estimate, "LEAST_SHARDS", -(-len(ROWS) // rows))
        yield


def forked(out: Path, overrides: Sequence[str], before: Callable[[], Any] = lambda: None) -> Any:
    """The same in a process of its own, which need not import everything again; started.

    Args:
        out: The folder.
        overrides: As typed.
        before: Is called there first.
    """

    def run() -> None:
        before()
        write(out, overrides)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
