"""Starts computed from training rows, against PEFT itself and against dense mathematics."""

import copy
import dataclasses
import json

import pytest
import torch
from lab import calibration, tokenizer
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.loraga import preprocess_loraga

from neo.models.calibration import Calibration
from neo.models.causal_lm import CausalLM
from neo.models.start import start_of
from neo.models.student import build_meta_student, build_student, logits_on, save_student
from neo.models.variants import calibrated, lora

CPU = torch.device("cpu")
INITS = ("eva", "corda", "lora_ga")
TARGETS = ["q_proj", "k_proj", "down_proj"]
SETTINGS = {"eva": {"eva_config": {"rho": 1.0}}, "corda": {}, "lora_ga": {}}


def variant(init, **keys):
    keys = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **SETTINGS[init], **keys}
    return calibrated(init_lora_weights=init, calibration_rows=8, **keys)


def student_of(folder, init, data=None, seed=0, **keys):
    data = calibration() if data is None else data
    return build_student(
        CausalLM(path=str(folder)), variant(init, **keys), CPU, seed, calibration=data
    )


def layers(model):
    return {
        name.removeprefix("base_model.model."): m
        for name, m in model.named_modules()
        if isinstance(m, LoraLayer)
    }


def factors(layer):
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def base_of(folder):
    return CausalLM(path=str(folder)).load(CPU, trained=False)


def pefts_own(folder, init, data):
    """The student that PEFT makes by itself, as its documentation has it."""
    base = base_of(folder)
    keys = {"eva": {"eva_config": EvaConfig(rho=1.0)},
            "corda": {"corda_config": CordaConfig(corda_method="ipm")},
            "lora_ga": {"lora_ga_config": LoraGAConfig()}}[init]  # fmt: skip
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=TARGETS,
                        init_lora_weights=init, **keys)  # fmt: skip
    if init == "corda":
        rows = [row[None] for batch in data.batches for row in batch.input_ids[:, :-1]]
        preprocess_corda(base, config, lambda: [base(input_ids=row) for row in rows])
    if init == "lora_ga":
        base.enable_input_require_grads()
        preprocess_loraga(base, config, lambda: data.backward(base))
    if init != "eva":
        torch.manual_seed(0)
        return get_peft_model(base, config)
    student = get_peft_model(base, config, low_cpu_mem_usage=True)
    # PEFT takes the inputs where the label is not ignored: labels that stand at those places
    loader = [
        {"input_ids": b.input_ids, "labels": torch.where(b.supervised, b.input_ids, -100)}
        for b in data.batches
    ]
    initialize_lora_eva_weights(student, loader, show_progress_bar=False)
    return student


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_the_branch_begins_as_pefts_own(student_dir, init):
    data = calibration()
    expected = layers(pefts_own(student_dir, init, data))
    actual = layers(student_of(student_dir, init, data))
    assert actual.keys() == expected.keys()
    for name, layer in actual.items():
        for ours, theirs in zip(factors(layer), factors(expected[name]), strict=True):
            assert ours.abs().max() > 0 or init == "eva"
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(layer.base_layer.weight, expected[name].base_layer.weight)


def inputs_of(base, name, data, supervised):
    """What goes into a layer at the tokens that count, in float64."""
    seen = []
    hook = base.get_submodule(name).register_forward_hook(lambda m, x, y: seen.append(x[0]))
    which = []
    for batch in data.batches:
        base(input_ids=batch.input_ids)
        which.append(batch.supervised if supervised else batch.needed)
    hook.remove()
    return [x.detach()[w].double() for x, w in zip(seen, which, strict=True)]


def test_eva_takes_the_main_directions_of_a_layers_supervised_inputs(student_dir):
    data = calibration(num_batches=16)
    student = student_of(student_dir, "eva", data, r=2)
    base = base_of(student_dir)
    for name, layer in layers(student).items():
        inputs = torch.cat(inputs_of(base, name, data, supervised=True))
        centred = inputs - inputs.mean(0)
        down, up = factors(layer)
        # by what they explain of the variance: near-equal directions turn among themselves
        most = torch.linalg.svdvals(centred)[:2].square().sum()
        drawn = torch.nn.functional.normalize(torch.randn(2, layer.in_features).double(), dim=1)
        explained = [(centred @ a.double().T).square().sum() / most for a in (down, drawn)]
        assert explained[0] > 0.8, name
        assert explained[1] < 0.5, name
        torch.testing.assert_close(down.norm(dim=1), torch.ones(2))
        assert (up == 0).all()


