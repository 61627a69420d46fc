"""The root of every run's configuration: its schema, its validation, its identity."""

import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

PACKAGE = Path(__file__).parent

# What each group is built from, so that a student is not made of an optimizer's config.
HOMES = {
    "student": "neo.models.causal_lm.",
    "teacher": "neo.teachers.",
    "lora": "neo.models.variants.",
    "loss": "neo.losses.distillation.",
    "data": "neo.data.",
    "optim": "neo.training.optim.",
    "trainer": "lightning.pytorch.trainer.",
    "logger": "neo.training.loggers.",
}
# A config may name nothing else as `_target_`, nor a name that one of these has only imported.
# A divergence may stand in a file of its own, neo/losses/divergences_NAME.py: hence no dot.
TARGETS = (*HOMES.values(), "neo.losses.divergences")
SPECS = ("student", "teacher", "lora", "loss", "data", "optim")
HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_")

# Keys that say where and how loudly a run ran; a run on another device is the same run.
WHERE_IT_RAN = (
    "logger", "run_dir", "experiment_name", "dry_run", "rerun", "retry", "keep_last", "keep_best",
    "prune", "distinct",
    "max_skipped_steps",  # a run it does not end is the same run
    "sharding", "torch_compile", "teacher.device", "teacher.offload", "teacher.cache",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.device_memory_gib",
)  # fmt: skip
OWN_KEYS = ("trainer.device_memory_gib",)  # which the run itself reads, and no target takes

GROUPS = ("method", "student", "teacher", "lora", "loss", "data", "optim", "trainer", "logger")
WHOLE = ("pair", "scale", "experiment")  # groups that choose and set keys of the others
_GROUP_KEY = re.compile(rf"({'|'.join(GROUPS)})\.[\w.]+=")


class ConfigError(ValueError):
    """A configuration that cannot run; holds every problem found, not only the first."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("this config cannot run:\n" + "\n".join(f"  {p}" for p in problems))


@dataclass
class RunConfig:
    """The root keys; each of the first nine is a group under `conf/`."""

    method: Any
    student: Any
    teacher: Any
    lora: Any
    loss: Any
    data: Any
    optim: Any
    trainer: Any
    logger: Any
    experiment_name: str = "default"
    run_dir: str | None = None
    seed: int = 0
    eval_split: str | None = None
    checkpoint_every_n_steps: int = 500
    keep_last: int = 1
    keep_best: int = 0
    max_skipped_steps: int = 10
    sharding: str | None = None
    torch_compile: bool = False
    dry_run: bool = False
    rerun: bool = False
    retry: str | None = None
    prune: Any = None
    distinct: list[str] | None = None


def conf_dir() -> Path:
    """The folder of configs: inside the package in a wheel, beside it in a checkout."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"


def register() -> None:
    """Makes the typed root and our resolvers known to Hydra; safe to call twice."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    OmegaConf.register_new_resolver("mul", _mul, replace=True)
    OmegaConf.register_new_resolver("auto_precision", _auto_precision, replace=True)


def _mul(a: Any, b: Any) -> int | float:
    """A product as one would write it down: 2e-5 * 10 is 0.0002, not 0.00020000000000000001."""
    if not all(isinstance(x, int | float) for x in (a, b)):
        raise ValueError(f"{a!r} times {b!r}: both must be numbers")
    return a * b if isinstance(a, int) and isinstance(b, int) else float(f"{a * b:.12g}")


def _auto_precision(accelerator: str) -> str:
    """Lightning's precision for the device: bf16 where a GPU has it, else fp32."""
    import torch  # here: composing a config should not wait for it

    gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if gpu and torch.cuda.is_bf16_supported() else "32-true"


def open_groups(arguments: list[str]) -> list[str]:
    """Arguments that let a group take any key of its target, not only those its file has.

    Hydra refuses `student.dtype=bfloat16` where `conf/student/mini.yaml` does not mention dtype,
    unless it is typed with `++`. A misspelt key is refused by `validate`, with the legal ones.

    Example:
        >>> open_groups(["-m", "lora=lora", "lora.use_rslora=true", "seed=0,1"])
        ['-m', 'lora=lora', '++lora.use_rslora=true', 'seed=0,1']
    """
    return [f"++{a}" if _GROUP_KEY.match(a) else a for a in arguments]


def resolve(config: DictConfig) -> dict[str, Any]:
    """The config as plain data with every interpolation resolved.

    Raises:
        ConfigError: An interpolation points nowhere, or a mandatory value (`???`) is missing.
    """
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ConfigError([f"{k}: missing; it has no default, so give one" for k in missing])
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError([" ".join(str(error).split())]) from error
    assert isinstance(plain, dict)
    for _, node in _targets(plain):
        _widen(typing.cast(dict[str, Any], node))
    return typing.cast(dict[str, Any], plain)


def run_id(config: Mapping[str, Any]) -> str:
    """Eight hex digits that name a config wherever it ran, but for the keys that `distinct` names.

    Example:
        >>> run_id({"seed": 0, "logger": "wandb"}) == run_id({"seed": 0, "logger": "csv"})
        True
    """
    kept = json.loads(json.dumps(config))
    for path in set(WHERE_IT_RAN) - set(kept.get("distinct") or ()):
        *parents, key = path.split(".")
        node = kept
        for parent in parents:
            node = node.get(parent) or {}
        node.pop(key, None)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def validate(config: Mapping[str, Any]) -> None:
    """Checks each group by itself, as far as that needs no model and no row.

    Raises:
        ConfigError: With all problems.
    """
    if problems := list(group_problems(config)):
        raise ConfigError(problems)


