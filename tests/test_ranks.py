import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from neo.data.ranks import Ranks

RUN = """
import json, os, sys
sys.path[:0] = [os.environ["TESTS"], os.path.dirname(os.environ["TESTS"])]
import lightning as L
import torch
from readers import TOKENIZER, GivenData, mixed_rows
from neo.data import packing, reader
from neo.data.datamodule import DataModule
packing.NUM_SHOWN = reader.NUM_SHOWN = 10**6
world_size, out, stop, resume = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]

class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        data = self.trainer.datamodule
        self.seen.append({
            "epoch": data.position[0],
            "rows": batch.row_ids,
            "bad": [i for rows in batch.report.shown.values() for i, _ in rows],
            "all_ranks": batch.num_rows_all_ranks,
            "tokens": batch.input_ids.tolist(),
        })
        data.consume(batch)
        return self.weight * 0

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == stop:
            self.trainer.save_checkpoint(f"{out}/{stop}.ckpt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

many = {"strategy": "ddp", "devices": world_size} if world_size > 1 else {"devices": 1}
trainer = L.Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
                    enable_model_summary=False, enable_progress_bar=False,
                    use_distributed_sampler=False, **many)
recorder = Recorder()
data = DataModule(GivenData(given=mixed_rows(61), num_workers=2, table="stream" not in sys.argv),
                  TOKENIZER, 0)
trainer.fit(recorder, datamodule=data, ckpt_path=None if resume == "-" else resume,
            weights_only=True)
with open(f"{out}/{trainer.global_rank}.json", "w") as file:
    json.dump({"seen": recorder.seen, "report": data.report.plain()}, file)
"""


def run(folder: Path, world_size: int, stop: int, resume: Path | str = "-", *more: str):
    """What each rank was fed, and reported of the last epoch."""
    folder.mkdir()
    (folder / "run.py").write_text(RUN)
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={world_size}", "--standalone"]
    done = subprocess.run(
        [sys.executable, *(launch if world_size > 1 else []), str(folder / "run.py"),
         str(world_size), str(folder), str(stop), str(resume), *more],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "TESTS": str(Path(__file__).parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


def rows_of(ranks, epoch: int) -> list[int]:
    batches = [batch for rank in ranks for batch in rank["seen"] if batch["epoch"] == epoch]
    return sorted(i for batch in batches for i in batch["rows"] + batch["bad"])


@pytest.mark.slow
@pytest.mark.parametrize("source", ["table", "stream"])
def test_two_ranks_go_on_as_two_and_as_one_and_as_two_again(tmp_path, source):
    whole = run(tmp_path / "whole", 2, 0, "-", source)
    assert rows_of(whole, 0) == rows_of(whole, 1) == list(range(61))
    for first, second in zip(whole[0]["seen"], whole[1]["seen"], strict=True):
        both = [first, second]
        assert first["all_ranks"] == second["all_ranks"]
        assert first["all_ranks"] == sum(len(b["rows"]) + len(b["bad"]) for b in both)
    num = len(whole[0]["seen"])
    begun = run(tmp_path / "begun", 2, 3, "-", source)
    assert begun == whole
    # the same two
    again = run(tmp_path / "again", 2, 0, tmp_path / "begun/3.ckpt", source)
    for rank, through in zip(again, whole, strict=True):
        assert rank["seen"] == through["seen"][3:]
        assert rank["report"] == through["report"]
    # one, stopped again, and two once more
    first = [{"seen": rank["seen"][:3]} for rank in whole]
    alone = run(tmp_path / "alone", 1, 6, tmp_path / "begun/3.ckpt", source)
    assert rows_of([*first, *alone], 0) == list(range(61))
    second = [{"seen": alone[0]["seen"][:3]}]
    last = run(tmp_path / "last", 2, 0, tmp_path / "alone/6.ckpt", source)
    assert rows_of([*first, *second, *last], 0) == list(range(61))
    epoch = [[b for b in rank["seen"] if b["epoch"] == 1] for rank in last]
    assert epoch == [rank["seen"][num - len(epoch[0]) :] for rank in whole]


def test_one_rank_talks_to_itself():
    assert Ranks().sum([3, 4]) == [3, 4]
    assert Ranks().gather({"a": 1}) == [{"a": 1}]
