"""Which cache a run reads its teacher's targets from, and whether the teacher must run as well."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neo.config import ConfigError
from neo.data.datamodule import DataModule
from neo.data.reader import RowStream
from neo.data.rows import BadRow
from neo.losses.distillation import Distillation
from neo.losses.head import Head
from neo.models.head_weights import read_head
from neo.teachers.cached import CachedTeacher
from neo.teachers.device import device_of
from neo.teachers.durable import CacheError
from neo.teachers.fields import Shapes
from neo.teachers.head_file import HEAD
from neo.teachers.head_file import read_head as read_head_file
from neo.teachers.identity import differences, head_identity, name_of
from neo.teachers.manifest import UNFINISHED, is_begun
from neo.teachers.online import OnlineTeacher
from neo.teachers.store import CacheFolder
from neo.teachers.stored import Stored
from neo.training.cache_heads import check_loss, head_changes, kept_of, meta_head
from neo.training.cache_identity import cache_identity, head_dtype
from neo.training.devices import on_gpu
from neo.training.token_loss import factors_of

CERTIFICATE = "certificate.json"  # of a cache that grows
# So many rows that a cache lacks are looked at: a bad row is in none, and no batch asks for it.
MAX_LOOKED_AT = 20_000
# What this process has found out of students' heads.
_heads: dict[tuple[Any, ...], dict[str, Any]] = {}


@dataclass(frozen=True, kw_only=True)
class RunCache:
    """A cache as one run uses it.

    Args:
        path: Of its folder.
        folder: Opened; None where nothing is there yet.
        stored: What is kept.
        shapes: Of the models.
        identity: What it is made of.
        grows: The run stores what it lacks.
        num_lacking: Rows of the run that it lacks; None where that is not known.
        source: The teacher whose head hidden states need, and which computes what is lacking.
        head_dtype: In which the loss multiplies the student's head.
    """

    path: Path
    folder: CacheFolder | None
    stored: Stored
    shapes: Shapes
    identity: Mapping[str, Any]
    grows: bool
    num_lacking: int | None
    source: OnlineTeacher | None
    head_dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """By which runs find it."""
        return name_of(self.identity)

    @property
    def needs_teacher(self) -> bool:
        """Whether the run must have the teacher beside it."""
        return self.num_lacking != 0

    def model_record(self) -> dict[str, str]:
        """What a run's record says of its teacher."""
        known = self.identity["teacher"].items()
        given = {key: str(value) for key, value in known if value is not None}
        return {**given, "cache": self.name}

    def teacher_head(self, device: torch.device) -> Head:
        """The teacher's, of kind hidden: it lies beside the rows, or with the teacher."""
        if self.folder is not None and HEAD in self.folder.manifest.files:
            return read_head_file(self.folder, device)
        assert self.source is not None
        known = {key: self.identity["teacher"].get(key) for key in self.source.identity()}
        if (now := self.source.identity()) != known:
            raise CacheError(
                f"{self.path}: keeps hidden states of {self.source.path} as it was ({known}), and "
                f"it is another now ({now}); its head does not go with them"
            )
        own = device_of(self.source.device) or device  # where it was loaded for
        head = factors_of(read_head(self.source, own, trained=False))
        bias = None if head.bias is None else head.bias.to(device)
        return replace(head, weight=head.weight.to(device), bias=bias)

    def certificate(self, folder: CacheFolder | None = None) -> dict[str, Any] | None:
        """What is known of its errors; None where nobody has measured them.

        Args:
            folder: Where the run has opened it since.
        """
        folder = folder or self.folder
        if folder is None:
            return None
        if folder.manifest.finished:
            return dict(folder.manifest.certificate)
        try:
            return json.loads((self.path / CERTIFICATE).read_bytes())
        except (OSError, ValueError):  # a growing cache has none before its first run has ended
            return None

    def describe(self) -> str:
        """One line for whoever starts the run."""
        kind = ", ".join(filter(None, (self.stored.kind, self.stored.values)))
        head = f"cache {self.path} ({kind})"
        if self.folder is None:
            return f"{head}: is begun by this run, which stores what it computes"
        if self.num_lacking == 0:
            return f"{head}: holds every row of this run; no teacher is loaded"
        lacking = "an unknown number of" if self.num_lacking is None else f"{self.num_lacking:,}"
        return f"{head}: {len(self.folder):,} rows; this run computes and stores {lacking} rows"