def test_corda_takes_the_main_directions_of_weight_times_covariance(student_dir):
    data = calibration()
    student = student_of(student_dir, "corda", data)
    base = base_of(student_dir)
    for name, layer in layers(student).items():
        sequences = []
        for tokens, batch in zip(inputs_of(base, name, data, supervised=False), data.batches,
                                 strict=True):  # fmt: skip
            sequences += tokens.split(batch.needed.sum(1).tolist())
        products = [(x / x.max().abs()).T @ (x / x.max().abs()) for x in sequences]
        covariance = torch.stack(products).mean(0)
        covariance += 0.01 * covariance.diag().mean() * torch.eye(len(covariance))
        whole = base.get_submodule(name).weight.double()
        u, s, v = torch.linalg.svd(whole @ covariance, full_matrices=False)
        expected = (u[:, :4] * s[:4]) @ v[:4] @ torch.linalg.inv(covariance)
        down, up = factors(layer)
        taken = layer.scaling["default"] * up.double() @ down.double()
        torch.testing.assert_close(taken, expected, rtol=0, atol=1e-3 * expected.abs().max().item())
        rest = layer.base_layer.weight.double() + taken
        torch.testing.assert_close(rest, whole, rtol=0, atol=1e-5)


def gradients(folder, data):
    base = base_of(folder)
    for name, p in base.named_parameters():
        p.requires_grad_(name.split(".")[-2] in TARGETS)
    data.backward(base)
    return {name: p.grad for name, p in base.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("direction", "of_a", "of_b"),
    [
        ("ArB2r", slice(0, 4), slice(4, 8)),
        ("A2rBr", slice(4, 8), slice(0, 4)),
        ("ArBr", slice(1, 8, 2), slice(0, 8, 2)),
    ],
)
@pytest.mark.parametrize("scale", ["stable", "unit", "gd_scale"])
def test_lora_ga_takes_singular_directions_of_the_gradient_scaled_as_its_authors_do(
    student_dir, direction, of_a, of_b, scale
):
    data = calibration()
    settings = {"direction": direction, "scale": scale, "stable_gamma": 9}
    student = student_of(student_dir, "lora_ga", data, lora_ga_config=settings)
    found = gradients(student_dir, data)
    for name, layer in layers(student).items():
        u, _, v = torch.linalg.svd(found[f"{name}.weight"].double(), full_matrices=False)
        size = {"stable": layer.out_features**0.25 / 3, "unit": 1.0, "gd_scale": 1 / 2}[scale]
        down, up = factors(layer)
        for ours, exact in ((down, v[of_a]), (up.T, u.T[of_b])):
            torch.testing.assert_close(ours.norm(dim=1), torch.full((4,), size))
            cosines = torch.nn.functional.cosine_similarity(ours.double(), exact).abs()
            assert (cosines > 0.99).all(), (name, cosines)  # PEFT's SVD is randomised


def test_the_start_of_lora_ga_does_not_shrink_with_the_loss_as_pefts_own_does(student_dir):
    data = calibration()

    def divided(base):
        data.backward(base)
        for p in base.parameters():
            if p.grad is not None:
                p.grad /= 1000

    small = Calibration(data.batches, divided)
    ours, theirs = [], []
    for each in (data, small):
        ours.append(factors(layers(student_of(student_dir, "lora_ga", each))[NAME])[1])
        theirs.append(factors(layers(pefts_own(student_dir, "lora_ga", each))[NAME])[1])
    torch.testing.assert_close(ours[0], ours[1], rtol=1e-3, atol=1e-4)
    assert theirs[0].norm() / theirs[1].norm() == pytest.approx(1000, rel=0.01)


NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("init", INITS)
def test_it_follows_from_seed_and_rows_to_the_bit_and_draws_from_no_generator_of_the_run(
    student_dir, init
):
    state = torch.get_rng_state()
    first = start_of(student_of(student_dir, init, seed=3)).tensors
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again = start_of(student_of(student_dir, init, seed=3)).tensors
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    other = start_of(student_of(student_dir, init, calibration(seed=5), seed=3)).tensors
    name = f"base_model.model.{NAME}.lora_A.weight"
    assert not torch.allclose(first[name], other[name], atol=1e-2)


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_padding_behind_the_last_supervised_token_does_not_count(student_dir, init):
    data = calibration()
    padded = []
    for batch in data.batches:
        shape = (len(batch.input_ids), 7)
        padded.append(dataclasses.replace(
            batch,
            input_ids=torch.cat([batch.input_ids, torch.full(shape, 2)], 1),
            position_ids=torch.cat([batch.position_ids, torch.arange(7).expand(shape)], 1),
            supervised=torch.cat([batch.supervised, torch.zeros(shape, dtype=torch.bool)], 1),
        ))  # fmt: skip
    expected = start_of(student_of(student_dir, init, data)).tensors
    actual = start_of(student_of(student_dir, init, Calibration(padded, data.backward))).tensors
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init", INITS)
def test_the_base_is_left_in_its_mode_without_hooks_gradients_or_notes(student_dir, init):
    student = student_of(student_dir, init)
    fresh = layers(build_student(CausalLM(path=str(student_dir)), lora(r=4), CPU, 0))[NAME]
    assert student.training
    assert all(p.grad is None for p in student.parameters())
    for module in student.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks
    notes = vars(layers(student)[NAME].base_layer).keys() - vars(fresh.base_layer).keys()
    assert not notes


def test_ranks_move_between_layers_with_rho_above_one_and_are_kept_with_the_start(
    student_dir, tmp_path, monkeypatch
):
    keys = {"eva_config": {"rho": 2.0}, "use_rslora": True}
    student = student_of(student_dir, "eva", calibration(16), **keys)
    ranks = {name: layer.r["default"] for name, layer in layers(student).items()}
    assert sum(ranks.values()) == 4 * len(TARGETS) * 2
    assert len(set(ranks.values())) > 1
    start = start_of(student)
    monkeypatch.setattr("neo.models.calibration.initialize_lora_eva_weights", None)
    again = build_student(
        CausalLM(path=str(student_dir)), variant("eva", **keys), CPU, 7, start=start
    )
    for name, layer in layers(again).items():
        assert layer.r["default"] == ranks[name]
        assert layer.scaling == layers(student)[name].scaling
        for ours, first in zip(factors(layer), factors(layers(student)[name]), strict=True):
            assert torch.equal(ours, first)


@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("init", INITS)
def test_on_a_base_in_half_precision_the_branch_trains_in_float32(student_dir, init, rho):
    keys = {"eva_config": {"rho": rho}} if init == "eva" else {}
    spec = CausalLM(path=str(student_dir), dtype="bfloat16")
    student = build_student(spec, variant(init, **keys), CPU, 0, calibration=calibration(16))
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}


def test_batches_with_too_few_tokens_for_eva_are_left_out(student_dir):
    data, few = calibration(), calibration(length=2).batches
    assert max(int(batch.supervised.sum()) for batch in few) < 4
    some = Calibration([*few, *data.batches], data.backward)
    expected, actual = (
        start_of(student_of(student_dir, "eva", each)).tensors for each in (data, some)
    )
    for name, value in expected.items():
        assert torch.equal(actual[name], value)


