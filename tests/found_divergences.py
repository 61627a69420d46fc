"""Every divergence there is, found in neo/losses and conf/loss: a new one is in no list."""

import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import neo.losses
from neo.config import build, conf_dir
from neo.losses.divergences import adaptive_kl, jsd, skew_forward_kl, skew_reverse_kl

# Public functions of divergences.py that are none.
OTHERS = ("cross_entropy", "adaptive_weights")
# Values besides the defaults that the laws are tried at.
AT_OTHER_VALUES = {
    "jsd_0.1": functools.partial(jsd, beta=0.1),
    "jsd_0.9": functools.partial(jsd, beta=0.9),
    "skew_forward_kl_0.6": functools.partial(skew_forward_kl, skew=0.6),
    "skew_reverse_kl_0.6": functools.partial(skew_reverse_kl, skew=0.6),
    "adaptive_kl_0.8": functools.partial(adaptive_kl, head_mass=0.8),
}


def divergence_functions() -> dict[str, Callable[..., Any]]:
    """Every public function that a file neo/losses/divergences*.py defines, by its name."""
    found = {}
    for folder in neo.losses.__path__:
        for file in sorted(Path(folder).glob("divergences*.py")):
            module = importlib.import_module(f"neo.losses.{file.stem}")
            for name, function in inspect.getmembers(module, inspect.isfunction):
                mine = function.__module__ == module.__name__ and not name.startswith("_")
                if mine and name not in OTHERS:
                    found[name] = function
    return found


def chosen_divergences() -> dict[str, Callable[..., Any]]:
    """The divergence of every file in conf/loss, by `loss=NAME`, where it states one."""
    files = sorted((conf_dir() / "loss").glob("*.yaml"))
    nodes = {f"loss={file.stem}": OmegaConf.load(file).get("divergence") for file in files}
    return {name: build(node) for name, node in nodes.items() if node is not None}


def function_of(divergence: Callable[..., Any]) -> Callable[..., Any]:
    """The function that a partial is of; of another function itself."""
    return divergence.func if isinstance(divergence, functools.partial) else divergence


def all_divergences() -> dict[str, Callable[..., Any]]:
    """The functions as they are, and what conf/loss calls with values that are not theirs."""
    functions = divergence_functions()
    others = {}
    for name, divergence in chosen_divergences().items():
        function = function_of(divergence)
        given = getattr(divergence, "keywords", {})
        values = {key: p.default for key, p in inspect.signature(function).parameters.items()}
        if function not in functions.values() or given != {key: values.get(key) for key in given}:
            others[name] = divergence
    return functions | others