def group_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the groups, each taken by itself.

    Every `_target_` is looked up among those allowed, its keys are bound to its signature
    (partials too), and the specs are built, which checks their ranges.
    """
    for key in sorted(config.keys() - {field.name for field in dataclasses.fields(RunConfig)}):
        yield f"{key}: no such group or key"  # added with + or ++, which opens even a typed root
    for key, home in HOMES.items():
        node = config[key]
        target = node.get("_target_") if isinstance(node, Mapping) else None
        problems = [p for path, child in _targets(node, key) for p in _bind(path, child)]
        if not problems and not str(target).startswith(home):
            problems = [f"{key}._target_={target!r}: must be one of {home}"]
        elif not problems and key in SPECS:
            problems = list(_build(key, node))
        yield from problems


def build(node: Mapping[str, Any]) -> Any:
    """The object that a validated node describes."""
    return instantiate(dict(node), _convert_="all")


def _targets(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every node with a `_target_`, with the path that leads to it, outermost first."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        for key, child in node.items():
            yield from _targets(child, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _targets(child, f"{path}[{index}]")


def _locate(target: Any) -> Callable[..., Any]:
    """The class or function a `_target_` names, if it is one that a config may name."""
    if not isinstance(target, str) or not target.startswith(TARGETS):
        raise ValueError(
            f"_target_={target!r} is not allowed; it must begin with {', '.join(TARGETS)}"
        )
    module_name, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"_target_={target!r} does not exist") from error
    if not callable(found) or not f"{getattr(found, '__module__', '')}.".startswith(TARGETS):
        raise ValueError(f"_target_={target!r} is not a class or function of its module")
    return typing.cast(Callable[..., Any], found)


def _bind(path: str, node: Mapping[str, Any]) -> Iterator[str]:
    """The problems of one node's keys against the signature of its target."""
    try:
        found = _locate(node["_target_"])
    except ValueError as error:
        yield f"{path}: {error}"
        return
    signature = inspect.signature(found)
    partial = bool(node.get("_partial_"))
    keys = {k: v for k, v in node.items() if f"{path}.{k}" not in OWN_KEYS and k not in HYDRA_KEYS}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    # a function such as `neo.models.variants.lora` names the signature that its keys must fit
    known = dict(signature.parameters)
    if passed_on := getattr(found, "passes_keys_to", None):
        known |= inspect.signature(passed_on).parameters
        takes_any = False
    hints = _hints(found)
    for key, value in keys.items():
        if key not in known and (not takes_any or key.startswith("_")):
            legal = sorted(
                k
                for k, p in known.items()
                if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
                and not (partial and p.default is p.empty)  # given later
            )
            guess, takes = meant(key, legal), ", ".join(legal)
            yield f"{path}.{key}: not a key of {node['_target_']}{guess}; it takes {takes}"
        elif key in hints and not _fits(value, hints[key]):
            yield f"{path}.{key}={value!r}: must be {_spell(hints[key])}"
    for key, parameter in signature.parameters.items():
        plain = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if plain and parameter.default is parameter.empty and key not in keys and not partial:
            yield f"{path}.{key}: missing; {node['_target_']} needs it"


def _build(key: str, node: Mapping[str, Any]) -> Iterator[str]:
    """The problems that building one spec reports."""
    try:
        build(node)
    except Exception as error:
        cause = error.__cause__ if error.__cause__ is not None else error
        for line in str(cause).splitlines():
            text = line.strip()
            if not text.startswith(f"{key}."):
                text = f"{key}.{text}" if re.match(r"\w+=", text) else f"{key}: {text}"
            yield text


def _widen(node: dict[str, Any]) -> None:
    """Makes whole numbers floats where a float is asked for, so that 0 and 0.0 are one run."""
    try:
        found = _locate(node["_target_"])
    except ValueError:
        return  # `validate` will say so
    for key, hint in _hints(found).items():
        value = node.get(key)
        options = {hint, *typing.get_args(hint)}
        # in Lightning `int | float` means two things: 1 batch, 1.0 of all; never so in ours
        widens = float in options and (int not in options or node["_target_"].startswith("neo."))
        if type(value) is int and widens:
            node[key] = float(value)


def _hints(found: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of what a class or function takes; none where they cannot be read."""
    hints: dict[str, Any] = {}
    for taker in (getattr(found, "passes_keys_to", None), found):
        with suppress(NameError, TypeError):
            plain = inspect.isclass(taker) and not dataclasses.is_dataclass(taker)
            hints |= typing.get_type_hints(taker.__init__ if plain else taker)  # type: ignore[misc]
    return hints


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value may be what a simple annotation asks for; unknown ones accept all."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:
        # PEFT spells one of its values 'pissa_niter_[number of iters]'
        open_ended = tuple(arg.split("[")[0] for arg in args if "[" in str(arg))
        return value in args or (isinstance(value, str) and value.startswith(open_ended))
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    if (origin or hint) in (list, tuple, set):
        return isinstance(value, list)
    if (origin or hint) is dict:
        return isinstance(value, Mapping)
    return True


SPELT = {int: "an integer", float: "a number", str: "a text", bool: "true or false",
         type(None): "null", list: "a list", dict: "a mapping"}  # fmt: skip


def _spell(hint: Any) -> str:
    """An annotation in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(arg) for arg in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    return str(SPELT.get(origin or hint) or getattr(hint, "__name__", hint))


def meant(word: str, legal: Collection[str]) -> str:
    """A guess at what was meant, or nothing."""
    close = difflib.get_close_matches(word, legal, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
