import math
from dataclasses import replace

import pytest
import torch
from fits import checkpoint, fit, history, power_cut, trained
from lab import write_rows
from torch import nn
from two_ranks import two_ranks

from neo.data.packing import Batch
from neo.losses.distillation import TokenSums
from neo.results.records import read_record
from neo.training.module import NeoModule
from neo.training.skipped_steps import DivergedError

SETTINGS = (
    "method=lora", "data.batch_size=2", "data.packing=false", "trainer.max_epochs=3",
    "optim.lr=0.01", "checkpoint_every_n_steps=1",
)  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    return f"data.path={write_rows(tmp_path / 'rows.jsonl')}"


@pytest.fixture
def spoil(monkeypatch):
    """Spoils what chosen steps give: their loss, its gradient, or both."""

    def spoil(steps, value=math.nan, what="both"):
        token_sums = NeoModule.token_sums

        def spoilt(self, batch: Batch, **keys) -> TokenSums:
            sums = token_sums(self, batch, **keys)
            if not self.trainer.training or self.trainer.global_step not in steps:
                return sums
            if what == "gradient":
                sums.loss.register_hook(lambda gradient: gradient * value)
                return sums
            if what == "loss":
                return replace(sums, loss=sums.loss + value)
            return replace(sums, loss=sums.loss * value)

        monkeypatch.setattr(NeoModule, "token_sums", spoilt)

    return spoil


@pytest.mark.parametrize(
    ("value", "what"),
    [(math.nan, "both"), (math.inf, "loss"), (-math.inf, "gradient")]
    + [
        pytest.param(value, what, marks=pytest.mark.slow)
        for value, what in ((math.inf, "both"), (math.nan, "loss"), (math.nan, "gradient"))
    ],
)
def test_a_step_without_a_number_is_skipped_counted_and_names_its_rows(
    value, what, spoil, rows, student_dir, tmp_path, capsys
):
    seen = {}
    spoil({2}, value, what)
    with pytest.MonkeyPatch.context() as patch:
        step = NeoModule.training_step
        patch.setattr(
            NeoModule, "training_step",
            lambda self, batch, i: (
                seen.setdefault(self.trainer.global_step, batch.row_ids), step(self, batch, i))[1],
        )  # fmt: skip
        record = fit(student_dir, None, tmp_path / "run", *SETTINGS, rows)
    assert record.status == "ok"
    assert record.metrics["train/skipped_steps"] == 1
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("step ")]
    assert line.startswith("step 2: ")
    assert f"in rows {', '.join(map(str, seen[2]))}. The step is skipped (1 of at most 10)" in line
    if what != "gradient":
        assert f"train/loss {value:g}, train/ce" in line
    assert all(value.isfinite().all() for value in trained(tmp_path / "run").values())
    assert all(math.isfinite(loss) for loss in history(tmp_path / "run", "train/loss"))
    assert history(tmp_path / "run", "train/skipped_steps") == [1.0] * 9
    assert checkpoint(tmp_path / "run")["neo"]["skipped_steps"] == 1