def find_teaching(
    config: Mapping[str, Any], specs: Mapping[str, Any], vocab: int, data: DataModule
) -> dict[str, Any]:
    """The run's specs with the teacher that is loaded, if any, and the cache, if there is one.

    `cache_note` says what a run that asked for a cache does without one.

    Args:
        config: Of the run.
        specs: What it says.
        vocab: Ids that its models share.
        data: Its rows, opened.

    Raises:
        ConfigError: The cache is damaged, is another one, lacks rows, or does not give the loss.
    """
    teacher, cache, note = specs["teacher"], None, None
    if isinstance(teacher, CachedTeacher):
        cache = _given_cache(config, specs, vocab, data)
    elif teacher is not None and teacher.cache is None and teacher.kind is not None:
        raise ConfigError(
            [
                f"teacher.kind={teacher.kind}: nothing is kept without teacher.cache; set it, such "
                "as teacher.cache=caches, or leave the kind out"
            ]
        )
    elif teacher is not None and teacher.cache is not None:
        cache = _own_cache(config, specs, vocab, data)
        if cache is None:
            note = "its cache is not finished, neo.cache writes it: this run computes online"
    loaded = None if cache is not None and not cache.needs_teacher else teacher
    return {**specs, "teacher": loaded, "cache": cache, "cache_note": note}


def _own_cache(
    config: Mapping[str, Any], specs: Mapping[str, Any], vocab: int, data: DataModule
) -> RunCache | None:
    """The cache that the run's teacher has or will have; None where it is not finished."""
    teacher: OnlineTeacher = specs["teacher"]
    assert teacher.cache is not None
    kept = kept_of(config, specs, vocab)
    stored = kept.stored
    head = student_head_identity(config, specs, vocab) if stored.kind == "projected" else None
    identity = cache_identity(config, teacher, data, stored, vocab, head)
    path = Path(teacher.cache) / name_of(identity)
    if (path / UNFINISHED).exists():
        if stored.is_lossy:
            raise ConfigError(
                [
                    f"teacher.kind={stored.kind}: its cache {path} is not finished, and online the "
                    "run would be another one; run neo.cache again, or wait for it"
                ]
            )
        return None
    folder = _opened(path) if is_begun(path) else None
    lacking = _lacking(folder, data, specs["loss"])
    num_lacking = None if lacking is None else len(lacking)
    if lacking is None and folder is not None and _stream_problem(folder, data) is None:
        num_lacking = 0
    return RunCache(
        path=path, folder=folder, stored=stored, shapes=kept.shapes,
        identity=identity, grows=True, num_lacking=num_lacking, source=teacher,
        head_dtype=head_dtype(specs["student"], config["trainer"]),
    )  # fmt: skip


def _given_cache(
    config: Mapping[str, Any], specs: Mapping[str, Any], vocab: int, data: DataModule
) -> RunCache:
    """The cache that a run names."""
    teacher: CachedTeacher = specs["teacher"]
    folder = _opened(Path(teacher.path))
    manifest, where = folder.manifest, f"teacher.path={teacher.path!r}"
    source = teacher.teacher()
    own = meta_head(specs["student"], specs["lora"])
    changes = head_changes(own)
    check_loss(manifest.stored, specs["loss"], where, head_changes=changes, softcap=own.softcap)
    head = (
        student_head_identity(config, specs, vocab) if manifest.stored.kind == "projected" else None
    )
    of_run = cache_identity(config, None, data, manifest.stored, vocab, head)
    of_run["teacher"] = dict(manifest.identity["teacher"])
    if teacher.of is not None:
        of_run["teacher"] |= {"path": teacher.of, **OnlineTeacher(path=teacher.of).identity()}
    if differing := differences(manifest.identity, of_run):
        raise ConfigError(
            [f"{where}: was made for other runs. What differs:", *(f"  {d}" for d in differing)]
        )
    _check_rows(folder, data, specs["loss"], where)
    return RunCache(
        path=folder.path, folder=folder, stored=manifest.stored, shapes=manifest.shapes,
        identity=manifest.identity, grows=False, num_lacking=0, source=source,
    )  # fmt: skip


