"""What the parts of a run's config must be to each other: methods, teacher, branch, answers."""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch

from neo.config import SPECS, WHERE_IT_RAN, ConfigError, group_problems
from neo.models.quantization import quantization_problems
from neo.teachers.device import device_problems
from neo.training.devices import num_processes, on_gpu
from neo.training.loggers import logger_problems
from neo.training.pruning import prune_problems
from neo.training.strategies import SHARDINGS
from neo.training.trainer import trainer_problems

CACHED = "neo.teachers.cached.CachedTeacher"
METHODS = ("sft", "lora", "kd", "neo")


def check_config(config: Mapping[str, Any], *, here: bool = True) -> None:
    """Checks all that needs no model and no row.

    Args:
        config: Of a run.
        here: The run is for this machine, whose devices and libraries are asked for.

    Raises:
        ConfigError: With all problems.
    """
    problems = list(group_problems(config))
    if not any(problem.startswith("trainer") for problem in problems):
        problems += trainer_problems(config["trainer"], here=here)
    if here and not any(problem.startswith("logger") for problem in problems):
        problems += logger_problems(config["logger"])
    if not all(isinstance(config[key], dict) for key in SPECS):
        raise ConfigError(problems)
    if problems := problems + list(run_problems(config, here=here)):
        raise ConfigError(problems)


def run_problems(config: Mapping[str, Any], *, here: bool = True) -> Iterator[str]:
    """What is wrong between the groups, and with the root keys."""
    yield from _method_problems(config)
    yield from quantization_problems(config, here=here)
    yield from _spread_problems(config)
    yield from prune_problems(config["prune"])
    if here:
        with suppress(ValueError):  # of devices that the trainer refuses
            yield from device_problems(config, num_processes(config["trainer"]))
    data = config["data"]
    mini = data.get("_target_") == "neo.data.mini_data.MiniData"
    split = config["eval_split"]
    if split not in (None, "val", "test"):
        yield f"eval_split={split!r}: must be null, val or test"
    elif split and not mini:
        yield f"eval_split={split!r}: only data=mini has rows with exact answers; use null"
    elif split == "val" and data.get("num_val_rows") == 0:
        yield "eval_split='val': data.num_val_rows=0 leaves no rows to answer"
    least = {"checkpoint_every_n_steps": 1, "keep_last": 1, "keep_best": 0, "max_skipped_steps": 0}
    for key, lowest in least.items():
        if config[key] < lowest:
            yield f"{key}={config[key]}: must be at least {lowest}"
    if config["retry"] not in (None, "failed"):
        yield f"retry={config['retry']!r}: must be null, or failed to run failed runs again"
    if unknown := sorted(set(config["distinct"] or ()) - set(WHERE_IT_RAN)):
        yield f"distinct: {', '.join(unknown)}: must be of {', '.join(WHERE_IT_RAN)}"
    name = config["experiment_name"]
    if not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", name) or any(
        not part.strip(".") for part in name.split("/")
    ):
        yield (
            f"experiment_name={name!r}: must be a name of letters, digits, '_', '.', '+' and '-', "
            "with '/' between folders; it becomes a folder below runs/"
        )
    if not 0 <= config["seed"] < 2**32:
        yield f"seed={config['seed']}: must lie in [0, 2**32)"


def _spread_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong between how a run is spread over devices and what it trains."""
    strategy, sharding = config["trainer"].get("strategy", "auto"), config["sharding"]
    student, teacher = config["student"], config["teacher"]
    split = strategy == "fsdp" or sharding == "teacher"
    if sharding not in SHARDINGS:
        yield f"sharding={sharding!r}: must be null or teacher"
    elif sharding == "teacher" and not str(strategy).startswith("ddp"):
        also = "; trainer=fsdp splits the teacher as well" if strategy == "fsdp" else ""
        yield f"sharding=teacher: goes with trainer=ddp, and trainer.strategy={strategy!r}{also}"
    elif sharding == "teacher" and not teacher.get("path"):
        yield "sharding=teacher: there is no teacher; set teacher.path or sharding=null"
    elif sharding == "teacher" and teacher.get("_target_") == CACHED:
        yield "sharding=teacher: a cached teacher has nothing to split; use sharding=null"
    if teacher.get("offload") and not split:
        yield (
            "teacher.offload=true: is for a teacher that is split over the processes; use "
            "trainer=fsdp, or trainer=ddp sharding=teacher (both work on one device, too)"
        )
    if split and not on_gpu(config["trainer"]) and torch.cuda.is_available():
        yield (
            f"trainer.accelerator={config['trainer'].get('accelerator')!r}: on a machine with GPUs "
            "transformers loads parts onto them; use accelerator=gpu, or CUDA_VISIBLE_DEVICES="
        )
    if strategy == "fsdp" and student.get("quantization"):
        yield (
            f"student.quantization={student['quantization']!r}: a 4-bit base cannot be split over "
            "processes; use trainer=ddp, or quantization=null"
        )


def _method_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What the paper's four methods mean, against what was asked for."""
    method = config["method"]
    name = method.get("name") if isinstance(method, Mapping) else method
    if name not in METHODS:
        yield f"method.name={name!r}: must be one of {', '.join(METHODS)}"
        return
    branch = config["lora"].get("_target_") != "neo.models.variants.none"
    if name in ("sft", "kd") and branch:
        yield f"lora: method={name} trains all weights; use lora=none, or method=lora or neo"
    if name in ("lora", "neo") and not branch:
        yield (
            f"lora: method={name} trains a LoRA branch, lora=none trains all weights; "
            "choose a variant, or method=sft or kd"
        )
    kd_ratio = config["loss"].get("kd_ratio")
    if not isinstance(kd_ratio, int | float):
        return  # its type is another problem
    if name in ("sft", "lora") and kd_ratio != 0:
        yield (
            f"loss.kd_ratio={kd_ratio}: method={name} has no teacher in its loss; "
            "use 0, or method=kd or neo"
        )
    if kd_ratio > 0 and not config["teacher"].get("path"):
        yield (
            f"teacher.path=null: loss.kd_ratio={kd_ratio} needs a teacher; "
            "set teacher.path or loss.kd_ratio=0"
        )
