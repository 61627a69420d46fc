"""Runs of the mini pair on the mini-lab, short enough for tests, and their evaluation."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab import compose_raw
from omegaconf import OmegaConf
from rich.console import Console

from neo.evaluate import EvaluateConfig, evaluate
from neo.results.records import RunRecord, write_record
from neo.train import train

NUM_TEST_ROWS = 40  # four of each kind


def mini_run(folder: Path, *overrides: str) -> RunRecord:
    """A few steps from the shipped student, its test rows answered as training answers them."""
    record = train(
        compose_raw(
            *([] if "method=sft" in overrides else ["method=neo", "lora.r=4"]),
            "optim.lr=0.003", "trainer.max_steps=3",
            "trainer.max_epochs=-1", "data.num_rows=48", "data.num_val_rows=0", "data.rows_seed=5",
            f"data.num_test_rows={NUM_TEST_ROWS}", "eval_split=test", "trainer=cpu",
            "trainer.enable_progress_bar=false", f"run_dir={folder}", *overrides,
        )
    )  # fmt: skip
    assert record is not None
    # composed from Python a run has no choices; typed, this would be among them
    (method,) = [o.partition("=")[2] for o in ["method=neo", *overrides] if "method=" in o][-1:]
    record = replace(record, choices={"method": method})
    write_record(record, folder)
    return record


def evaluated(run: Path, *arguments: str) -> list[str]:
    """What `python -m neo.evaluate run=RUN ...` does, in this process: what has no numbers."""
    typed = OmegaConf.from_cli([f"run={run}", "device=cpu", *arguments])
    wanted = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(EvaluateConfig), typed))
    assert isinstance(wanted, EvaluateConfig)
    return evaluate(wanted, Console(quiet=True))


def lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]
