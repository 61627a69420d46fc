import re

import pytest
import torch
from fits import checkpoint, fit, power_cut, trained
from lab import compose
from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer
from torch import nn
from transformers import AutoModelForCausalLM

from neo.export import export
from neo.models.causal_lm import CausalLM
from neo.models.student import build_meta_student, build_student, trained_parameters
from neo.models.variants import lora, lora_fa
from neo.training.optim import AdamW

CPU = torch.device("cpu")
IDS = torch.arange(5, 45)[None]
KEYS = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}


def downs(model):
    """The A of every layer, by name."""
    return {name: p for name, p in model.named_parameters() if ".lora_A." in name}


@pytest.fixture
def spec(student_dir):
    return CausalLM(path=str(student_dir))


def test_only_b_is_trained_and_its_count_is_r_times_the_outputs(spec):
    student = build_student(spec, lora_fa(**KEYS), CPU, 0)
    base = spec.load(CPU, trained=False)
    outputs = [
        layer.out_features
        for name, layer in base.named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head"
    ]
    for model in (student, build_meta_student(spec, lora_fa(**KEYS))):
        parameters = trained_parameters(model)
        assert len(parameters) == len(outputs) == len(downs(model))
        assert all(".lora_B." in name for name in parameters)
        assert sum(p.numel() for p in parameters.values()) == 4 * sum(outputs)


def test_a_is_what_lora_draws_from_the_seed(spec):
    frozen = build_student(spec, lora_fa(**KEYS), CPU, 3)
    plain = build_student(spec, lora(**KEYS), CPU, 3)
    for name, weight in downs(plain).items():
        assert torch.equal(downs(frozen)[name], weight)
        assert not downs(frozen)[name].requires_grad
        assert weight.requires_grad


def test_a_step_is_that_of_lora_whose_a_is_left_out(spec):
    frozen = build_student(spec, lora_fa(**KEYS), CPU, 0)
    plain = build_student(spec, lora(**KEYS), CPU, 0)
    ups = {n: p for n, p in trained_parameters(plain).items() if ".lora_B." in n}
    for model, parameters in ((frozen, trained_parameters(frozen)), (plain, ups)):
        optimizer = AdamW(lr=0.01).build(parameters)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
    for name, weight in trained_parameters(frozen).items():
        torch.testing.assert_close(weight, ups[name], rtol=1e-5, atol=1e-7)
        assert weight.abs().max() > 0.01


def test_where_the_rows_of_a_are_orthogonal_the_steps_are_those_of_pefts_optimizer(
    spec, monkeypatch
):
    # PEFT corrects the gradient in bfloat16 where the machine has it
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    ours, theirs = (build_student(spec, lora_fa(**KEYS), CPU, 0) for _ in range(2))
    for model in (ours, theirs):
        for weight in downs(model).values():
            weight.copy_(torch.linalg.qr(weight.T)[0].T / 2)
    optimizers = (
        AdamW(lr=0.01, eps=1e-12).build(trained_parameters(ours)),
        create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=0.01),
    )
    optimizers[1].param_groups[0]["eps"] = 1e-12
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
    expected = trained_parameters(theirs)
    for name, weight in trained_parameters(ours).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)


SETTINGS = ("lora=lora_fa", "trainer.max_epochs=3", "data.batch_size=2", "data.packing=false",
            "optim.lr=0.02", "checkpoint_every_n_steps=2", "lora.lora_dropout=0.1",
            "seed=7")  # fmt: skip


@pytest.fixture(scope="module")
def run(student_dir, teacher_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    record = fit(student_dir, teacher_dir, folder, *SETTINGS)
    assert record.status == "ok"
    return folder, record


def test_a_checkpoint_holds_b_alone_and_the_adapter_holds_a_as_it_was_drawn(run, spec):
    folder, record = run
    state = checkpoint(folder)["state_dict"]
    assert all(".lora_B." in name for name in state)
    assert sum(value.numel() for value in state.values()) == record.num_trainable_parameters
    drawn = downs(build_student(spec, lora_fa(**KEYS), CPU, 7))
    written = trained(folder)
    assert len(written) == 2 * len(state) == 2 * len(drawn)
    for name, weight in drawn.items():
        assert torch.equal(written[name.replace(".default", "")], weight)
    assert all(value.abs().max() > 0 for value in written.values())


def test_a_stopped_run_goes_on_and_ends_as_if_it_had_never_stopped(
    run, student_dir, teacher_dir, tmp_path
):
    with power_cut(5):
        fit(student_dir, teacher_dir, tmp_path, *SETTINGS)
    torch.manual_seed(99)  # another process would not be where this one is
    fit(student_dir, teacher_dir, tmp_path, *SETTINGS)
    expected, actual = trained(run[0]), trained(tmp_path)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("merge", [False, True])
def test_what_is_exported_gives_the_trained_students_logits(run, spec, tmp_path, merge):
    folder, _ = run
    student = build_student(spec, lora_fa(**KEYS), CPU, 7).eval()
    state = checkpoint(folder)["state_dict"]
    untouched = spec.load(CPU, trained=False).eval()
    student.load_state_dict({n.removeprefix("student."): v for n, v in state.items()}, strict=False)
    export(folder, tmp_path, merge=merge)
    if merge:
        exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        exported = PeftModel.from_pretrained(spec.load(CPU, trained=False), tmp_path).eval()
    with torch.no_grad():
        expected = student(input_ids=IDS).logits
        torch.testing.assert_close(exported(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert (untouched(input_ids=IDS).logits - expected).abs().max() > 0.01


def test_a_branch_on_an_embedding_trains_both_factors_as_in_peft(spec):
    student = build_student(spec, lora_fa(r=2, target_modules=["embed_tokens", "q_proj"]), CPU, 0)
    kinds = {re.search(r"lora_\w+", name)[0] for name in trained_parameters(student)}
    assert kinds == {"lora_B", "lora_embedding_A", "lora_embedding_B"}


def test_what_cannot_be_frozen_is_refused(spec):
    with pytest.raises(ValueError, match=r"lora\.target_modules: .* no branch is on one"):
        build_student(spec, lora_fa(r=2, target_modules=["embed_tokens"]), CPU, 0)
    with pytest.raises(ValueError, match=r"lora\.r=0") as refused:
        lora_fa(r=0, init_lora_weights="pissa")
    assert "lora.init_lora_weights='pissa': must be true or gaussian" in str(refused.value)
    lora_fa(init_lora_weights="gaussian")


def test_loraplus_on_a_frozen_a_is_refused(spec):
    parameters = trained_parameters(build_student(spec, lora_fa(**KEYS), CPU, 0))
    with pytest.raises(ValueError, match=r"optim.loraplus_lr_ratio=16.0: .* not both are trained"):
        AdamW(lr=0.1, loraplus_lr_ratio=16.0).build(parameters)


def test_the_choice_differs_from_lora_in_its_target_alone():
    frozen, plain = compose("lora=lora_fa"), compose("lora=lora")
    assert frozen["lora"].pop("_target_") == "neo.models.variants.lora_fa"
    assert plain["lora"].pop("_target_") == "neo.models.variants.lora"
    assert frozen == plain
