"""The folder of a run: where it lies, who may write into it, and what came of the run before."""

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from neo.config import ConfigError, run_id
from neo.results.records import RunRecord, read_record

LOCK = ".lock"
# A process that was killed may leave others behind that hold its lock until they notice.
PATIENCE_S = 20.0


class RunIsBusy(RuntimeError):
    """Another process is training this very run."""


def folder_of(config: Mapping[str, Any], identity: str) -> Path:
    """Where a run keeps what it writes."""
    return Path(config["run_dir"] or f"runs/{config['experiment_name']}/{identity}")


@contextmanager
def lock_run(folder: Path, wait_s: float = PATIENCE_S) -> Generator[None, None, None]:
    """Within it no other process trains the run; the lock ends with the process that holds it.

    Raises:
        RunIsBusy: Another process held it for as long as was waited.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=wait_s):
            yield
    except Timeout:
        raise RunIsBusy(f"{folder}: another process is training this run") from None


def is_busy(folder: Path) -> bool:
    """Whether a process is training the run just now."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, blocking=False):
            return False
    except Timeout:
        return True


def recorded_run(folder: Path, identity: str) -> RunRecord | None:
    """The record of a run, whatever came of it; None where it has none.

    Raises:
        ConfigError: The folder cannot be written to, or holds another run.
    """
    place = f"run_dir={str(folder)!r}"
    standing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise ConfigError([f"{place}: {standing} is not a folder that can be written to"])
    record, kept = None, None
    try:
        with suppress(FileNotFoundError):
            record = read_record(folder / "record.json")
            kept = record.run_id
        if record is None and (folder / "config.yaml").exists():  # of a run that was killed
            config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
            kept = run_id(cast(dict[str, Any], config))
    except (ValueError, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError([f"{place}: what it holds cannot be read: {error}"]) from error
    if kept not in (None, identity):
        raise ConfigError(
            [f"{place}: holds run {kept}, this config is run {identity}; choose another folder"]
        )
    return record
