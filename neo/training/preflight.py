"""The plan of a run from its config, and what to do where it asks for more than there is."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from neo.config import ConfigError
from neo.data.datamodule import DataModule
from neo.data.packing import Batch
from neo.data.peek import peek
from neo.losses.fused import CHUNK_GIB
from neo.teachers.cached import CachedTeacher
from neo.teachers.keeping import Keeping
from neo.training.device_plan import GIB, Placement, Plan, make_plan, placement_of
from neo.training.meet import CannotRun, Meeting, meet, meet_all, meet_architectures
from neo.training.plan_table import short
from neo.training.run_cache import find_teaching
from neo.training.workload import Workload

SAMPLE = 4  # batches that are looked at for the share of supervised tokens
KEY = "trainer.device_memory_gib"
# What a plan depends on; the rest of a config changes neither bytes nor FLOPs.
DEPENDS_ON = ("student", "lora", "loss")
# Of the optimizer these change nothing that is counted or checked against models.
RATES = ("lr", "base_lr", "weight_decay", "warmup_ratio")
# Plans of this process: the runs of a sweep often differ in rate and seed alone.
_made: dict[str, Plan] = {}
_refused: dict[str, str] = {}
_met: dict[str, Meeting] = {}


class NotPlannedError(ValueError):
    """A step of this model cannot be counted without data."""


def sample_of(
    config: dict[str, Any], specs: dict[str, Any], *, offline: bool = False
) -> tuple[Sequence[Batch], Meeting, str | None]:
    """Batches of the run, what its models are to each other, and what is amiss with its rows.

    Rows that are not here are no fault of a plan: their hub may not be reached.

    Args:
        config: Of a run.
        specs: What it says.
        offline: Ask neither for rows nor for tokenizers.

    Raises:
        ConfigError: The models do not go together.
    """
    models = {name: config[name] for name in ("student", "teacher", "lora")}
    key = json.dumps([models, specs["data"].max_length, offline], sort_keys=True)
    known = _met.get(key)
    sample: Sequence[Batch] = []
    note = None
    if offline and isinstance(specs["teacher"], CachedTeacher):
        raise ConfigError(
            ["offline=true: a cache says what it is for by tokenizers and rows; leave it out"]
        )
    if offline:
        meeting = meet_architectures(specs, known)
        note = (
            f"offline: all tokens are counted as supervised, and {meeting.vocab:,} ids as shared; "
            "neither rows nor tokenizers were asked"
        )
    else:
        try:
            meeting, data = meet_all(config, specs, known)
        except ConfigError as error:
            student, teacher, lora = (specs[name] for name in models)
            meeting = known or meet(student, teacher, lora, specs["data"].max_length)
            what = "; ".join(error.problems)
            note = f"all tokens are counted as supervised, since {what}"
        else:
            if isinstance(specs["teacher"], CachedTeacher):
                specs.update(find_teaching(config, specs, meeting.vocab, data))
            elif getattr(specs["teacher"], "cache", None) is not None:
                note = "the teacher runs; a run that finds all its rows in the cache has none"
            sample = peek(data, SAMPLE)
    _met[key] = meeting
    return sample, meeting, note


def workload_of(
    data: Any, trainer: Mapping[str, Any], vocab: int, sample: Sequence[Batch]
) -> Workload:
    """What one process is given at a time: as many tokens as the config allows.

    Args:
        data: The spec.
        trainer: The config's node.
        vocab: Ids that the models share.
        sample: Batches, of which the one with the largest share of supervised tokens counts; with
            none all tokens do.
    """
    shares = [batch.num_supervised / batch.targets.numel() for batch in sample]
    share = max(shares, default=1.0)
    size = Workload(
        batch_size=data.batch_size,
        length=data.max_length,
        num_supervised=0,
        packing=data.packing,
        vocab=vocab,
        accumulate=trainer["accumulate_grad_batches"],
    )
    return replace(size, num_supervised=max(1, math.ceil(share * size.num_tokens)))


def plan_run(config: Mapping[str, Any], specs: Mapping[str, Any], workload: Workload) -> Plan:
    """The plan of a run; the same one where only what it does not depend on differs.

    Raises:
        NotPlannedError: Its operators ask for the values of tensors, or it cannot be placed.
    """
    placement = placement_of(config, specs)
    key = _what_counts(config, specs, workload, placement)
    if key not in _made:
        _made[key] = _plan(specs, config["trainer"], workload, placement)
    return _made[key]


def refusal(
    config: Mapping[str, Any], specs: Mapping[str, Any], plan: Plan, limit: float
) -> str | None:
    """The problem of a run that takes more than `limit` GiB, with what to change; else None."""
    if plan.gib <= limit:
        return None
    key = f"{limit} {_what_counts(config, specs, plan.workload, plan.placement)}"
    if key not in _refused:  # each change is a plan of its own
        changes = single_changes(specs, config["trainer"], plan.workload, plan.placement, limit)
        _refused[key] = too_large(plan, limit, changes)
    return _refused[key]


def _what_counts(
    config: Mapping[str, Any], specs: Mapping[str, Any], workload: Workload, placement: Placement
) -> str:
    """Names what a plan depends on."""
    trainer, loss = config["trainer"], specs["loss"]
    # What is computed asks no more than this of the two numbers.
    asked = {"kd_ratio": loss.kd_ratio > 0, "temperature": loss.temperature == 1}
    return json.dumps(
        [
            {name: config[name] for name in DEPENDS_ON} | {"loss": config["loss"] | asked},
            _teacher_counts(config, specs),
            {name: value for name, value in config["optim"].items() if name not in RATES},
            [trainer.get("precision"), trainer.get("gradient_clip_val")],
            [str(workload), str(placement)],
        ],
        sort_keys=True,
    )


def _teacher_counts(config: Mapping[str, Any], specs: Mapping[str, Any]) -> Any:
    """What a plan depends on of the teacher: the model that is loaded, or what is read instead."""
    cache = specs.get("cache")
    if cache is not None and specs["teacher"] is None:
        return [str(cache.stored), str(cache.shapes)]
    keeping = {field.name for field in fields(Keeping)}
    return {key: value for key, value in config["teacher"].items() if key not in keeping}


def _plan(
    specs: Mapping[str, Any], trainer: Mapping[str, Any], workload: Workload, placement: Placement
) -> Plan:
    try:
        return make_plan(specs, trainer, workload, placement)
    except Exception as error:  # an architecture may do whatever it likes to tensors
        text = str(error).strip().splitlines() or [""]
        raise NotPlannedError(f"{type(error).__name__}: {text[0]}") from error


def planned_or_refused(
    config: Mapping[str, Any], specs: Mapping[str, Any], vocab: int, data: DataModule
) -> Plan | str:
    """The plan of a run that fits, or why there is none.

    Raises:
        CannotRun: It does not fit `trainer.device_memory_gib`.
        ConfigError: It cannot be compared with it.
    """
    trainer = config["trainer"]
    asked = trainer.get("device_memory_gib")
    workload = workload_of(data.data, trainer, vocab, peek(data, SAMPLE))
    try:
        plan = plan_run(config, specs, workload)
    except NotPlannedError as error:
        if asked is not None:
            raise ConfigError(
                [f"{KEY}={asked:g}: a step of this model cannot be planned ({error}); use null"]
            ) from error
        return f"not planned: {error}"
    if asked is not None and (problem := refusal(config, specs, plan, asked)) is not None:
        raise CannotRun([problem], "oom")
    return plan


def limit_gib(trainer: Mapping[str, Any], placement: Placement) -> float | None:
    """What a device has: as the config says, else as the GPU here says, else not known."""
    given = trainer.get("device_memory_gib")
    if given is not None:
        return float(given)
    if placement.device_type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    return None


@dataclass(frozen=True)
class Change:
    """One change to a run's config, and what one device would hold then.

    Args:
        what: As on the command line.
        gib: At most.
    """

    what: str
    gib: float


def single_changes(
    specs: Mapping[str, Any],
    trainer: Mapping[str, Any],
    workload: Workload,
    placement: Placement,
    limit: float,
) -> list[Change]:
    """What the run would take with one thing changed, least first.

    Of micro-batches the largest that fits is tried, or one row.
    """
    found: list[Change] = []
    for what, changed, size, place in _alternatives(specs, workload, placement):
        if what.startswith("data.batch_size") and any(
            c.what.startswith("data.batch_size") and c.gib <= limit for c in found
        ):
            continue
        found.append(Change(what, make_plan(changed, trainer, size, place).gib))
    last = {c.what.split("=")[0]: c for c in found}  # of micro-batches the smallest
    return sorted(last.values(), key=lambda change: change.gib)


def _alternatives(
    specs: Mapping[str, Any], workload: Workload, placement: Placement
) -> Iterator[tuple[str, Mapping[str, Any], Workload, Placement]]:
    student, teacher, loss = specs["student"], specs["teacher"], specs["loss"]
    size = workload
    while size.batch_size > 1:
        half = size.batch_size // 2
        size = replace(
            workload,
            batch_size=half,
            num_supervised=math.ceil(workload.num_supervised * half / workload.batch_size),
            accumulate=math.ceil(workload.accumulate * workload.batch_size / half),
        )
        what = f"data.batch_size={half} trainer.accumulate_grad_batches={size.accumulate}"
        yield what, specs, size, placement
    if not student.activation_checkpointing:
        changed = replace(student, activation_checkpointing=True)
        what = "student.activation_checkpointing=true"
        yield what, {**specs, "student": changed}, workload, placement
    gib = loss.chunk_gib or CHUNK_GIB[placement.device_type][0]
    what = f"loss.chunk_gib={gib / 4:g}"
    yield what, {**specs, "loss": replace(loss, chunk_gib=gib / 4)}, workload, placement
    if teacher is None:
        return
    on_gpu = placement.device_type == "cuda"
    if not placement.sharded_teacher:
        if placement.num_processes > 1:
            split = replace(placement, sharded_teacher=True)
            yield "sharding=teacher", specs, workload, split
        if on_gpu and teacher.quantization is None and not teacher.random_init:
            changed = replace(teacher, quantization="nf4")
            yield "teacher.quantization=nf4", {**specs, "teacher": changed}, workload, placement
    elif on_gpu and not placement.offload:
        yield "teacher.offload=true", specs, workload, replace(placement, offload=True)
    if placement.num_processes > 1 and not placement.fsdp:
        split = replace(placement, fsdp=True, sharded_teacher=True)
        yield "trainer=fsdp", specs, workload, split


def too_large(plan: Plan, limit: float, changes: Sequence[Change]) -> str:
    """The problem of a run that does not fit, with what to change."""
    problem = (
        f"{KEY}={limit:g}: this run takes {short(plan.gib)} GiB on a device, "
        f"{short(plan.gib - limit)} GiB more"
    )
    fitting = [change for change in changes if change.gib <= limit]
    if fitting:
        # the one that gives up least memory first: it costs least speed
        told = "; ".join(f"{c.what} takes {short(c.gib)} GiB" for c in reversed(fitting))
        return f"{problem}. Any one of these makes it fit: {told}"
    if not changes:
        return problem
    told = "; ".join(f"{c.what} takes {short(c.gib)} GiB" for c in changes[:3])
    return f"{problem}. No single change makes it fit; nearest are: {told}"
