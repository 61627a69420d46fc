"""KaSA: the cut base, the branch, the penalties, and the way back to the untouched base."""

from contextlib import suppress

import pytest
import torch
from fits import fit, history, power_cut, trained
from lab import ROWS, tokenizer, write_rows
from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import KasaLinearVariant
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from neo.models.causal_lm import CausalLM
from neo.models.kasa import base_left_whole, kasa_penalty
from neo.models.start import start_of
from neo.models.student import build_meta_student, build_student, logits_on, save_student
from neo.models.variants import kasa

CPU = torch.device("cpu")
TARGETS = ["q_proj", "k_proj", "down_proj"]
PROBED = torch.arange(3, 67).view(2, 32)


def student_of(folder, seed=0, dtype="auto", start=None, **keys):
    keys = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **keys}
    return build_student(CausalLM(path=str(folder), dtype=dtype), kasa(**keys), CPU, seed, start)


def moved(student, by=0.1):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * by)
    return student


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def test_base_and_branch_are_pefts_own(student_dir):
    ours = student_of(student_dir)
    torch.manual_seed(0)
    theirs = get_peft_model(
        CausalLM(path=str(student_dir)).load(CPU, trained=False),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=TARGETS,
                   kasa_config=KasaConfig()),
    )  # fmt: skip
    whole = CausalLM(path=str(student_dir)).load(CPU, trained=False)
    for name, layer in layers(ours).items():
        other = layers(theirs)[name]
        torch.testing.assert_close(
            layer.base_layer.weight, other.base_layer.weight, rtol=0, atol=1e-5
        )
        before = whole.get_submodule(name.removeprefix("base_model.model.")).weight
        assert (layer.base_layer.weight - before).abs().max() > 1e-3
        for part in ("lora_A", "lora_B"):
            a, b = (getattr(each, part)["default"].weight for each in (layer, other))
            assert torch.equal(a, b)
        assert torch.equal(layer.lora_diag["default"], other.lora_diag["default"])


def test_its_branch_is_drawn_as_asked(student_dir):
    gaussian = layers(student_of(student_dir, init_lora_weights="gaussian"))
    for name, layer in layers(student_of(student_dir)).items():
        uniform, normal = (each.lora_A["default"].weight for each in (layer, gaussian[name]))
        assert uniform.abs().max() <= layer.in_features**-0.5  # Kaiming's bound
        assert normal.abs().max() > layer.in_features**-0.5


def test_pefts_own_way_of_cutting_is_as_it_was_afterwards():
    cut = KasaLinearVariant._truncate_base_weight
    with suppress(RuntimeError), base_left_whole():
        assert KasaLinearVariant._truncate_base_weight is not cut
        raise RuntimeError
    assert KasaLinearVariant._truncate_base_weight is cut


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_start_that_was_kept_gives_the_same_base_without_another_svd(
    student_dir, monkeypatch, dtype
):
    first = student_of(student_dir, dtype=dtype, rank_pattern={"k_proj": 2})
    monkeypatch.setattr(torch.linalg, "svd", None)
    again = student_of(student_dir, dtype=dtype, rank_pattern={"k_proj": 2}, start=start_of(first))
    for (name, ours), (_, theirs) in zip(
        first.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"modules_to_save": ["lm_head"]},
    ],
)
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_patt")
def test_saved_it_is_plain_lora_that_gives_its_logits_on_the_untouched_base(
    student_dir, tmp_path, keys
):
    student = moved(student_of(student_dir, **keys))
    expected = logits_on(student, PROBED)
    save_student(student, tokenizer(), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(student_dir)
    untouched = logits_on(base, PROBED)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert loaded.peft_config["default"].kasa_config is None
    assert not any("diag" in n for n in load_file(tmp_path / "adapter/adapter_model.safetensors"))
    torch.testing.assert_close(logits_on(loaded, PROBED), expected, rtol=0, atol=1e-4)
    assert (untouched - expected).abs().max() > 0.1


def test_the_penalty_is_that_of_its_equations_averaged_over_layers(student_dir):
    student = moved(student_of(student_dir, kasa_config={"beta": 0.3, "gamma": 0.7}))
    expected = 0.0
    for layer in layers(student).values():
        a, b = (getattr(layer, p)["default"].weight.double() for p in ("lora_A", "lora_B"))
        d, one = layer.lora_diag["default"].double(), torch.eye(4, dtype=torch.float64)
        orthogonal = (a @ a.T - one).norm() + (b.T @ b - one).norm()
        expected = expected + 0.3 * (d @ d) + 0.7 * orthogonal
    assert kasa_penalty(student).item() == pytest.approx(expected.item() / 6, rel=1e-5)


SETTINGS = ["method=lora", "lora=kasa", "trainer.max_steps=4", "trainer.max_epochs=-1",
            "data.batch_size=2", "data.packing=false", "optim.lr=0.01"]  # fmt: skip


def test_the_penalty_moves_the_weights_whatever_the_micro_batches(student_dir, tmp_path):
    """Its gradient is added once per optimizer step, after the mean over the step's tokens."""
    rows = f"data.path={write_rows(tmp_path / 'rows.jsonl', ROWS * 2)}"
    heavy = [rows, "lora.kasa_config.gamma=5.0", "trainer.max_steps=2"]
    runs = {
        "one": ["data.batch_size=4"],
        "two": ["data.batch_size=2", "trainer.accumulate_grad_batches=2"],
        "light": ["data.batch_size=4", "lora.kasa_config.gamma=0.0"],
    }
    for name, keys in runs.items():
        fit(student_dir, None, tmp_path / name, *SETTINGS, *heavy, "data.shuffle=false", *keys)
    one, two, light = (trained(tmp_path / name) for name in runs)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-5)
    assert any(not torch.allclose(light[name], value, atol=1e-3) for name, value in one.items())
    assert history(tmp_path / "one", "train/penalty")[0] > 1
    assert history(tmp_path / "light", "train/penalty")[0] < 0.1


def test_a_stopped_run_of_it_goes_on_without_another_svd(student_dir, tmp_path, monkeypatch):
    settings = [*SETTINGS, f"data.path={write_rows(tmp_path / 'rows.jsonl', ROWS * 2)}",
                "checkpoint_every_n_steps=2"]  # fmt: skip
    fit(student_dir, None, tmp_path / "whole", *settings)
    with power_cut(3):
        fit(student_dir, None, tmp_path / "cut", *settings)
    monkeypatch.setattr(torch.linalg, "svd", None)
    fit(student_dir, None, tmp_path / "cut", *settings)
    for name, value in trained(tmp_path / "whole").items():
        assert torch.equal(trained(tmp_path / "cut")[name], value), name


def test_a_rank_that_leaves_nothing_of_a_layer_is_refused(student_dir):
    for build in (student_of, lambda d, **k: build_meta_student(CausalLM(path=str(d)), kasa(**k))):
        with pytest.raises(
            ValueError, match=r"lora.r=16: .*k_proj is a layer of rank 16, of which"
        ):
            build(student_dir, r=16, target_modules=["k_proj"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_dora": True}, "lora.use_dora=True: does not go together with KaSA"),
        ({"init_lora_weights": "pissa"}, "lora.init_lora_weights='pissa': must be true or gauss"),
        ({"kasa_config": {"bta": 1}}, "lora.kasa_config.bta: no such key; it takes beta, gamma"),
        ({"kasa_config": {"beta": -1.0}}, "lora.kasa_config={'beta': -1.0}: `beta` must be"),
    ],
)
def test_keys_that_do_not_go_with_it_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        kasa(**{"r": 4, **keys})
