import csv

from neo.results.metrics import METRICS
from neo.training.metrics_file import MetricsFile


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
