"""One JSON record per run: what was run, on what, and what came out."""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from neo.results.metrics import metric_info

SCHEMA_VERSION = 3
# Version 1 had no status "pruned" and knew its data by path and number of rows alone; before
# version 3 there were no evaluations.
READABLE = (1, 2, 3)
STATUSES = ("ok", "failed", "oom", "diverged", "interrupted", "pruned")
ROW_COUNTS = ("read", "used", "truncated", "bad")
PACKAGES = (
    "llm-neo", "torch", "lightning", "transformers", "peft", "datasets", "hydra-core", "tokenizers",
    "safetensors", "numpy", "torchao", "bitsandbytes",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything about one run that a table, a figure or a repetition needs.

    A number that is not known is None here and absent from the JSON; it is never a sentinel, and
    never NaN or infinite.

    Attributes:
        run_id: Names the run; equal configs have equal ids.
        experiment_name: The folder under `experiments/` that the run belongs to.
        status: One of `STATUSES`; everything but "ok" is a run whose numbers are not final.
            "pruned": a search stopped it, because others are better.
        choices: Config group to chosen file, such as {"method": "neo"}.
        overrides: As typed on the command line.
        config: Resolved, plain JSON types only.
        error: What stopped the run, in one sentence.
        metrics: Final values, by the names of `neo.results.metrics`.
        num_tokens: Supervised tokens trained on, over all ranks.
        seconds: Wall-clock time.
        peak_memory_gib: Of one device.
        rows: Counts {"read", "used", "truncated"} and "bad", a count per reason.
        started_at: ISO 8601, UTC.
        commit: Of the code; None outside a git checkout.
        dirty: Whether the code differed from that commit.
        versions: Package to version.
        device: Such as "cpu: AMD EPYC 7763, 2 cores".
        models: Role ("student", "teacher") to {"path", and a "revision" or content "hash"}.
        data: {"path", "num_rows", "schema", and a content "hash" or the hub's "revision"}.
        argv: The command that makes this run, be it of a sweep or not.
        evaluations: How the numbers `eval/<task>/...` were taken that were added after the run, an
            entry for each time: "name" as asked for, "tasks" (each with its version, shots and
            rows; those that a newer entry has are gone from an older one), "num_tasks" at first,
            "settings" that decide the numbers, and where and when it was.
        schema_version: Of the record that was read; one that is made has the newest.
    """

    run_id: str
    experiment_name: str
    status: str
    choices: dict[str, str]
    overrides: list[str]
    config: dict[str, Any]
    seed: int
    started_at: str
    error: str | None = None
    metrics: dict[str, float | int] = field(default_factory=dict)
    num_parameters: int | None = None
    num_trainable_parameters: int | None = None
    num_tokens: int | None = None
    seconds: float | int | None = None
    peak_memory_gib: float | int | None = None
    rows: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    dirty: bool | None = None
    versions: dict[str, str] = field(default_factory=dict)
    device: str | None = None
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    argv: list[str] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version not in READABLE:
            raise ValueError(f"schema_version: {self.schema_version}, legal: {_spelt_versions()}")
        if self.status not in STATUSES:
            raise ValueError(f"status: {self.status!r}, legal: {', '.join(STATUSES)}")
        for name, number in self.metrics.items():
            metric_info(name)
            if not _is_number(number):
                raise ValueError(f"metrics.{name}: {number!r} is not a number")
        for name in ("num_parameters", "num_trainable_parameters", "num_tokens", "seed"):
            if not isinstance(getattr(self, name), int | None):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not a whole number")
        for name in ("seconds", "peak_memory_gib"):
            number = getattr(self, name)
            if number is not None and not _is_number(number):
                raise ValueError(f"{name}: {number!r} is not a number")
        unknown = set(self.rows) - set(ROW_COUNTS)
        if unknown:
            raise ValueError(f"rows: unknown {sorted(unknown)}, legal: {', '.join(ROW_COUNTS)}")
        for i, entry in enumerate(self.evaluations):
            _check_evaluation(entry, f"evaluations[{i}]")
        for name in _FIELDS:
            _require_plain_json(getattr(self, name), name)

    def known(self) -> dict[str, Any]:
        """Return the fields by name, without those that are None and evaluations that are none."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None and (name != "evaluations" or value)
        }

    def to_json(self) -> str:
        """Return the record as indented JSON, absent where a field is None."""
        known = {"schema_version": self.schema_version} | self.known()
        return json.dumps(known, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunRecord":
        """Return the record that `to_json` wrote.

        Raises:
            ValueError: The text is no JSON object, was written by another version, lacks a key,
                has one too many, or holds an illegal value; the message names the key.
        """
        try:
            known = json.loads(text, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error}") from error
        if not isinstance(known, dict):
            raise ValueError(f"a record is a JSON object, not {type(known).__name__}")
        if "schema_version" not in known:
            raise ValueError("key 'schema_version' is missing")
        if known["schema_version"] not in READABLE:
            raise ValueError(
                f"key 'schema_version' is {known['schema_version']!r}; this version of neo reads "
                f"{_spelt_versions()}"
            )
        for name in _REQUIRED:
            if name not in known:
                raise ValueError(f"key {name!r} is missing")
        for name, value in known.items():
            if name not in _FIELDS:
                raise ValueError(f"key {name!r} is unknown")
            if name in _CONTAINERS and not isinstance(value, _CONTAINERS[name]):
                raise ValueError(f"key {name!r} is {value!r}, not a {_CONTAINERS[name].__name__}")
            if name in _TEXTS and not isinstance(value, str):
                raise ValueError(f"key {name!r} is {value!r}, not a text")
        return cls(**known)


_FIELDS = {f.name: f for f in fields(RunRecord)}
_REQUIRED = [
    name for name, f in _FIELDS.items() if f.default is MISSING and f.default_factory is MISSING
]
_CONTAINERS: dict[str, type] = {
    **dict.fromkeys(("choices", "config", "metrics", "rows", "versions", "models", "data"), dict),
    **dict.fromkeys(("overrides", "argv", "evaluations"), list),
}
_TEXTS = ("run_id", "experiment_name", "status", "started_at", "error", "commit", "device")


def _spelt_versions() -> str:
    return ", ".join(map(str, READABLE))


def finite(numbers: Mapping[str, float | int]) -> dict[str, float | int]:
    """Return the numbers without the NaN and infinite ones, which a record leaves out."""
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def write_record(record: RunRecord, run_dir: Path | str) -> Path:
    """Write `record.json` into `run_dir`, whole or not at all, and return its path."""
    path = Path(run_dir) / "record.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, record.to_json().encode())
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path`; a crash leaves the old content or the new, and nothing else."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp lets nobody else read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_record(path: Path | str) -> RunRecord:
    """Return the record in the file at `path`.

    Raises:
        ValueError: The file is no record of this version; the message names file and key.
    """
    try:
        return RunRecord.from_json(Path(path).read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def find_records(folder: Path | str) -> list[Path]:
    """Return the records under `folder`, sorted: `record.json` and `results/*.json`, at any depth.

    A folder that does not exist holds none.
    """
    folder = Path(folder)
    return sorted({*folder.rglob("record.json"), *folder.rglob("results/*.json")})


def provenance(accelerator: str | None = None) -> dict[str, Any]:
    """Return the record's `commit`, `dirty`, `versions` and `device`.

    Args:
        accelerator: Name of the accelerator the run is on; without one the CPU is named.
    """
    commit, dirty = _code_state(Path(__file__).resolve().parents[2])
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # absent, as every other number that is not known
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": versions,
        "device": accelerator or _cpu_name(),
    }


def command_line(argv: list[str]) -> list[str]:
    """Return the command as it can be typed elsewhere: no path of this machine's home or cwd."""
    package, program = Path(__file__).resolve().parents[1], Path(argv[0])
    # `python -m neo.train` arrives as the absolute path of train.py.
    is_module = program.suffix == ".py" and program.resolve().parent == package
    command = ["python", "-m", f"{package.name}.{program.stem}"] if is_module else [program.name]
    here, home = f"{Path.cwd()}{os.sep}", f"{Path.home()}{os.sep}"
    return command + [a.replace(here, "").replace(home, f"~{os.sep}") for a in argv[1:]]


def _code_state(root: Path) -> tuple[str | None, bool | None]:
    """Return commit and dirty flag of the checkout at `root`, or None twice."""
    top = _git(root, "rev-parse", "--show-toplevel")
    # An installed package may lie inside somebody else's checkout: that commit is not ours.
    if top is None or Path(top).resolve() != root:
        return None, None
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None, None
    # Only what a run executes: the tables a run leads to are not a change of the code.
    changes = _git(root, "status", "--porcelain", "--", "neo", "conf", "pyproject.toml")
    return commit, None if changes is None else changes != ""


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # no Linux: the platform's own word stands
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    return f"cpu: {name}, {cores} cores"


def _check_evaluation(entry: object, place: str) -> None:
    """Raise ValueError unless the entry says what every evaluation says."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: {entry!r} is not a mapping of keys to values")
    for key, kind in (("name", str), ("tasks", dict), ("num_tasks", int), ("settings", dict)):
        if not isinstance(entry.get(key), kind):
            raise ValueError(f"{place}.{key}: {entry.get(key)!r} is not of type {kind.__name__}")


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is no number of a record")


def _require_plain_json(value: object, place: str) -> None:
    """Raise ValueError at the first value that JSON would change or cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}: {value} cannot be recorded; leave a missing number out")
    for key, item in _items(value):
        if not isinstance(key, str | int) or (isinstance(value, dict) and not isinstance(key, str)):
            raise ValueError(f"{place}: key {key!r} is not a text")
        _require_plain_json(item, f"{place}.{key}")
    if type(value) not in (dict, list, str, int, float, bool, type(None)):
        raise ValueError(f"{place}: {type(value).__name__} is not a JSON type")


def _items(value: object) -> Iterator[tuple[object, object]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list):
        yield from enumerate(value)