def _opened(path: Path) -> CacheFolder:
    try:
        return CacheFolder.open(path)
    except CacheError as error:
        raise ConfigError(str(error).splitlines()) from error


def student_head_identity(
    config: Mapping[str, Any], specs: Mapping[str, Any], vocab: int
) -> dict[str, Any]:
    """What names the frozen head, read from the student's files; once for the runs of a sweep."""
    student = specs["student"]
    device = torch.device("cuda" if on_gpu(config["trainer"]) else "cpu")  # decides on the dtype
    seed = config["seed"] if student.random_init else None
    dtype = head_dtype(student, config["trainer"])
    key = (str(student), str(student.identity()), str(device), dtype, seed, vocab)
    if key not in _heads:
        try:
            head = read_head(student, device, trained=False, seed=config["seed"])
        except ValueError as error:
            raise ConfigError([f"student.{line}" for line in str(error).splitlines()]) from error
        _heads[key] = head_identity(factors_of(head).to(dtype), vocab)
    return _heads[key]


def _asked(data: DataModule, spec: Distillation) -> list[tuple[int, RowStream]]:
    """The rows whose targets a run asks for, with their part; without kd those to validate on."""
    streams = [(0, data.train_stream())] if spec.kd_ratio > 0 else []
    if (val := data.val_stream()) is not None:
        streams.append((data.val_part, val))
    return streams


def _lacking(folder: CacheFolder | None, data: DataModule, spec: Distillation) -> list[str] | None:
    """Rows of a run that a cache lacks and that can be trained on, as they are called.

    Where many are lacking only the first are looked at, and the others are taken for good ones.
    None where rows come from a stream, which has no list of them.
    """
    names = []
    for part, stream in _asked(data, spec):
        if stream.indices is None:
            return None
        rows: Any = stream.rows
        missing = np.asarray(stream.indices)
        if folder is not None:
            missing = folder.missing(part, missing)
        called = "row" if part == 0 else "validation row"
        for number, row_id in enumerate(missing.tolist()):
            if folder is not None and number < MAX_LOOKED_AT:
                try:
                    stream.encoded.encode(row_id, rows[row_id])
                except BadRow:
                    continue
            names.append(f"{called} {row_id}")
    return names


def _check_rows(folder: CacheFolder, data: DataModule, spec: Distillation, where: str) -> None:
    """Raise where a run needs rows that the cache lacks."""
    lacking = _lacking(folder, data, spec)
    if lacking:
        raise ConfigError(
            [
                f"{where}: lacks {len(lacking):,} rows of this run, such as {lacking[0]} "
                "(data.max_rows, data.val_share and seed choose rows); write a cache with this "
                "run's data, or use teacher=auto, which stores what is lacking"
            ]
        )
    if lacking is None and (problem := _stream_problem(folder, data)) is not None:
        raise ConfigError([problem])


def _stream_problem(folder: CacheFolder, data: DataModule) -> str | None:
    """Why a run may ask for more rows of a stream than the cache holds; None where it does not."""
    counts = folder.manifest.counts if folder.manifest.finished else {}
    held, asked = counts.get("read", 0), data.data.max_rows
    # a stream that ended before it had given as many as were asked for is there whole
    if held < counts.get("limit", 0) or (asked is not None and asked <= held):
        return None
    return (
        f"data.max_rows={asked}: the cache at {folder.path} holds the first {held:,} rows of the "
        "stream; use at most as many"
    )
