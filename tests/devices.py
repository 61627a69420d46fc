"""Runs of several processes for tests: many jobs in one pair of processes, started by torchrun."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parent


def train_in_processes(
    jobs: Sequence[Sequence[str]], folder: Path, num: int = 2, *torchrun: str
) -> subprocess.CompletedProcess[str]:
    """Trains each job, given by its overrides, in the same processes, one job after another."""
    done = subprocess.run(
        command(jobs, folder, f"--nproc-per-node={num}", *(torchrun or ["--standalone"])),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done


def command(jobs: Sequence[Sequence[str]], folder: Path, *torchrun: str) -> list[str]:
    """The command line of `train_in_processes`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "jobs.json"
    file.write_text(json.dumps(list(map(list, jobs))))
    worker = str(TESTS / "devices_worker.py")
    return [sys.executable, "-m", "torch.distributed.run", *torchrun, worker, str(file)]


def environment(**more: str) -> dict[str, str]:
    """That of a process that nothing has been started for."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ours and not key.startswith(("TORCHELASTIC", "SLURM_"))
    }
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)} | more