def test_a_skipped_step_leaves_weights_moments_and_tokens_as_they_were(
    spoil, rows, student_dir, tmp_path
):
    spoil({3})
    before = {}
    hook = NeoModule.on_before_optimizer_step

    def watch(self, optimizer):
        kept = {
            "weights": [p.detach().clone() for g in optimizer.param_groups for p in g["params"]],
            "state": [
                {k: v.clone() for k, v in optimizer.state[p].items()}
                for g in optimizer.param_groups for p in g["params"]
            ],
            "tokens": int(self.num_tokens),
        }  # fmt: skip
        before[self.trainer.global_step] = kept
        hook(self, optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NeoModule, "on_before_optimizer_step", watch)
        fit(student_dir, None, tmp_path / "run", *SETTINGS, rows, "trainer.gradient_clip_val=0.5")
    for a, b in zip(before[3]["weights"], before[4]["weights"], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(before[3]["state"], before[4]["state"], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert before[3]["tokens"] == before[4]["tokens"] < before[5]["tokens"]
    assert not all(
        torch.equal(a, b) for a, b in zip(before[4]["weights"], before[5]["weights"], strict=True)
    )


@pytest.mark.parametrize("foreach", [True, False])
def test_adamw_passes_over_weights_without_a_gradient(foreach):
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.AdamW(weights, lr=0.1, weight_decay=0.5, foreach=foreach)
    for weight in weights:
        weight.grad = torch.ones(3)
    optimizer.step()
    kept = [w.detach().clone() for w in weights]
    state = [{k: v.clone() for k, v in optimizer.state[w].items()} for w in weights]
    for weight in weights:
        weight.grad = None
    nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    for weight, old, moments in zip(weights, kept, state, strict=True):
        assert torch.equal(weight, old)
        assert all(torch.equal(optimizer.state[weight][k], v) for k, v in moments.items())


def test_one_too_many_ends_the_run_as_diverged_and_it_can_go_on(spoil, rows, student_dir, tmp_path):
    spoil({2, 4, 6})
    with pytest.raises(DivergedError, match=r"step 6: .* in rows \d, \d\. .*max_skipped_steps=2"):
        fit(student_dir, None, tmp_path / "run", *SETTINGS, rows, "max_skipped_steps=2")
    record = read_record(tmp_path / "run" / "record.json")
    assert record.status == "diverged"
    assert "max_skipped_steps=2" in record.error
    assert record.metrics["train/skipped_steps"] == 3
    assert "NaN" not in (tmp_path / "run" / "record.json").read_text()
    assert checkpoint(tmp_path / "run")["global_step"] == 6
    resumed = fit(student_dir, None, tmp_path / "run", *SETTINGS, rows, "max_skipped_steps=3")
    assert resumed.status == "ok"
    assert resumed.run_id == record.run_id
    assert resumed.metrics["train/skipped_steps"] == 3  # two of them before it went on
    spoil({2, 4, 6})
    whole = fit(student_dir, None, tmp_path / "whole", *SETTINGS, rows)
    assert whole.num_tokens == resumed.num_tokens
    for name, value in trained(tmp_path / "whole").items():
        assert torch.equal(trained(tmp_path / "run")[name], value)


def test_with_a_bound_of_0_the_first_ends_the_run(spoil, rows, student_dir, tmp_path):
    spoil({0})
    with pytest.raises(DivergedError, match="step 0: "):
        fit(student_dir, None, tmp_path / "run", *SETTINGS, rows, "max_skipped_steps=0")


def test_a_run_of_which_every_step_was_skipped_has_diverged(spoil, rows, student_dir, tmp_path):
    spoil(set(range(100)))
    with pytest.raises(DivergedError, match="all 4 steps of the run were skipped"):
        fit(student_dir, None, tmp_path / "run", *SETTINGS, rows, "trainer.max_epochs=1")
    assert read_record(tmp_path / "run" / "record.json").status == "diverged"


@pytest.mark.slow
def test_only_the_micro_batch_at_fault_is_named(rows, student_dir, tmp_path, monkeypatch):
    token_sums, seen = NeoModule.token_sums, []

    def spoilt(self, batch, **keys):
        sums = token_sums(self, batch, **keys)
        seen.append(batch.row_ids)
        return replace(sums, loss=sums.loss * math.inf) if len(seen) == 2 else sums

    monkeypatch.setattr(NeoModule, "token_sums", spoilt)
    with pytest.raises(DivergedError) as error:
        fit(student_dir, None, tmp_path / "run", *SETTINGS, rows, "max_skipped_steps=0",
            "trainer.accumulate_grad_batches=4")  # fmt: skip
    assert f"in rows {', '.join(map(str, seen[1]))}. " in str(error.value)


def test_a_validation_without_a_number_has_diverged_but_leaves_what_was_trained(
    rows, student_dir, tmp_path, monkeypatch
):
    token_sums = NeoModule.token_sums
    monkeypatch.setattr(
        NeoModule, "token_sums",
        lambda self, batch, **keys: (
            sums := token_sums(self, batch, **keys),
            sums if self.trainer.training else replace(sums, loss=sums.loss * math.nan),
        )[1],
    )  # fmt: skip
    with pytest.raises(DivergedError, match="val/loss is nan behind the last step"):
        fit(student_dir, None, tmp_path / "run", *SETTINGS, rows, "data.val_share=0.3")
    assert read_record(tmp_path / "run" / "record.json").status == "diverged"
    assert trained(tmp_path / "run")


@pytest.mark.slow
def test_the_count_goes_on_after_a_stop(spoil, rows, student_dir, tmp_path):
    spoil({1, 5})
    with power_cut(3):
        fit(student_dir, None, tmp_path / "run", *SETTINGS, rows)
    record = fit(student_dir, None, tmp_path / "run", *SETTINGS, rows)
    assert record.metrics["train/skipped_steps"] == 2


@pytest.mark.slow
def test_all_ranks_skip_a_step_that_is_no_number_on_one_of_them(rows, student_dir, tmp_path):
    said = two_ranks(student_dir, rows.removeprefix("data.path="), tmp_path, "nan", 1)
    assert said[0] == said[1]
    assert said[0].startswith("1 skipped, ")
    assert "nan" not in said[0]
