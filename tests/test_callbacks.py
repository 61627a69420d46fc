import sys
import time
from types import SimpleNamespace
from unittest.mock import create_autospec

import lightning as L
import pytest
import torch
from test_module import build, data, fit

from neo.training import callbacks
from neo.training.callbacks import ProgressBar, Throughput
from neo.training.module import NeoModule
from neo.training.peak_memory import PeakMemory

__all__ = ["build", "data"]  # fixtures


def stand_in(step=1, every=1, world_size=1, tokens=0, metrics=None):
    """A trainer and a module at a given place of a run."""
    trainer = create_autospec(L.Trainer, instance=True)
    trainer.global_step, trainer.log_every_n_steps, trainer.world_size = step, every, world_size
    trainer.callback_metrics = {k: torch.tensor(v) for k, v in (metrics or {}).items()}
    module = create_autospec(NeoModule, instance=True)
    module.num_tokens, module.trainer = torch.tensor(tokens), trainer
    return trainer, module


def test_speed_is_tokens_of_this_run_per_second_and_device_without_validation(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    trainer, module = stand_in(tokens=1000, world_size=2)
    throughput = Throughput()
    assert throughput.tokens_per_s(module) == 0.0
    throughput.on_train_start(trainer, module)  # a resumed run: 1000 tokens were before
    clock.now = 2.0
    module.num_tokens = torch.tensor(1400)
    throughput.on_train_batch_end(trainer, module)
    clock.now = 50.0
    throughput.on_validation_end(trainer, module)
    clock.now = 52.0
    module.num_tokens = torch.tensor(1800)
    throughput.on_train_batch_end(trainer, module)
    assert throughput.tokens_per_s(module) == 800 / 2 / 4.0
    assert module.log.call_args.args == ("perf/tokens_per_s", 100.0)


def test_speed_is_logged_only_where_the_interval_says(monkeypatch):
    throughput = Throughput()
    trainer, module = stand_in(step=3, every=2, tokens=5)
    throughput.on_train_start(trainer, module)
    throughput.on_train_batch_end(trainer, module)
    module.log.assert_not_called()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_what_was_held_at_once_above_what_was_held_before():
    kept = torch.ones(2**24)  # 64 MiB that were there before
    memory = PeakMemory()
    before = memory.gib()
    for _ in range(3):
        torch.ones(2**24)  # 64 MiB, freed before the next
    peak = memory.gib()
    assert before is not None
    assert peak is not None
    assert peak - before == pytest.approx(1 / 16, abs=0.02)
    assert kept.sum() == 2**24


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_a_progress_bar_shows_losses_speed_and_time_left(build, data, capsys):
    throughput = Throughput()
    bar = ProgressBar(throughput, every_s=0.0)
    fit(build(), data(2), max_epochs=2, callbacks=[throughput, bar])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 8
    for line, step in zip(lines, range(1, 9), strict=True):
        for piece in (f"step {step}", "loss ", "ce ", "kd ", "tokens/s", "s left"):
            assert piece in line


def test_a_progress_bar_on_a_terminal_closes_when_training_ends_or_fails(monkeypatch):
    for end in ("on_train_end", "on_exception"):
        bar = ProgressBar(Throughput())
        monkeypatch.setattr(type(bar.console), "is_terminal", property(lambda self: True))
        trainer, module = stand_in(metrics={"train/loss": 1.0})
        trainer.max_steps = 10
        module.progress.return_value = 0.5
        bar.on_train_start(trainer, module)
        assert bar.bar is not None
        assert bar.bar.live.is_started
        bar._spoke = time.perf_counter() - 1
        bar.on_train_batch_end(trainer, module)
        (task,) = bar.bar.tasks
        assert task.completed == 0.5
        assert "step 1/10 loss 1.000" in task.description
        arguments = (trainer, module, ValueError()) if end == "on_exception" else (trainer, module)
        getattr(bar, end)(*arguments)
        assert not bar.bar.live.is_started
