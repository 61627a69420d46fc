"""What watches a run: its speed and its progress bar."""

import sys
import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)  # fmt: skip

from neo.training.module import NeoModule


class Throughput(L.Callback):
    """Supervised tokens per second per device while training, validation and loading left out."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens_before = 0

    def tokens_per_s(self, module: NeoModule) -> float:
        """The mean since training began; waits for the device, so it is asked now and then."""
        tokens = int(module.num_tokens) - self.tokens_before
        return tokens / module.trainer.world_size / self.seconds if self.seconds else 0.0

    def on_train_start(self, trainer: L.Trainer, module: NeoModule) -> None:
        """Starts the clock."""
        self.entered, self.tokens_before = time.perf_counter(), int(module.num_tokens)

    def on_train_batch_end(self, trainer: L.Trainer, module: NeoModule, *_: Any) -> None:
        """Counts the time since the last batch, waiting for data included."""
        now = time.perf_counter()
        self.seconds += now - self.entered
        self.entered = now
        if trainer.global_step and trainer.global_step % trainer.log_every_n_steps == 0:
            module.log("perf/tokens_per_s", self.tokens_per_s(module))

    def on_validation_end(self, trainer: L.Trainer, module: NeoModule) -> None:
        """Leaves the validation out."""
        self.entered = time.perf_counter()


class ProgressBar(L.Callback):
    """Loss, ce, kd, tokens/s and time left: on a terminal a bar, else now and then a line."""

    def __init__(self, throughput: Throughput, every_s: float = 15.0) -> None:
        self.throughput, self.every_s = throughput, every_s
        self.console = Console(file=sys.stderr)
        self.bar: Progress | None = None

    def on_train_start(self, trainer: L.Trainer, module: NeoModule) -> None:
        """Opens the bar, at the place a resumed run begins."""
        self._began = self._spoke = time.perf_counter()
        self._progress_before = module.progress()
        if self.console.is_terminal:
            self.bar = Progress(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(),
                TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn(), TextColumn("left"),
                TimeRemainingColumn(), console=self.console, transient=True,
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task("training", total=1.0)

    def on_train_batch_end(self, trainer: L.Trainer, module: NeoModule, *_: Any) -> None:
        """Shows the numbers of the last logged step."""
        now = time.perf_counter()
        if now - self._spoke < (self.every_s if self.bar is None else 0.5):
            return
        self._spoke = now
        step = f"{trainer.global_step}" + (f"/{trainer.max_steps}" if trainer.max_steps > 0 else "")
        shown = " ".join(
            f"{name} {float(value):.3f}"
            for name in ("loss", "ce", "kd")
            if (value := trainer.callback_metrics.get(f"train/{name}")) is not None
        )
        text = f"step {step} {shown} {self.throughput.tokens_per_s(module):,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=module.progress(), description=text)
            return
        done = module.progress() - self._progress_before
        left = (now - self._began) * (1 - module.progress()) / done if done > 0 else None
        self.console.print(
            text + (f", {left:,.0f} s left" if left is not None else ""), highlight=False
        )

    def on_train_end(self, trainer: L.Trainer, module: NeoModule) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.stop()

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        """Closes the bar, so that the message stands on a line of its own."""
        if self.bar is not None:
            self.bar.stop()
