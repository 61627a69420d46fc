"""W&B's offline files, read back with W&B's own reader."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

VARIABLES = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")


def nobody_logged_in(home: Path, patch: pytest.MonkeyPatch) -> None:
    """Nobody is logged in, and W&B keeps what it keeps in `home`."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY"):
        patch.delenv(name, raising=False)
    patch.setenv("HOME", str(home))
    patch.setenv("NETRC", str(home / "netrc"))
    for name in VARIABLES:
        patch.setenv(name, str(home / "wandb"))
    patch.setenv("WANDB_SILENT", "true")


def segments(run_dir: Path) -> list[Path]:
    """The offline folders of a run, the oldest first: one for each time that it ran."""
    return sorted((run_dir / "wandb").glob("offline-run-*"))


def read_log(segment: Path) -> list[dict[str, Any]]:
    """All records of an offline folder."""
    return [json.loads(line) for line in _inspect(segment).splitlines()]


def read_summary(segment: Path) -> dict[str, Any]:
    """What an offline folder comes to: config, tags, summary, exit code."""
    return json.loads(_inspect(segment, "--summary"))


def of_kind(log: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The records of one type, such as "history"."""
    return [entry[kind] for entry in log if entry["type"] == kind]


def logged(log: list[dict[str, Any]], name: str) -> dict[int, float]:
    """Step to the logged value of one metric."""
    items = [entry["item"] for entry in of_kind(log, "history")]
    return {item["trainer/global_step"]: item[name] for item in items if name in item}


def _inspect(segment: Path, *options: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(segment)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
