"""The scripts for several nodes, with two on this machine."""

import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from devices import IN_ORDER, assert_same, environment
from fits import fit, settings, trained

CLUSTER = Path(__file__).parent.parent / "experiments" / "cluster"
# Starts each task with what SLURM tells it, and fails where one of them does.
SRUN = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 3
shift
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
done
status=0
for task in $(jobs -p); do wait "$task" || status=1; done
exit $status
"""


@pytest.fixture(scope="module")
def expected(student_dir, teacher_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    fit(student_dir, teacher_dir, folder, *IN_ORDER, "data.batch_size=4", "trainer.max_steps=6")
    return trained(folder)


def overrides(student, teacher, folder):
    return settings(
        student, teacher, folder, *IN_ORDER, "trainer=ddp", "trainer.accelerator=cpu",
        "data.batch_size=2", "trainer.max_steps=6",
    )  # fmt: skip


def test_two_nodes_started_by_torchrun_train_what_one_process_trains(
    student_dir, teacher_dir, expected, tmp_path
):
    with ExitStack() as files:
        nodes = [
            subprocess.Popen(
                [CLUSTER / "torchrun.sh", *overrides(student_dir, teacher_dir, tmp_path / "run")],
                env=environment(
                    NODES="2", NODE_RANK=str(rank), DEVICES="1", MASTER_ADDR="127.0.0.1",
                    MASTER_PORT="29571",
                ),
                stderr=files.enter_context((tmp_path / str(rank)).open("w")),
            )
            for rank in (0, 1)
        ]  # fmt: skip
        for rank, node in enumerate(nodes):
            assert node.wait(180) == 0, (tmp_path / str(rank)).read_text()[-4000:]
    assert_same(trained(tmp_path / "run"), expected)


@pytest.mark.slow
def test_slurm_starts_the_processes_itself(student_dir, teacher_dir, expected, tmp_path):
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(0o755)
    slurm = environment(
        SLURM_JOB_ID="7", SLURM_JOB_NAME="neo", SLURM_NTASKS="2", SLURM_NNODES="1",
        SLURM_NTASKS_PER_NODE="2", SLURM_NODEID="0", SLURM_NODELIST="127.0.0.1",
        SLURM_JOB_NODELIST="127.0.0.1",
    )  # fmt: skip
    slurm["PATH"] = f"{srun.parent}:{slurm['PATH']}"
    done = subprocess.run(
        [CLUSTER / "train.sbatch", *overrides(student_dir, teacher_dir, tmp_path / "run")],
        env=slurm,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same(trained(tmp_path / "run"), expected)
