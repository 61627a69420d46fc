import torch
from lab import tiny_model, tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from neo.models.causal_lm import CausalLM
from neo.models.student import (
    build_meta_student,
    build_student,
    inner,
    save_student,
    trained_parameters,
)
from neo.models.variants import lora, none

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8]])


def build(folder, variant, seed=0):
    return build_student(CausalLM(path=str(folder)), variant, CPU, seed)


def test_a_fresh_branch_does_not_change_the_output(student_dir):
    base = CausalLM(path=str(student_dir)).load(CPU, trained=False)
    student = build(student_dir, lora(r=4)).eval()
    with torch.no_grad():
        torch.testing.assert_close(student(IDS).logits, base(IDS).logits)


def test_a_branch_follows_from_the_seed_and_leaves_the_random_state_alone(student_dir):
    state = torch.get_rng_state()
    first, again, other = (build(student_dir, lora(r=4), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    differ = []
    for name, weight in trained_parameters(first).items():
        assert torch.equal(weight, trained_parameters(again)[name])
        if "lora_A" in name:
            differ.append(not torch.equal(weight, trained_parameters(other)[name]))
    assert all(differ)


def test_a_student_is_in_train_mode(student_dir):
    assert build(student_dir, lora(r=4)).training
    assert build(student_dir, none()).training


def test_what_is_trained_is_named_and_tied_weights_are_named_once(tmp_path, student_dir):
    names = trained_parameters(build(student_dir, lora(r=4))).keys()
    assert all("lora_" in name for name in names)
    tied = tiny_model(tmp_path / "tied", tie=True)
    names = trained_parameters(build(tied, none())).keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_the_student_on_the_meta_device_trains_what_the_real_one_trains(student_dir):
    for variant in (lora(r=4, target_modules=["q_proj"]), none()):
        meta = build_meta_student(CausalLM(path=str(student_dir)), variant)
        real = build(student_dir, variant)
        shapes = [{n: p.shape for n, p in trained_parameters(s).items()} for s in (meta, real)]
        assert shapes[0] == shapes[1]
        assert all(p.is_meta for p in meta.parameters())


def test_the_model_inside_is_the_causal_lm_itself(student_dir):
    for variant in (lora(r=4), none()):
        model = inner(build(student_dir, variant))
        assert type(model).__name__ == "LlamaForCausalLM"


def test_a_branch_is_saved_as_an_adapter_that_plain_peft_loads(student_dir, tmp_path):
    student = build(student_dir, lora(r=4)).eval()
    with torch.no_grad():
        for weight in trained_parameters(student).values():
            weight.normal_(std=0.1)
        expected = student(IDS).logits
    assert save_student(student, tokenizer(), tmp_path) == tmp_path / "adapter"
    base = AutoModelForCausalLM.from_pretrained(student_dir)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, expected)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "adapter").get_vocab() == tokenizer().get_vocab()
    )


def test_a_student_without_a_branch_is_saved_as_a_model_that_plain_transformers_loads(
    student_dir, tmp_path
):
    student = build(student_dir, none()).eval()
    with torch.no_grad():
        student.lm_head.weight.add_(0.5)
        expected = student(IDS).logits
    assert save_student(student, tokenizer(), tmp_path) == tmp_path / "model"
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        torch.testing.assert_close(loaded(IDS).logits, expected)
