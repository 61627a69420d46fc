"""Runs jobs one after another in one process of several; `devices.py` starts it by torchrun.

What each process holds of the models when training begins, what it sends in each of the first
steps, and the rows it trains on go to `held-<rank>.json`, `sent-<rank>.json` and
`rows-<rank>.jsonl` in the folder of the run.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
from collectives import Collectives
from fits import power_cut
from lab import compose_raw
from torch import nn

from neo.data.datamodule import DataModule
from neo.data.packing import Batch
from neo.train import train
from neo.training.module import NeoModule

COUNTED_STEPS = 2


def num_elements(model: nn.Module) -> tuple[int, int]:
    """What lies here of its weights, and how many there are in all; tied ones once."""
    here = in_all = 0
    for weight in model.parameters():
        local: Any = weight.to_local() if hasattr(weight, "to_local") else weight
        here, in_all = here + local.numel(), in_all + weight.numel()
    return here, in_all


def note_what_is_held(folder: Path, patch: pytest.MonkeyPatch) -> None:
    def on_train_start(module: NeoModule) -> None:
        held = {"student": num_elements(module.student)}
        if module.teacher is not None:
            held["teacher"] = num_elements(module.teacher)
        file = folder / f"held-{module.trainer.global_rank}.json"
        file.write_text(json.dumps(held))

    patch.setattr(NeoModule, "on_train_start", on_train_start, raising=False)


def count_what_is_sent(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """In the first steps alone: to look at every operation takes longer than to compute it."""
    training_step = NeoModule.training_step
    mode, counting = Collectives(), ExitStack()

    def begin(module: NeoModule, batch: Batch, batch_idx: int) -> Any:
        if batch_idx == 0 and module.trainer.global_step == 0:
            counting.enter_context(mode)
        return training_step(module, batch, batch_idx)

    def on_train_batch_end(module: NeoModule, *_: Any) -> None:
        if module.step_sums is not None or len(mode.steps) > COUNTED_STEPS:
            return  # within a step, or counted
        mode.next_step()
        if len(mode.steps) > COUNTED_STEPS:
            counting.close()
        file = folder / f"sent-{module.trainer.global_rank}.json"
        file.write_text(json.dumps({"steps": mode.steps, "others": mode.others}))

    patch.setattr(NeoModule, "training_step", begin)
    patch.setattr(NeoModule, "on_train_batch_end", on_train_batch_end, raising=False)


def note_rows(file: Path, patch: Callable[[Any, str, Any], None] = setattr) -> None:
    consume = DataModule.consume

    def noted(data: DataModule, batch: Batch) -> None:
        consume(data, batch)
        with file.open("a") as opened:
            opened.write(json.dumps({"epoch": data.position[0], "ids": batch.row_ids}) + "\n")

    patch(DataModule, "consume", noted)


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        (folder,) = (Path(o.removeprefix("run_dir=")) for o in job if o.startswith("run_dir="))
        cut = [int(o.removeprefix("cut=")) for o in job if o.startswith("cut=")]
        folder.mkdir(parents=True, exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            note_what_is_held(folder, patch)
            note_rows(folder / f"rows-{os.environ['RANK']}.jsonl", patch.setattr)
            count_what_is_sent(folder, patch)
            with power_cut(cut[0]) if cut else nullcontext():
                train(compose_raw(*(o for o in job if not o.startswith("cut="))))


if __name__ == "__main__":
    main()
