"""What can be evaluated of a run: its student, the base that the student began as, its teacher."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from neo.config import ConfigError, build, validate
from neo.models.causal_lm import CausalLM
from neo.results.records import RunRecord, find_records, read_record
from neo.teachers.cached import CachedTeacher

ROLES = ("student", "base", "teacher")
SIGNS = "*?["


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One model to evaluate, and the record that its numbers go into.

    Attributes:
        role: One of `ROLES`.
        spec: Of the model, or of the base that an adapter is attached to.
        weights: The folder or hub name that is loaded.
        adapter: What is attached to it.
        folder: Holds the record and the answers.
        run: The run it belongs to.
        config: Of that run.
    """

    role: str
    spec: CausalLM
    weights: str
    adapter: Path | None
    folder: Path
    run: RunRecord
    config: Mapping[str, Any] = field(repr=False)

    @property
    def label(self) -> str:
        """What to call it in a message."""
        return f"{self.role} of {self.folder}" if self.role == "student" else str(self.folder)

    @property
    def is_whole(self) -> bool:
        """Whether it is a student all of whose weights were trained."""
        return self.role == "student" and self.adapter is None

    @property
    def loads_as_run(self) -> bool:
        """Whether the run's own code has to load it: the harness knows no such quantisation."""
        return self.spec.quantization is not None and not self.is_whole

    @property
    def mini_rows(self) -> dict[str, int]:
        """Which test rows the mini-lab's tasks ask, where the run trained on the mini-lab."""
        data = self.config["data"]
        names = ("num_test_rows", "rows_seed")
        if not str(data["_target_"]).endswith(".MiniData"):
            return {}
        return {name: data[name] for name in names if name in data}

    def model_identity(self) -> dict[str, Any]:
        """Where the weights lie and what they are, as a record has it."""
        quantization = self.spec.quantization
        said = {} if quantization is None else {"quantization": quantization}
        return {"path": self.spec.path, **self.spec.identity(), **said}


def find_runs(given: list[str]) -> list[Path]:
    """The folders of finished runs that paths, globs and experiment folders name.

    Raises:
        ConfigError: With every path that names none, and why.
    """
    found: list[Path] = []
    problems: list[str] = []
    for text in given:
        place = Path(text).expanduser()
        if any(sign in text for sign in SIGNS):
            root = Path(place.anchor) if place.is_absolute() else Path()
            pattern = str(place.relative_to(place.anchor)) if place.is_absolute() else str(place)
            matches = [path for path in sorted(root.glob(pattern)) if path.is_dir()]
            runs = [run for path in matches for run in _runs_in(path)]
            if not runs:
                problems.append(f"run={text!r}: no finished run fits this glob")
            found += runs
        elif not place.is_dir():
            problems.append(f"run={text!r}: there is no such folder")
        elif (place / "config.yaml").is_file():
            if problem := _unfinished(place):
                problems.append(f"run={text!r}: {problem}")
            found.append(place)
        elif runs := _runs_in(place):
            found += runs
        else:
            problems.append(
                f"run={text!r}: is neither the folder of a run (it holds no config.yaml) nor holds "
                "a finished run anywhere below it"
            )
    if problems:
        raise ConfigError(problems)
    return list(dict.fromkeys(found))


def candidates(runs: list[Path], roles: list[str]) -> list[Candidate]:
    """Each model of the runs once: students run by run, then bases and teachers.

    Raises:
        ConfigError: With everything that cannot be evaluated, and why.
    """
    unknown = [role for role in roles if role not in ROLES]
    if unknown or not roles:
        raise ConfigError([f"models={roles}: must be some of {', '.join(ROLES)}"])
    problems: list[str] = []
    found: dict[Path, Candidate] = {}
    for role in [role for role in ROLES if role in roles]:
        for folder in runs:
            try:
                run, config = read_record(folder / "record.json"), _config(folder)
                one = _student(folder, run, config) if role == "student" else None
                one = one or _untrained(role, folder, run, config)
                found.setdefault(one.folder, one)
            except ConfigError as error:
                problems += [f"{folder}: {problem}" for problem in error.problems]
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return list(found.values())


