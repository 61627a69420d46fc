"""Runs of several processes for tests: many jobs in one pair of processes, started by torchrun."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

TESTS = Path(__file__).parent
# Rows in their order, unpacked: two processes of two rows a step see what one with four sees. Rows
# have between 2 and some 40 supervised tokens.
IN_ORDER = (
    "data.shuffle=false", "data.packing=false", "trainer.max_epochs=-1", "trainer.max_steps=20",
    "optim.lr=1e-2",
)  # fmt: skip


def train_in_processes(jobs: Sequence[Sequence[str]], folder: Path, num: int = 2) -> None:
    """Trains each job, given by its overrides, in the same processes, one job after another."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "jobs.json"
    file.write_text(json.dumps(list(map(list, jobs))))
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}")
    done = subprocess.run(
        [sys.executable, *torchrun, TESTS / "devices_worker.py", file],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]


def environment(**more: str) -> dict[str, str]:
    """That of a process of nobody's, whose `python` is this one."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ours and not key.startswith(("TORCHELASTIC", "SLURM_"))
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    ours_too = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent), "PATH": path}
    return kept | ours_too | more


def assert_same(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, atol: float = 1e-5
) -> None:
    """The same weights, each number by number."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=atol, msg=lambda m, n=name: n)