@pytest.mark.parametrize("init", INITS)
def test_a_start_that_was_kept_needs_no_rows(student_dir, init, monkeypatch):
    first = student_of(student_dir, init, target_modules="all-linear")
    start = copy.deepcopy(start_of(first))
    spec = CausalLM(path=str(student_dir))
    again = build_student(spec, variant(init, target_modules="all-linear"), CPU, 9, start=start)
    ids = torch.arange(3, 67).view(2, 32)
    assert torch.equal(logits_on(again, ids), logits_on(first, ids))
    for (name, ours), (other, theirs) in zip(
        first.named_parameters(), again.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("init", INITS)
def test_saved_it_is_an_adapter_like_any_other(student_dir, tmp_path, init):
    save_student(student_of(student_dir, init), tokenizer(), tmp_path)
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True
    for key in ("eva_config", "corda_config", "lora_ga_config"):
        assert saved[key] is None


@pytest.mark.parametrize("init", INITS)
def test_without_rows_it_is_refused(student_dir, init):
    with pytest.raises(ValueError, match=f"lora.init_lora_weights={init}: is computed from train"):
        build_student(CausalLM(path=str(student_dir)), variant(init), CPU, 0)


@pytest.mark.parametrize(
    ("init", "keys", "message"),
    [
        ("corda", {"r": 20}, "lora.r=20: .*k_proj is a layer of rank 16, .* at most 16"),
        ("lora_ga", {"r": 9}, "lora.r=9: .*k_proj is a layer of rank 16 and A and B.* at most 8"),
        ("eva", {"r": 20, "eva_config": {"rho": 2.0}},
         "lora.r=20: .*_proj has inputs of 32 numbers, eva_config.rho is 2.0.* at most 16"),
        ("eva", {"target_modules": ["q_proj", "lm_head"]}, "lm_head lies outside the backbone"),
        ("eva", {"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens is no linear layer"),
        ("lora_ga", {"target_modules": ["embed_tokens"]}, "embed_tokens is no linear layer"),
    ],
)  # fmt: skip
def test_a_branch_that_does_not_fit_is_refused_on_the_meta_device(student_dir, init, keys, message):
    with pytest.raises(ValueError, match=message):
        build_meta_student(CausalLM(path=str(student_dir)), variant(init, **keys))


def test_eva_is_refused_where_a_batch_has_fewer_tokens_than_directions(student_dir):
    few = calibration(length=4)  # of 4 tokens in a row, one is supervised
    with pytest.raises(
        ValueError, match=r"more than 4 supervised tokens, and 8 directions .*_size"
    ):
        student_of(student_dir, "eva", few, eva_config={"rho": 2.0})
    student_of(student_dir, "eva", few, eva_config={"rho": 2.0, "use_label_mask": False})


def test_eva_that_does_not_settle_is_refused_instead_of_running_for_ever(student_dir, monkeypatch):
    monkeypatch.setattr("neo.models.calibration.MAX_PASSES", 1)
    with pytest.raises(ValueError, match=r"lora.eva_config.tau=1.0: .* 1 passes over 2 batches"):
        student_of(student_dir, "eva", eva_config={"rho": 1.0, "tau": 1.0})


def test_lora_ga_is_refused_where_a_layer_gets_no_gradient(student_dir):
    def only_of_the_first_layer(base):
        hidden = base.model.embed_tokens(torch.arange(3)[None])
        places = base.model.rotary_emb(hidden, torch.arange(3)[None])
        base.model.layers[0](hidden, position_embeddings=places).square().sum().backward()

    data = Calibration(calibration().batches, only_of_the_first_layer)
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj gets no gradient"):
        student_of(student_dir, "lora_ga", data)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"calibration_rows": 0}, "lora.calibration_rows=0: must be at least 1"),
        ({"eva_config": {"rhoo": 1}}, "lora.eva_config.rhoo: no such key; it takes rho, tau"),
        ({"eva_config": {"rho": 0.5}}, "lora.eva_config={'rho': 0.5}: `rho` must be"),
        ({"eva_config": {"label_mask_value": 0}}, "lora.eva_config.label_mask_value: no such key"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"stable_gamma": 0}},
         "lora.lora_ga_config.stable_gamma=0: must be above 0"),
        ({"eva_config": 5}, "lora.eva_config=5: must be a mapping"),
        ({"corda_config": {}}, "lora.corda_config: is not a key of init_lora_weights=eva"),
        ({"init_lora_weights": "corda", "corda_config": {"cache_file": "x"}},
         "lora.corda_config.cache_file: no such key; it takes corda_method"),
        ({"init_lora_weights": "corda", "corda_config": {"corda_method": "ipn"}},
         "lora.corda_config.corda_method='ipn': must be one of ipm, kpm"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "random"}},
         "direction='random' .PEFT gives A and B the same directions.: must be one of ArBr, A2rBr"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"scale": "weight_svd"}},
         "scale='weight_svd' .*must be one of stable, gd_scale, unit"),
    ],
)  # fmt: skip
def test_settings_that_are_wrong_are_refused(keys, message):
    keys = {"init_lora_weights": "eva", "calibration_rows": 8, "r": 4} | keys
    with pytest.raises(ValueError, match=message):
        calibrated(**keys)


@pytest.mark.parametrize("init", [*INITS, "loftq"])
def test_plain_lora_refuses_a_start_that_it_does_not_compute(init):
    with pytest.raises(ValueError, match=f"lora.init_lora_weights={init}: is (comp|not)"):
        lora(r=4, init_lora_weights=init)
