"""The folder of a run: whether it is this run's, and what came of it before."""

import os
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from neo.config import ConfigError, run_id
from neo.results.records import RunRecord, read_record


def recorded_run(folder: Path, identity: str) -> RunRecord | None:
    """The record of a run that came to its end; failed ones are run again.

    Raises:
        ConfigError: The folder cannot be written to, or holds another run.
    """
    place = f"run_dir={str(folder)!r}"
    standing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise ConfigError([f"{place}: {standing} is not a folder that can be written to"])
    record, kept = None, None
    try:
        if (folder / "record.json").exists():
            record = read_record(folder / "record.json")
            kept = record.run_id
        elif (folder / "config.yaml").exists():  # of a run that was killed
            config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
            kept = run_id(cast(dict[str, Any], config))
    except (ValueError, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError([f"{place}: what it holds cannot be read: {error}"]) from error
    if kept not in (None, identity):
        raise ConfigError(
            [f"{place}: holds run {kept}, this config is run {identity}; choose another folder"]
        )
    return record if record is not None and record.status == "ok" else None
