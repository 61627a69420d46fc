"""Two ranks of a DDP run on the CPU, one of which meets with a fault; run by torchrun."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def two_ranks(student: Path, rows: Any, folder: Path, fault: str, rank: int) -> list[str]:
    """What each of the two says in the end, and checkpoints in the folder.

    Args:
        student: Its model.
        rows: A file.
        folder: To write to.
        fault: `kill`: SIGTERM before the fourth step. `nan`: a loss that is none in the third.
        rank: Which of them meets with it.
    """
    arguments = [student, rows, folder, fault, rank]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         __file__, *map(str, arguments)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = [folder / f"rank{rank}" for rank in (0, 1)]
    assert all(file.exists() for file in said), done.stderr
    return [file.read_text() for file in said]


def main() -> None:
    """One rank."""
    import warnings
    from dataclasses import replace

    import lightning as L
    from lab import tokenizer

    from neo.data.datamodule import DataModule
    from neo.data.stream import FileData
    from neo.losses.distillation import Distillation
    from neo.models.causal_lm import CausalLM
    from neo.models.variants import lora
    from neo.training.checkpoint_callback import Checkpoints
    from neo.training.module import NeoModule
    from neo.training.optim import AdamW
    from neo.training.signals import Interrupted, StopSignals
    from neo.training.trainer import OURS

    warnings.simplefilter("ignore")
    student, rows, folder, fault, at = sys.argv[1:]
    rank = int(os.environ["RANK"])

    class Kill(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if fault == "kill" and rank == int(at) and trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    class Module(NeoModule):
        def token_sums(self, batch: Any, **keys: Any) -> Any:
            sums = super().token_sums(batch, **keys)
            if fault == "nan" and rank == int(at) and self.trainer.global_step == 2:
                return replace(sums, loss=sums.loss * float("nan"))
            return sums

    checkpoints = Checkpoints(Path(folder), 1000)
    stop = StopSignals(checkpoints)
    spec = FileData(path=rows, max_length=64, batch_size=1, packing=False, val_share=0.0)
    module = Module(
        CausalLM(path=student), None, lora(r=4, target_modules="all-linear"),
        Distillation(kd_ratio=0), AdamW(lr=0.01), vocab=len(tokenizer()),
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=3, logger=False,
        enable_progress_bar=False, log_every_n_steps=1, limit_val_batches=0,
        callbacks=[Kill(), stop, checkpoints], **OURS,
    )  # fmt: skip
    try:
        with stop:
            trainer.fit(module, datamodule=DataModule(spec, tokenizer(), seed=0))
        checkpoints.save(trainer)
        weights = sum(float(p.double().sum()) for p in module.state_dict().values())
        said = f"{module.skipped.num} skipped, {int(module.num_tokens)} tokens, {weights!r}"
    except Interrupted as stopped:
        said = str(stopped)
    (Path(folder) / f"rank{rank}").write_text(said)


if __name__ == "__main__":
    main()
