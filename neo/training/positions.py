"""What a student and a teacher say at every supervised position of chosen rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from neo.data.departure import departure
from neo.data.order import first_columns
from neo.data.packing import Batch, RowReport, collate
from neo.data.prompt import IGNORE, Example, PromptEncoder
from neo.data.rows import detect_schema, to_conversation
from neo.losses.distillation import Distillation
from neo.losses.divergences import cross_entropy
from neo.losses.probabilities import entropy
from neo.models.tokenizers import num_token_ids
from neo.results.position_table import BEHIND, RIGHT, UNKNOWN, WRONG, Positions
from neo.training.token_loss import outputs_of

Row = Mapping[str, Any]


@torch.no_grad()
def positions(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    encoder: PromptEncoder,
    rows: Sequence[Row],
    *,
    right_rows: Sequence[Row] | None = None,
    loss: Distillation | None = None,
    batch_size: int = 16,
) -> Positions:
    """Both models at the supervised positions, as validation sees them, but one by one.

    Their logits are there whole for `batch_size` rows at a time, which is to look at rows with; a
    run measures its sums chunk by chunk.

    Args:
        student: On any device.
        teacher: On the same device.
        encoder: Of the student's tokenizer.
        rows: In one of the four schemas.
        right_rows: The same rows in the same order with their right answers, where they are known.
        loss: Its divergence and temperature make `kd`; None is forward KL.
        batch_size: Rows that are run at a time.

    Raises:
        BadRow: A row cannot be trained on.
        ValueError: There is no row, or `right_rows` are other ones.
    """
    if not rows:
        raise ValueError("rows: there must be at least one")
    if right_rows is not None and len(right_rows) != len(rows):
        raise ValueError(f"right_rows: there are {len(right_rows)} for {len(rows)} rows")
    examples = _examples(encoder, rows)
    right = None if right_rows is None else _examples(encoder, right_rows)
    loss = loss or Distillation()
    vocab = num_token_ids(encoder.tokenizer)
    were_training = [model.training for model in (student, teacher)]
    student.eval()
    teacher.eval()
    parts = []
    for start in range(0, len(examples), batch_size):
        batch = _batch(examples[start : start + batch_size], encoder).to(student.device)
        parts.append(_numbers(student, teacher, batch, loss, vocab))
    for model, was_training in zip((student, teacher), were_training, strict=True):
        model.train(was_training)
    numbers = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    tops = numbers.pop("teacher_top").tolist()
    agree = numbers.pop("agree")
    places = [(row, at) for row, e in enumerate(examples) for at in _supervised(e)]
    decode = encoder.tokenizer.decode
    return Positions(
        row=np.array([row for row, _ in places]),
        token=[decode([examples[row].targets[at]]) for row, at in places],
        label=_labels(examples, right),
        teacher_top=[decode([top]) for top in tops],
        agree=agree.numpy(),
        **{name: value.double().numpy() for name, value in numbers.items()},
    )


def _examples(encoder: PromptEncoder, rows: Sequence[Row]) -> list[Example]:
    schema = detect_schema(first_columns(rows))
    return [encoder.encode(to_conversation(row, schema)) for row in rows]


def _batch(examples: Sequence[Example], encoder: PromptEncoder) -> Batch:
    """One row per sequence, as they stand."""
    pad = encoder.tokenizer.pad_token_id
    sequences = [[example] for example in examples]
    return collate(sequences, 0 if pad is None else pad, False, RowReport())


def _numbers(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, loss: Distillation, vocab: int
) -> dict[str, Tensor]:
    """By name, a number for each supervised position of a batch."""
    supervised = batch.targets != IGNORE
    targets = batch.targets[supervised]
    s, t = (outputs_of(model, batch, supervised).logits(vocab) for model in (student, teacher))
    top = t.argmax(-1)
    numbers = {
        "teacher_target": cross_entropy(t, targets).neg().exp(),
        "teacher_entropy": entropy(t),
        "teacher_top": top,
        "student_entropy": entropy(s),
        "ce": cross_entropy(s, targets),
        "kd": loss.divergence(s, t, temperature=loss.temperature),
        "agree": s.argmax(-1) == top,
    }
    return {name: value.cpu() for name, value in numbers.items()}


def _supervised(example: Example) -> list[int]:
    return [at for at, target in enumerate(example.targets) if target != IGNORE]


def _labels(examples: Sequence[Example], right: Sequence[Example] | None) -> list[str]:
    """One of `LABELS` for each supervised position of the rows."""
    labels = []
    for number, example in enumerate(examples):
        places = _supervised(example)
        if right is None:
            labels += [UNKNOWN] * len(places)
            continue
        first = departure(example, right[number])
        first = len(example.targets) if first is None else first
        labels += [RIGHT if at < first else WRONG if at == first else BEHIND for at in places]
    return labels
