"""A run that a search gives up: after a validation it asks, and all its processes stop together."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import lightning as L

from neo.training.checkpoint_callback import Checkpoints

if TYPE_CHECKING:
    from neo.training.reports import Reports

KEYS = {"storage": str, "study": str, "trial": int}


class Pruned(SystemExit):
    """A run that a search stopped, for others do better; its process ends with status 0."""

    agreed = True  # all processes stop at the same step

    def __init__(self, said: str) -> None:
        super().__init__(0)
        self.said = said

    def __str__(self) -> str:
        return self.said


class Pruning(L.Callback):
    """Tells the trial of a run each validation, by optimizer step, and stops a hopeless run.

    The first process alone talks to the storage; what it says holds for all. The run is left
    between two steps with a checkpoint, so that it could go on; a run that has no step left comes
    to its end.

    Args:
        place: Of the trial: storage, study and its number.
        checkpoints: Knows when there is no step under way, and saves.
    """

    def __init__(self, place: Mapping[str, Any], checkpoints: Checkpoints) -> None:
        self.place, self.checkpoints = place, checkpoints
        self.reports: Reports | None = None
        self.verdict: str | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Finds the trial; a run that was stopped between verdict and record remembers it."""
        if trainer.is_global_zero:
            from neo.training.reports import Reports  # here: the package is an extra

            self.reports = Reports(**self.place)
            self.verdict = self.reports.verdict()
        self.verdict = trainer.strategy.broadcast(self.verdict)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Reports what was measured, and notes whether that is the end."""
        if trainer.state.fn != "fit" or self.verdict is not None:
            return
        if self.reports is not None:
            metric = self.reports.metric
            if metric not in trainer.callback_metrics:
                known = ", ".join(sorted(k for k in trainer.callback_metrics if k[:4] == "val/"))
                raise ValueError(f"metric={metric}: this run validates {known}")
            value = float(trainer.callback_metrics[metric])
            self.verdict = self.reports.report(trainer.global_step, value)
        self.verdict = trainer.strategy.broadcast(self.verdict)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Between two steps, the last of which is logged: leaves."""
        if self.verdict is not None and self.checkpoints.resumable is not None:
            self.checkpoints.save(trainer)
            raise Pruned(self.verdict)


def pruning(config: Mapping[str, Any], checkpoints: Checkpoints) -> list[L.Callback]:
    """The callback of a run that is a trial of a search; none for others."""
    place = config["prune"]
    return [] if place is None else [Pruning(place, checkpoints)]


def prune_problems(place: Any) -> Iterator[str]:
    """What is wrong with the root key `prune`, which a search sets."""
    if place is None:
        return
    if not isinstance(place, Mapping) or place.keys() != KEYS.keys():
        yield f"prune={place!r}: must be null, or a mapping of {', '.join(KEYS)}"
        return
    for key, kind in KEYS.items():
        if type(place[key]) is not kind:
            yield f"prune.{key}={place[key]!r}: must be {'a text' if kind is str else 'an integer'}"
