"""What a data-driven start is computed from: the first rows of training and the run's loss."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from neo.data.packing import Batch
from neo.data.prompt import IGNORE
from neo.losses.distillation import Distillation
from neo.losses.given import Given
from neo.models.calibration import Calibration, CalibrationBatch
from neo.training.token_loss import batch_sums


def calibration_of(
    batches: Sequence[Batch],
    teacher: PreTrainedModel | Callable[[Batch], Given] | None,
    spec: Distillation,
    vocab: int,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Calibration:
    """The rows, with the gradient of the very loss that the run trains: divergence and all.

    Args:
        batches: Of training, at least one, on the device of the models.
        teacher: The model, or what says what it gives for a batch; None where it is not in the
            loss.
        spec: The loss.
        vocab: Ids that both models share.
        context: In which the loss is computed.
    """
    positions = spec.kd_positions if teacher is not None else "aligned"
    spec = replace(spec, kd_ratio=spec.kd_ratio if teacher is not None else 0.0)

    def backward(model: PreTrainedModel) -> None:
        for batch in batches:
            with context():
                given = teacher
                if teacher is not None and not isinstance(teacher, PreTrainedModel):
                    given = teacher(batch)
                sums = batch_sums(model, given, batch, spec, vocab, kd_positions=positions)
            sums.loss.backward()

    return Calibration([_tokens(batch) for batch in batches], backward)


def _tokens(batch: Batch) -> CalibrationBatch:
    return CalibrationBatch(batch.input_ids, batch.position_ids, batch.targets != IGNORE)
