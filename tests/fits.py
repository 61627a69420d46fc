"""Whole runs for tests: composed like a user's, trained in this process, small."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lab import compose_raw

from neo.results.records import RunRecord
from neo.train import train
from neo.training.module import NeoModule

ROWS = Path(__file__).parent / "rows"


def fit(student: Path, teacher: Path | None, folder: Path, *overrides: str) -> RunRecord:
    """Trains into `folder`; rows are those of messages.jsonl unless `overrides` say otherwise."""
    record = train(compose_raw(*settings(student, teacher, folder, *overrides)))
    assert record is not None
    return record


def settings(student: Path, teacher: Path | None, folder: Path, *overrides: str) -> list[str]:
    """The overrides of a small run, as they are typed."""
    return [
        "data=jsonl",
        f"data.path={ROWS / 'messages.jsonl'}",
        "data.max_length=128",
        "data.val_share=0",
        *([] if {"method=sft", "method=kd"} & set(overrides) else ["lora.r=4"]),
        *([] if any(o.startswith("trainer=") for o in overrides) else ["trainer=cpu"]),
        "trainer.enable_progress_bar=false",
        "trainer.log_every_n_steps=1",
        f"student.path={student}",
        f"teacher.path={teacher if teacher else 'null'}",
        f"run_dir={folder}",
        *overrides,
    ]


@contextmanager
def power_cut(step: int) -> Iterator[None]:
    """Within it a run must train, and ends by an error before that optimizer step is done."""
    training_step = NeoModule.training_step

    def cut_off(self: NeoModule, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == step:
            raise RuntimeError("the power went out")
        return training_step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NeoModule, "training_step", cut_off)
        with pytest.raises(RuntimeError, match="power went out"):
            yield


def whole_and_cut(
    student: Path, teacher: Path | None, folder: Path, *overrides: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run writes that never stops, and one that is cut off in its fourth step and goes on.

    They lie in `folder/whole` and `folder/cut`.
    """
    assert fit(student, teacher, folder / "whole", *overrides).status == "ok"
    with power_cut(3):
        fit(student, teacher, folder / "cut", *overrides)
    assert fit(student, teacher, folder / "cut", *overrides).status == "ok"
    return trained(folder / "whole"), trained(folder / "cut")


def history(folder: Path, name: str) -> list[float]:
    """The logged values of one metric, in order."""
    import csv

    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def checkpoint(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint of a run holds."""
    import torch

    newest = max((folder / "checkpoints").glob("step-*.ckpt"))
    return torch.load(newest, weights_only=True)


def trained(folder: Path) -> dict[str, Any]:
    """The weights a run wrote."""
    from safetensors.torch import load_file

    name = "adapter/adapter_model" if (folder / "adapter").exists() else "model/model"
    return load_file(folder / f"{name}.safetensors")
