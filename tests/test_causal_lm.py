import json
import shutil

import pytest
import torch
from lab import FAMILIES, tiny_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from neo.models import causal_lm
from neo.models.causal_lm import CausalLM
from neo.models.hidden import hidden_states

CPU = torch.device("cpu")


def load(folder, **keys):
    return CausalLM(path=str(folder), **keys).load(CPU, trained=False)


def ids(*shape, seed=0):
    return torch.randint(4, 400, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {family: tiny_model(folder / family, family=family) for family in FAMILIES}


class Biased(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 1, output.logits.shape[-1])
        return output


def test_a_model_that_does_something_else_to_its_logits_is_refused(student_dir, monkeypatch):
    monkeypatch.setattr(causal_lm.AutoModelForCausalLM, "from_pretrained", Biased.from_pretrained)
    with pytest.raises(ValueError, match="Biased does more to its logits"):
        load(student_dir)


@pytest.mark.parametrize(
    ("family", "attention"),
    # Gemma 2 caps its attention scores, which sdpa cannot
    [(f, a) for f in FAMILIES for a in ("sdpa", "eager") if (f, a) != ("gemma2", "sdpa")],
)
def test_a_packed_row_gives_the_hidden_states_of_its_examples_alone(family, attention, families):
    model = load(families[family], attn_implementation=attention)
    lengths = (5, 1, 8, 3)
    parts = [ids(1, length, seed=length) for length in lengths]
    packed = torch.cat(parts, dim=1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        together = hidden_states(model, packed, positions).split(lengths, dim=1)
        for part, states in zip(parts, together, strict=True):
            alone = hidden_states(model, part, torch.arange(part.shape[1])[None])
            torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-5)


def test_padding_behind_a_row_changes_nothing_before_it(student_dir):
    model = load(student_dir)
    row = ids(1, 6)
    padded = torch.cat([row, torch.zeros(1, 3, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        alone = hidden_states(model, row, torch.arange(6)[None])
        behind = hidden_states(model, padded, torch.arange(9)[None])[:, :6]
    torch.testing.assert_close(behind, alone)


def test_fresh_weights_follow_from_the_seed_and_leave_the_random_state_alone(student_dir):
    spec = CausalLM(path=str(student_dir), random_init=True)
    state = torch.get_rng_state()
    first, again, other = (spec.load(CPU, trained=True, seed=seed) for seed in (11, 11, 12))
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, load(student_dir).lm_head.weight)


def test_frozen_weights_take_the_dtype_asked_for_and_trained_ones_stay_float32(student_dir):
    assert load(student_dir).dtype == torch.float32  # auto, on a CPU
    assert load(student_dir, dtype="bfloat16").dtype == torch.bfloat16
    spec = CausalLM(path=str(student_dir), dtype="bfloat16")
    assert spec.load(CPU, trained=True).dtype == torch.float32


def test_a_model_is_in_eval_mode_when_it_is_loaded(student_dir):
    assert not load(student_dir).training
    assert not load(student_dir, random_init=True).training


def test_activation_checkpointing_changes_no_gradient(student_dir):
    gradients = []
    for recompute in (False, True):
        model = load(student_dir, activation_checkpointing=recompute).train()
        assert model.is_gradient_checkpointing == recompute
        hidden = hidden_states(model, ids(2, 7), torch.arange(7).expand(2, -1))
        hidden.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_the_identity_of_a_folder_changes_with_a_weight_and_not_with_its_place(
    student_dir, tmp_path
):
    moved = shutil.copytree(student_dir, tmp_path / "moved")
    spec = CausalLM(path=str(moved))
    assert spec.identity() == CausalLM(path=str(student_dir)).identity()
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert spec.identity() != CausalLM(path=str(student_dir)).identity()


def test_weights_are_read_from_safetensors_alone(student_dir, tmp_path):
    folder = shutil.copytree(student_dir, tmp_path / "both")
    torch.save({}, folder / "pytorch_model.bin")
    torch.testing.assert_close(load(folder).lm_head.weight, load(student_dir).lm_head.weight)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"only pytorch_model.bin, and a pickle can run code"):
        CausalLM(path=str(folder)).config()
    with pytest.raises(ValueError, match="path="):
        load(folder)


def test_a_folder_whose_weights_are_incomplete_is_refused(student_dir, tmp_path):
    folder = shutil.copytree(student_dir, tmp_path / "incomplete")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights of 1 tensors are missing, such as .*up_proj"):
        load(folder)


def test_a_folder_whose_weights_are_of_another_size_is_refused(student_dir, tmp_path):
    folder = shutil.copytree(student_dir, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(ValueError, match="path="):
        load(folder)


def test_a_file_of_weights_that_is_cut_off_is_refused(student_dir, tmp_path):
    folder = shutil.copytree(student_dir, tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="path="):
        load(folder)


def test_the_shipped_models_have_names_that_hold_no_path():
    location = CausalLM(path="neo://mini-student").location
    assert location == str(causal_lm.MINI / "student")
    with pytest.raises(ValueError, match="must be one of neo://mini-student, neo://mini-teacher"):
        _ = CausalLM(path="neo://mini-../../student").location


def test_building_a_spec_reads_nothing():
    CausalLM(path="/nowhere")
    with pytest.raises(ValueError, match="dtype='int8': must be one of auto, float32"):
        CausalLM(path="/nowhere", dtype="int8")


def test_the_model_on_the_meta_device_has_the_shapes_and_no_memory(student_dir):
    meta, real = CausalLM(path=str(student_dir)).meta(), load(student_dir)
    assert {n: p.shape for n, p in meta.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }
    assert all(p.is_meta for p in meta.parameters())


def test_a_quantization_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="quantization='int8': must be null or one of nf4, fp4"):
        CausalLM(path="/nowhere", quantization="int8")


def test_fresh_weights_are_not_quantized():
    with pytest.raises(ValueError, match="quantization='nf4': random_init=true draws weights"):
        CausalLM(path="/nowhere", quantization="nf4", random_init=True)


def test_weights_that_are_stored_quantized_are_not_quantized_again(student_dir, tmp_path):
    folder = shutil.copytree(student_dir, tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"path=.*stored quantised \(gptq\)"):
        CausalLM(path=str(folder), quantization="nf4").meta()
    CausalLM(path=str(folder)).meta()
