"""When a run saves its state: every so many steps, at its best validations, and where it stops."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning as L

from neo.training.checkpoints import CheckpointFiles, checkpoint_file
from neo.training.module import NeoModule


class Checkpoints(L.Callback):
    """Saves the state of the run in one file a step, between two optimizer steps.

    From a state that was saved at the last batch of an epoch, Lightning 2.6.6 goes on with its
    batches counted on into the next epoch, which groups the micro-batches of a step otherwise, if
    the epoch's are no multiple of them. Here they are counted from 0, so that every step is a place
    to go on from.

    Args:
        folder: Where they lie.
        every_n_steps: Optimizer steps from one to the next.
        keep_last: How many of the newest are kept.
        keep_best: How many are kept besides for their `val/loss`, the weighted sum of cross-entropy
            and divergence that is optimized (without a teacher the cross-entropy). With 1 or more,
            a validation that is among the best is followed by a checkpoint, unless it fell inside
            an optimizer step, which is said once.
        say: Told what could not be written.
    """

    def __init__(
        self,
        folder: Path,
        every_n_steps: int,
        keep_last: int = 1,
        keep_best: int = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.every_n_steps, self.keep_best, self.say = (
            folder, every_n_steps, keep_best, say)  # fmt: skip
        self.files = CheckpointFiles(folder, keep_last, keep_best, say)
        self.saved_at = 0  # step, of the last attempt
        self.written: int | None = None  # step, of the last success
        self.best: float | None = None  # validation loss of this step, if it is among the best
        self.said = False
        # Lightning's counters as they were behind this step, while there is none under way.
        self.resumable: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Whoever saves through the trainer saves through our files."""
        trainer.strategy.checkpoint_io = self.files

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Counts from where the run begins or goes on."""
        self.saved_at = trainer.global_step
        steps = cast(Any, trainer).datamodule.ranks.gather(trainer.global_step)
        if len(set(steps)) > 1:
            raise ValueError(
                f"{self.folder}: the processes found checkpoints of steps {steps}; all of them "
                "must see the same folder"
            )

    def on_train_epoch_start(self, *_: Any) -> None:
        """The data are in the new epoch already: the step before cannot be gone back to."""
        self.resumable = None

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Notes where Lightning stands between two steps."""
        if cast(NeoModule, module).step_sums is not None:
            self.resumable = None
            return
        self.resumable = trainer.fit_loop.state_dict()
        if trainer.is_last_batch:
            count = self.resumable["epoch_loop.batch_progress"]["current"]
            count |= {"ready": 0, "started": 0, "processed": 0, "completed": -1}  # counted up first

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Saves the step before, if it is due; by now it is logged, and validated."""
        self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Saves the last step of an epoch, if it is due."""
        self._save_if_due(trainer)

    def _save_if_due(self, trainer: L.Trainer) -> None:
        if self.resumable is None:
            return
        if self.best is not None or trainer.global_step - self.saved_at >= self.every_n_steps:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Behind the last step Lightning's own counters say that there is none to come."""
        self.resumable = None

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Asks for weights that are among the best so far to be kept."""
        found = trainer.callback_metrics.get("val/loss")
        if not self.keep_best or trainer.state.fn != "fit" or found is None:
            return
        val_loss = float(found)
        # All processes have the same sum; the first alone need see the files.
        best = trainer.is_global_zero and self.files.is_among_best(val_loss)
        if not math.isfinite(val_loss) or not trainer.strategy.broadcast(best):
            return
        if self.resumable is not None:
            self.best = val_loss
        elif not self.said and trainer.is_global_zero:
            self.said = True
            self.say(
                "keep_best passes over validations inside an optimizer step; "
                "trainer.val_check_interval should be a multiple of trainer.accumulate_grad_batches"
            )

    def save(self, trainer: L.Trainer) -> None:
        """Saves this step, by all processes at the same time; an error waits in `files.failure`."""
        step = trainer.global_step
        self.saved_at = step
        self.files.val_loss, self.best = self.best, None
        if self.written == step:
            return
        trainer.save_checkpoint(checkpoint_file(self.folder, step))
        # The first process alone writes; the others must not think otherwise of what it wrote.
        if trainer.strategy.broadcast(self.files.failure is None):
            self.written = step

    def score(self, trainer: L.Trainer, val_loss: float) -> None:
        """Notes the validation loss of the weights that were saved at this step."""
        if trainer.is_global_zero and self.written == trainer.global_step:
            self.files.score(trainer.global_step, val_loss)

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Puts Lightning's counters back behind the step; they have gone on to what follows it."""
        if self.resumable is not None:
            checkpoint["loops"]["fit_loop"] = self.resumable
