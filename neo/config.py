"""The root of every run's configuration: its schema, its validation, its identity."""

import hashlib
import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

PACKAGE = Path(__file__).parent

# A config may name only these as `_target_`. What a name resolves to is checked as well, so that
# `neo.config.json.loads` does not pass for one of ours.
TARGETS = (
    "neo.data.",
    "neo.losses.",
    "neo.models.",
    "neo.teachers.",
    "neo.training.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
    "lightning.pytorch.profilers.",
    "lightning.pytorch.strategies.",
    "lightning.pytorch.trainer.",
)

# Keys that say where and how loudly a run ran; a run on another device is the same run.
WHERE_IT_RAN = (
    "logger",
    "run_dir",
    "experiment_name",
    "dry_run",
    "rerun",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
)

GROUPS = ("method", "student", "teacher", "lora", "loss", "data", "optim", "trainer", "logger")
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
    dry_run: bool = False
    rerun: bool = False


def conf_dir() -> Path:
    """The folder of configs: inside the package in a wheel, beside it in a checkout."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"


def register() -> None:
    """Makes the typed root and our resolvers known to Hydra; safe to call twice."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    OmegaConf.register_new_resolver("mul", _mul, replace=True)
    OmegaConf.register_new_resolver("auto_precision", _auto_precision, replace=True)


def _mul(a: int | float, b: int | float) -> int | float:
    """A product as one would write it down: 2e-5 * 10 is 0.0002, not 0.00020000000000000001."""
    return a * b if isinstance(a, int) and isinstance(b, int) else float(f"{a * b:.12g}")


def _auto_precision(accelerator: str) -> str:
    """Lightning's precision for the device: bf16 where a GPU has it, else fp32."""
    import torch  # here: composing a config should not wait for it

    gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if gpu and torch.cuda.is_bf16_supported() else "32-true"


def open_groups(arguments: list[str]) -> list[str]:
    """Command-line arguments that let a group take any key of its target, not only those its file has.

    Hydra refuses `student.dtype=bfloat16` where `conf/student/mini.yaml` does not mention dtype,
    unless it is typed with `++`. A misspelt key is refused by `validate`, which lists the legal ones.

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
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError([_one_line(error)]) from error
    assert isinstance(plain, dict)
    for _, node in _targets(plain):
        _widen(typing.cast(dict[str, Any], node))
    return typing.cast(dict[str, Any], plain)


def run_id(config: Mapping[str, Any]) -> str:
    """Eight hex digits that name a resolved config, whatever device it runs on.

    Example:
        >>> run_id({"seed": 0, "logger": "wandb"}) == run_id({"seed": 0, "logger": "csv"})
        True
    """
    kept = json.loads(json.dumps(config))
    for path in WHERE_IT_RAN:
        *parents, key = path.split(".")
        node = kept
        for parent in parents:
            node = node.get(parent) or {}
        node.pop(key, None)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def validate(config: Mapping[str, Any]) -> None:
    """Checks everything that can be checked without reading a model or a row.

    Every `_target_` is looked up among those allowed, its keys are bound to its signature
    (partials too), and the specs are built, which checks their ranges.

    Raises:
        ConfigError: With all problems.
    """
    problems = [p for path, node in _targets(config) for p in _bind(path, node)]
    if not problems:
        problems = [p for key in ("student", "teacher", "lora", "loss", "data", "optim")
                    for p in _build(key, config[key])]  # fmt: skip
    problems += _consistency(config)
    if problems:
        raise ConfigError(problems)


def build(node: Mapping[str, Any]) -> Any:
    """The object that a validated node describes."""
    return instantiate(dict(node), _convert_="all")


def _consistency(config: Mapping[str, Any]) -> Iterator[str]:
    """What the paper's four methods mean, against what was asked for."""
    method = config["method"]
    name, loss = method.get("name"), config["loss"]
    if name not in ("sft", "lora", "kd", "neo"):
        yield f"method.name={name!r}: must be one of sft, lora, kd, neo"
        return
    branch = config["lora"].get("_target_") != "neo.models.variants.none"
    if name in ("sft", "kd") and branch:
        yield f"lora: method={name} trains all weights; use lora=none, or method=lora or neo"
    if name in ("lora", "neo") and not branch:
        yield f"lora: method={name} trains a LoRA branch, lora=none trains all weights; choose a variant, or method=sft or kd"  # noqa: E501
    kd_ratio = loss.get("kd_ratio")
    if isinstance(kd_ratio, int | float):
        if name in ("sft", "lora") and kd_ratio != 0:
            yield f"loss.kd_ratio={kd_ratio}: method={name} has no teacher in its loss; use 0, or method=kd or neo"  # noqa: E501
        if kd_ratio > 0 and not config["teacher"].get("path"):
            yield f"teacher.path=null: loss.kd_ratio={kd_ratio} needs a teacher; set teacher.path or loss.kd_ratio=0"  # noqa: E501
    if config["eval_split"] not in (None, "val", "test"):
        yield f"eval_split={config['eval_split']!r}: must be null, val or test"
    elif config["eval_split"] and config["data"].get("_target_") != "neo.data.mini_data.MiniData":
        yield f"eval_split={config['eval_split']!r}: only data=mini has rows with exact answers"
    if config["checkpoint_every_n_steps"] < 1:
        yield f"checkpoint_every_n_steps={config['checkpoint_every_n_steps']}: must be at least 1"
    if not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", config["experiment_name"]):
        yield f"experiment_name={config['experiment_name']!r}: must be a name, it becomes a folder"
    if not 0 <= config["seed"] < 2**32:
        yield f"seed={config['seed']}: must lie in [0, 2**32)"


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
        raise ValueError(f"_target_={target!r} is not allowed; it must begin with {', '.join(TARGETS)}")
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
    keys = {k: v for k, v in node.items() if not (k.startswith("_") and k.endswith("_"))}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    # A function such as `neo.models.variants.lora` passes its keys on; it names the signature
    # they must fit in `__wrapped_signature__`.
    known = dict(signature.parameters)
    if passed_on := getattr(found, "passes_keys_to", None):
        known |= inspect.signature(passed_on).parameters
        takes_any = False
    hints = _hints(found)
    for key, value in keys.items():
        if key not in known and not takes_any:
            legal = ", ".join(sorted(k for k in known if k not in ("self", "args", "kwargs")))
            yield f"{path}.{key}: not a key of {node['_target_']}; it takes {legal}"
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
            yield text if text.startswith(f"{key}.") else f"{key}: {text}"


def _widen(node: dict[str, Any]) -> None:
    """Makes whole numbers floats where the target asks for a float, so that 0 and 0.0 are one run."""
    try:
        found = _locate(node["_target_"])
    except ValueError:
        return  # `validate` will say so
    for key, hint in _hints(found).items():
        value = node.get(key)
        options = {hint, *typing.get_args(hint)}
        if type(value) is int and float in options and int not in options:
            node[key] = float(value)


def _hints(found: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of what a class or function takes; none where they cannot be read."""
    try:
        return typing.get_type_hints(found.__init__ if inspect.isclass(found) else found)
    except (NameError, TypeError):
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value may be what a simple annotation asks for; unknown ones accept all."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
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


def _spell(hint: Any) -> str:
    return hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