def _student(folder: Path, run: RunRecord, config: dict[str, Any]) -> Candidate:
    spec: CausalLM = build(config["student"])
    adapter: Path | None = folder / "adapter"
    if (folder / "model").is_dir():
        adapter, weights = None, str((folder / "model").resolve())
    elif spec.random_init:
        raise ValueError(
            f"{folder}: student.random_init=true: the adapter's base was drawn for the run and "
            "lies in no folder; `neo.export merge=true` writes both, which lm_eval reads"
        )
    else:
        weights = _where(spec)
    return Candidate(
        role="student", spec=spec, weights=weights, adapter=adapter,
        folder=folder, run=run, config=config,
    )  # fmt: skip


def _untrained(role: str, folder: Path, run: RunRecord, config: dict[str, Any]) -> Candidate:
    """The base or the teacher of a run; of equal ones the record lies in the same folder."""
    spec: CausalLM | CachedTeacher | None = build(
        config["student" if role == "base" else "teacher"]
    )
    if isinstance(spec, CachedTeacher):
        spec = spec.teacher()
    if spec is None or spec.path is None:
        raise ValueError(f"{folder}: models={role}: the run has no teacher")
    if spec.random_init:
        raise ValueError(f"{folder}: models={role}: its weights were drawn and lie in no folder")
    known = {
        "experiment": run.experiment_name,
        "role": role,
        "quantization": spec.quantization,
        "dtype": spec.dtype,
        **spec.identity(),
    }
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    return Candidate(
        role=role, spec=spec, weights=_where(spec), adapter=None,
        folder=folder.parent / f"{role}-{digest[:8]}", run=run, config=config,
    )  # fmt: skip


def untrained_record(candidate: Candidate, base: Mapping[str, Any]) -> RunRecord:
    """The record of a base or a teacher before it has a number.

    Its choice of a method is its role, which a row of a table selects by `where: {method: base}`.
    Of the config it has the model alone: with the rest of a run's it would fit rows that select
    trained students by their settings.

    Args:
        candidate: No student.
        base: Provenance, `started_at` and `argv`.
    """
    spec = candidate.spec
    said = {f.name: getattr(spec, f.name) for f in dataclasses.fields(CausalLM)}
    kind = "student" if candidate.role == "base" else "teacher"
    return RunRecord(
        run_id=candidate.folder.name.rpartition("-")[2],
        experiment_name=candidate.run.experiment_name,
        status="ok",
        choices={"method": candidate.role},
        overrides=[],
        config={"evaluated": {"role": candidate.role, **said}},
        seed=candidate.run.seed,
        models={kind: candidate.model_identity()},
        **base,
    )


def _config(folder: Path) -> dict[str, Any]:
    """The config of a run, checked as any other: it names code that will be called."""
    file = folder / "config.yaml"
    try:
        config = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict) or not {"student", "teacher", "data"} <= config.keys():
        raise ValueError(f"{file}: is not the config of a run")
    validate(config)  # type: ignore[arg-type]
    return config  # type: ignore[return-value]


def _runs_in(folder: Path) -> list[Path]:
    """The folders of finished runs at or below one."""
    if (folder / "config.yaml").is_file():
        return [] if _unfinished(folder) else [folder]
    found = [path.parent for path in find_records(folder) if path.name == "record.json"]
    return [run for run in found if not _unfinished(run)]


def _unfinished(folder: Path) -> str:
    """Why the run has nothing to evaluate; empty where it has."""
    file = folder / "record.json"
    if not file.is_file():
        return "holds no record.json; did the run finish?"
    try:
        record = read_record(file)
    except ValueError as error:
        return str(error)
    if record.status != "ok":
        return f"its record says {record.status!r}; only finished runs are evaluated"
    if (
        not (folder / "adapter" / "adapter_config.json").is_file()
        and not (folder / "model").is_dir()
    ):
        return "holds neither adapter/ nor model/"
    return ""


def _where(spec: CausalLM) -> str:
    folder = Path(spec.location)
    return str(folder.resolve()) if folder.is_dir() else spec.location
