"""Signals that ask a run to stop: it leaves a checkpoint, and under SLURM a place in the queue."""

import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from neo.training.checkpoint_callback import Checkpoints

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# A signal that reaches a process twice at once, from SLURM and from torchrun, is one.
SAME_S = 3.0


class Interrupted(SystemExit):
    """A run that was asked to stop, and did; the process ends with 128 + the signal's number."""

    def __init__(self, signum: int, said: str, agreed: bool = False) -> None:
        super().__init__(128 + signum)
        self.signum, self.said, self.agreed = signum, said, agreed

    def __str__(self) -> str:
        return self.said


class StopSignals(L.Callback):
    """Stops a run at SIGTERM, SIGUSR1 (SLURM's warning) or SIGUSR2 (submitit's), in all processes.

    They stop at the same step.

    While it trains, the signal is only noted. Between two optimizer steps the processes tell each
    other (one number per step, beside the ones they exchange anyway; alone nothing), write a
    checkpoint together and leave. It is asked at every step, so that a warning of seconds is
    enough, and no process runs into a sum that another will never join. A validation is left in the
    same way, between its batches, with a checkpoint of the step before it; it is not repeated.

    Elsewhere, as while weights are loaded, there is nothing to save and the run ends at once. A
    second SIGTERM ends the process on the spot.

    Lightning's handlers are switched off: theirs sends a number to all ranks from inside the
    handler, which hangs unless every rank gets the signal at the same time, and its checkpoint for
    SLURM is written in the middle of a step.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.received = 0  # the first signal, which decides what the run is stopped by
        self.waits = False  # for the next step or batch, where all processes meet
        self._last: tuple[int, float] = (0, -math.inf)
        self._num_terms = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # nobody else may
            self._before = {signum: signal.signal(signum, self._note) for signum in STOPPING}
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: Any) -> None:
        now, (last, at) = time.monotonic(), self._last
        if signum == last and now - at < SAME_S:
            return
        self._last = (signum, now)
        self._num_terms += signum == signal.SIGTERM
        if self._num_terms == 2:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.received = self.received or signum
        if not self.waits:
            raise _interrupted(self.received, "outside of training")

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Takes the place of Lightning's handlers, and of their talk at every micro-batch."""
        connector, loop = cast(Any, trainer)._signal_connector, trainer.fit_loop.epoch_loop
        connector.register_signal_handlers = lambda: None
        cast(Any, loop)._broadcast_sigterm_tensor = lambda: None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """From here on a signal waits for the end of a step."""
        self.waits = True

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        """No step follows that could be waited for."""
        self.waits = False

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Between two steps, the last of which is logged: leaves if any process was asked to."""
        self._leave_if_asked(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Behind the last step of an epoch."""
        self._leave_if_asked(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Does not wait for the end of a validation."""
        if trainer.state.fn == "fit":
            self._leave_if_asked(trainer)

    def check_end(self, trainer: L.Trainer) -> None:
        """Behind the last step and its checkpoint: leaves if a signal came too late for a step."""
        self.waits = False
        if signum := self._agreed(trainer):
            raise _interrupted(signum, "behind the last step, with a checkpoint", True)

    def _leave_if_asked(self, trainer: L.Trainer) -> None:
        if self.checkpoints.resumable is None:  # inside a step
            return
        if not (signum := self._agreed(trainer)):
            return
        self.checkpoints.save(trainer)
        failure = self.checkpoints.files.failure
        end = "with a checkpoint" if failure is None else f"without a checkpoint: {failure}"
        raise _interrupted(signum, f"at step {trainer.global_step}, {end}", True)

    def _agreed(self, trainer: L.Trainer) -> int:
        """The signal that any of the processes received, or 0."""
        if trainer.world_size == 1:
            return self.received
        number = torch.tensor(self.received, device=trainer.strategy.root_device)
        return int(cast(Tensor, trainer.strategy.reduce(number, reduce_op="max")))


def requeue(stopped_by: Interrupted, say: Callable[[str], None]) -> None:
    """Puts a job that SLURM warned back into its queue; nothing for other signals or elsewhere.

    It is the last thing a run does, since SLURM then ends it. Submitit does it for its own jobs.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if stopped_by.signum != signal.SIGUSR1 or job is None or "SUBMITIT_EXECUTOR" in os.environ:
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        said = "" if done.returncode == 0 else f"status {done.returncode}: {done.stderr.strip()}"
    except OSError as error:
        said = str(error)
    if said:
        say(f"scontrol requeue {job} failed ({said}): submit the job again, it goes on by itself")
    else:
        say(f"SLURM job {job} is back in the queue and goes on from the checkpoint")


def _interrupted(signum: int, where: str, agreed: bool = False) -> Interrupted:
    return Interrupted(signum, f"stopped by {signal.Signals(signum).name} {where}", agreed)
