import pytest
import torch
from lab import compose
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer

from neo.config import build
from neo.models.causal_lm import CausalLM
from neo.models.moslora import MoSLoRAConfig
from neo.models.student import build_student
from neo.models.variants import Variant, lora, lora_fa, moslora, none


@pytest.fixture
def model(student_dir):
    return CausalLM(path=str(student_dir)).load(torch.device("cpu"), trained=False)


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_keys_of_a_variant_are_pefts_own():
    variant = lora(r=3, lora_alpha=5, use_rslora=True)
    assert (variant.adapter.r, variant.adapter.lora_alpha) == (3, 5)
    assert variant.adapter.use_rslora
    assert variant.adapter.task_type == "CAUSAL_LM"


def test_a_mixer_is_a_key_beside_those_of_lora():
    variant = moslora(r=3, lora_alpha=5, mixer="orthogonal")
    assert isinstance(variant.adapter, MoSLoRAConfig)
    assert (variant.adapter.r, variant.adapter.lora_alpha) == (3, 5)
    assert variant.adapter.mixer == "orthogonal"
    assert moslora().adapter.mixer == "kaiming"


@pytest.mark.parametrize(
    ("name", "r", "scaling"),
    [("lora", 64, 2), ("rslora", 64, 2), ("rslora", 16, 4), ("dora", 4, 2)],
)
def test_the_scaling_of_a_file_is_what_its_comment_says(student_dir, name, r, scaling):
    variant = build(compose(f"lora={name}", "method=lora", f"lora.r={r}")["lora"])
    student = build_student(CausalLM(path=str(student_dir)), variant, torch.device("cpu"), 0)
    scalings = {m.scaling["default"] for m in student.modules() if isinstance(m, LoraLayer)}
    assert scalings == {scaling}


def test_what_is_done_once_a_branch_is_attached_is_done_to_the_attached_model(model):
    seen = []
    variant = Variant(lora(r=2).adapter, lambda student: seen.append(student) or student)
    assert variant.attach(model) is seen[0]
    assert isinstance(seen[0], PeftModel)


def test_all_linear_is_every_linear_layer_but_the_head(model):
    student = lora(r=2, target_modules="all-linear").attach(model)
    names = trainable(student)
    assert len(names) == 2 * len(LINEAR) * 2  # A and B, two layers
    assert {part for name in names for part in LINEAR if part in name} == set(LINEAR)
    assert not any("lm_head" in name or "embed" in name for name in names)


def test_a_branch_is_trained_in_float32_beside_frozen_weights_of_another_dtype(student_dir):
    spec = CausalLM(path=str(student_dir), dtype="bfloat16")
    student = lora(r=2).attach(spec.load(torch.device("cpu"), trained=False))
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in student.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_without_a_branch_everything_is_trained(model):
    model.requires_grad_(False)
    student = none().attach(model)
    assert student is model
    assert not isinstance(student, PeftModel)
    assert all(p.requires_grad for p in student.parameters())
    assert none() == Variant(None)


def test_a_list_of_targets_trains_these_and_no_other(model):
    names = trainable(lora(r=2, target_modules=["q_proj", "v_proj"]).attach(model))
    assert len(names) == 8
    assert all("q_proj" in name or "v_proj" in name for name in names)


def test_a_pattern_of_targets_trains_what_it_matches(model):
    names = trainable(lora(r=2, target_modules=r".*layers\.1\..*q_proj").attach(model))
    assert len(names) == 2
    assert all("layers.1" in name for name in names)


@pytest.mark.parametrize("targets", [["q_proj", "wq"], ["wq"], r".*\.wq"])
def test_a_target_that_matches_no_layer_is_refused_with_the_layers_there_are(model, targets):
    with pytest.raises(
        ValueError, match=r"lora.target_modules=\[.*wq'\]: match no layer"
    ) as refused:
        lora(r=2, target_modules=targets).attach(model)
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(refused.value)
    assert "lm_head" not in str(refused.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"r": 0}, "lora.r=0: must be an integer of at least 1"),
        ({"r": -3}, "lora.r=-3"),
        ({"r": True}, "lora.r=True"),
        ({"lora_alpha": 0}, "lora.lora_alpha=0: must be a number above 0"),
        ({"lora_dropout": 1}, r"lora.lora_dropout=1: must lie in \[0, 1\)"),
        ({"lora_dropout": -0.1}, "lora.lora_dropout=-0.1"),
        ({"kasa_config": {}}, r"lora.kasa_config=\{\}: take lora=kasa"),
        ({"target_modules": []}, r"lora.target_modules=\[\]: must name at least one layer"),
    ],
)
def test_a_value_that_peft_would_only_trip_over_later_is_refused(keys, message):
    for variant in (lora, moslora, lora_fa):
        with pytest.raises(ValueError, match=message):
            variant(**keys)


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(ValueError, match=r"lora\.r=0") as refused:
        lora(r=0, lora_alpha=-1, lora_dropout=2)
    assert len(str(refused.value).splitlines()) == 3
