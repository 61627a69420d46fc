import csv

import pytest
from fits import fit

from neo.results.metrics import METRICS
from neo.training.loggers import MetricsFile, none, wandb


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_every_step_is_a_row_and_every_metric_a_column(tmp_path):
    logger = MetricsFile(tmp_path / "run")
    logger.log_metrics({"train/loss": 1.5, "train/lr": 1e-4, "epoch": 0}, step=0)
    logger.log_metrics({"val/ce": 1 / 3, "epoch": 0}, step=1)
    logger.log_metrics({"epoch": 1}, step=1)
    assert rows(tmp_path / "run") == [
        {"step": "0", "train/loss": "1.5", "train/lr": "0.0001"},
        {"step": "1", "val/ce": "0.33333333"},
    ]
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert header.split(",") == ["step", *METRICS]


def test_what_was_written_survives_a_resume_up_to_the_step_it_goes_on_from(tmp_path):
    logger = MetricsFile(tmp_path)
    for step in range(5):
        logger.log_metrics({"train/loss": float(step)}, step=step)
    resumed = MetricsFile(tmp_path, resume_step=3)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2"]
    for step in (3, 4, 5):
        resumed.log_metrics({"train/loss": float(step)}, step=step)
    assert [row["train/loss"] for row in rows(tmp_path)] == list("012345")


def test_a_run_from_its_beginning_starts_a_new_file(tmp_path):
    MetricsFile(tmp_path).log_metrics({"train/loss": 1.0}, step=0)
    MetricsFile(tmp_path)
    assert rows(tmp_path) == []


def test_a_resume_without_a_file_starts_one(tmp_path):
    MetricsFile(tmp_path, resume_step=7)
    assert rows(tmp_path) == []


def test_no_logger_is_none():
    assert none() is None


@pytest.fixture
def wandb_sandbox(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    return tmp_path


@pytest.mark.parametrize("logged_in", [False, True])
def test_a_run_is_offline_if_and_only_if_nobody_is_logged_in(
    logged_in, wandb_sandbox, monkeypatch, capsys
):
    import wandb as library

    monkeypatch.setattr(library, "login", lambda prompt, verify: logged_in)
    logger = wandb(project="p", save_dir=str(wandb_sandbox), name="n", id="i", group="g")
    said = capsys.readouterr().err
    assert logger._wandb_init["mode"] == (None if logged_in else "offline")
    assert ("wandb sync" in said) is not logged_in
    if not logged_in:
        assert f"wandb sync {wandb_sandbox}/wandb/offline-run-*" in said
    assert logger._wandb_init["group"] == "g"


def test_what_the_user_says_of_being_online_counts(wandb_sandbox, monkeypatch, capsys):
    given = wandb(project="p", offline=True, save_dir=str(wandb_sandbox))
    assert given._wandb_init["mode"] == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb(project="p", save_dir=str(wandb_sandbox))
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_an_offline_run_is_written_below_the_run_and_asks_no_network(wandb_sandbox, monkeypatch):
    import socket

    connect = socket.socket.connect

    def local_only(self, address):
        host = address[0] if isinstance(address, tuple) else "localhost"
        assert host in ("localhost", "127.0.0.1", "::1"), f"asked {host}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    logger = wandb(project="p", save_dir=str(wandb_sandbox / "run"), name="n", id="abc")
    logger.log_hyperparams({"seed": 1})
    logger.log_metrics({"train/loss": 1.0}, step=0)
    logger.experiment.finish()
    (folder,) = (wandb_sandbox / "run" / "wandb").glob("offline-run-*-abc")
    assert list(folder.glob("*.wandb"))


@pytest.mark.slow
def test_two_runs_of_one_process_are_two_runs_of_wandb(
    wandb_sandbox, student_dir, monkeypatch, capfd
):
    monkeypatch.chdir(wandb_sandbox)
    records = [
        fit(student_dir, None, wandb_sandbox / f"run{seed}", "method=lora", "logger=wandb",
            "trainer.max_steps=2", f"seed={seed}", "data.val_share=0.3")
        for seed in (0, 1)
    ]  # fmt: skip
    for seed, record in enumerate(records):
        (folder,) = (wandb_sandbox / f"run{seed}" / "wandb").glob("offline-run-*")
        assert folder.name.endswith(record.run_id)
    assert capfd.readouterr().err.count("wandb sync") == 2
    assert not (wandb_sandbox / "wandb").exists()
