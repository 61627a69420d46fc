from dataclasses import replace

import numpy as np
import pytest
import torch
from lab import ROWS, tiny_model, tokenizer
from transformers import AutoModelForCausalLM

from neo.data.mini_data import MiniData
from neo.data.prompt import IGNORE, PromptEncoder
from neo.data.rows import BadRow, to_conversation
from neo.losses.distillation import Distillation
from neo.losses.divergences import forward_kl
from neo.models.causal_lm import CausalLM
from neo.results.position_table import BEHIND, RIGHT, UNKNOWN, WRONG
from neo.train import compose, train
from neo.training.finished_run import FinishedRun
from neo.training.positions import positions

CPU = torch.device("cpu")
FAMILIES = {
    "llama": {},
    "padded": {"rows": len(tokenizer()) + 5},
    "softcap": {"family": "gemma2"},
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A student and a teacher, and the same two as transformers loads them."""
    folder = tmp_path_factory.mktemp(request.param)
    keys = FAMILIES[request.param]
    places = [
        tiny_model(folder / name, hidden=hidden, seed=hidden, **keys)
        for name, hidden in (("student", 32), ("teacher", 48))
    ]
    ours = [CausalLM(path=str(place)).load(CPU, trained=False) for place in places]
    plain = [AutoModelForCausalLM.from_pretrained(place).eval() for place in places]
    return ours, plain


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder(tokenizer(), 128)


def test_every_number_is_that_of_plain_transformers_row_by_row(pair, encoder):
    (student, teacher), plain = pair
    seen = positions(student, teacher, encoder, ROWS, batch_size=3)
    num_seen = 0
    for number, row in enumerate(ROWS):
        example = encoder.encode(to_conversation(row, "prompt_completion"))
        ids = torch.tensor([example.input_ids])
        targets = torch.tensor(example.targets)
        at = targets != IGNORE
        with torch.no_grad():
            log_q, log_p = (
                model(input_ids=ids).logits[0, at, : len(tokenizer())].double().log_softmax(-1)
                for model in plain
            )
        own = seen.of_row(number)
        expected = {
            "ce": -log_q.gather(1, targets[at, None])[:, 0],
            "teacher_target": log_p.gather(1, targets[at, None])[:, 0].exp(),
            "teacher_entropy": -(log_p.exp() * log_p).sum(-1),
            "student_entropy": -(log_q.exp() * log_q).sum(-1),
            "kd": (log_p.exp() * (log_p - log_q)).sum(-1),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(own, name), value.numpy(), atol=2e-5, err_msg=name)
        assert own.token == tuple(tokenizer().decode([i]) for i in targets[at])
        assert own.teacher_top == tuple(tokenizer().decode([i]) for i in log_p.argmax(-1))
        assert own.agree.tolist() == (log_p.argmax(-1) == log_q.argmax(-1)).tolist()
        num_seen += int(at.sum())
    assert len(seen.row) == num_seen


def test_the_means_over_all_positions_are_the_validation_metrics_of_the_run(tmp_path):
    record = train(
        compose(
            "loss=reverse_kl", "loss.temperature=2", "lora.r=4", "lora.lora_dropout=0.5",
            "data.num_rows=20", "data.num_val_rows=12", "optim.lr=0.05", "trainer=cpu",
            "trainer.max_steps=3", "trainer.max_epochs=-1", "trainer.enable_progress_bar=false",
            f"run_dir={tmp_path}",
        )
    )  # fmt: skip
    run = FinishedRun.open(tmp_path)
    rows = run.data.val_rows()
    seen = positions(run.student(), run.teacher(), run.encoder, rows, loss=run.loss)
    metrics = {
        "ce": seen.ce,
        "kd": seen.kd,
        "student_entropy": seen.student_entropy,
        "teacher_target": seen.teacher_target,
        "agreement": seen.agree,
    }
    for name, values in metrics.items():
        assert values.mean() == pytest.approx(record.metrics[f"val/{name}"], abs=1e-5), name
    before = positions(run.base(), run.teacher(), run.encoder, rows, loss=run.loss)
    assert abs(before.ce - seen.ce).max() > 0.01  # it was trained


@pytest.fixture(scope="module")
def mini():
    """The mini-lab's teacher and student base, and rows of which some are wrong."""
    models = [
        CausalLM(path=f"neo://mini-{role}").load(CPU, trained=False)
        for role in ("student", "teacher")
    ]
    data = MiniData(num_rows=60, rows_seed=5, max_length=256)
    encoder = PromptEncoder(CausalLM(path="neo://mini-teacher").tokenizer(), data.max_length)
    return *models, encoder, data


def test_the_teacher_disagrees_where_a_label_is_wrong_and_nowhere_else(mini):
    student, teacher, encoder, data = mini
    rows = data.rows()
    seen = positions(student, teacher, encoder, rows, right_rows=data.right_rows())
    wrong = seen.labelled(WRONG)
    noisy = [number for number, row in enumerate(rows) if row["noisy"]]
    assert wrong.row.tolist() == noisy
    assert len(noisy) == 18
    assert wrong.teacher_target.mean() < 0.05
    assert seen.labelled(RIGHT).teacher_target.mean() > 0.95
    assert wrong.teacher_target.max() < seen.labelled(RIGHT).teacher_target.mean()
    behind = seen.labelled(BEHIND)
    assert set(behind.row) <= set(noisy)
    assert behind.teacher_entropy.mean() > 5 * seen.labelled(RIGHT).teacher_entropy.mean()
    for number in noisy:  # where the label parts from the right answer, the teacher says the latter
        own = seen.of_row(number)
        at = own.label.index(WRONG)
        assert set(own.label[:at]) <= {RIGHT}
        assert set(own.label[at + 1 :]) <= {BEHIND}
    clean = positions(student, teacher, encoder, data.right_rows(), right_rows=data.right_rows())
    assert set(clean.label) == {RIGHT}


def test_without_right_rows_no_target_is_called_right(mini):
    student, teacher, encoder, data = mini
    seen = positions(student, teacher, encoder, data.rows()[:3])
    assert set(seen.label) == {UNKNOWN}


def test_models_are_looked_at_without_dropout_and_left_as_they_were(mini):
    student, teacher, encoder, data = mini
    rows = data.rows()[:5]
    expected = positions(student, teacher, encoder, rows)
    dropout = student.model.norm.register_forward_hook(
        lambda layer, _, out: torch.nn.functional.dropout(out, 0.5, layer.training)
    )
    student.train()
    try:
        actual = positions(student, teacher, encoder, rows, batch_size=2)
        assert (student.training, teacher.training) == (True, False)
    finally:
        student.eval()
        dropout.remove()
    np.testing.assert_allclose(actual.kd, expected.kd, atol=1e-5)


def test_the_divergence_is_that_of_the_loss(mini):
    student, teacher, encoder, data = mini
    rows = data.rows()[:3]
    plain = positions(student, teacher, encoder, rows)
    soft = positions(
        student, teacher, encoder, rows, loss=Distillation(divergence=forward_kl, temperature=4)
    )
    assert abs(plain.kd - soft.kd).max() > 0.01
    np.testing.assert_array_equal(plain.ce, soft.ce)


def test_rows_that_do_not_go_together_are_refused(mini):
    student, teacher, encoder, data = mini
    rows, right = data.rows()[:4], data.right_rows()[:4]
    with pytest.raises(ValueError, match="rows: there must be at least one"):
        positions(student, teacher, encoder, [])
    with pytest.raises(ValueError, match="right_rows: there are 3 for 4 rows"):
        positions(student, teacher, encoder, rows, right_rows=right[:3])
    with pytest.raises(ValueError, match="right_rows: must be the rows in the same order"):
        positions(student, teacher, encoder, rows, right_rows=right[::-1])
    asked = [{"messages": rows[0]["messages"][:1]}]
    with pytest.raises(BadRow, match="no_assistant_turn"):
        positions(student, teacher, encoder, asked)
    other = replace(data, rows_seed=6).right_rows()[:4]
    with pytest.raises(ValueError, match="right_rows: must be the rows in the same order"):
        positions(student, teacher, encoder, rows, right_rows=other)
