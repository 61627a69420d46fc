import math

import pytest
import torch
from fits import fit, history
from hypothesis import given
from hypothesis import strategies as st
from lab import compose, tiny_model
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from neo.config import ConfigError, validate
from neo.models.causal_lm import CausalLM
from neo.models.student import build_student, trained_parameters
from neo.models.variants import lora, none
from neo.training.module import NeoModule
from neo.training.optim import SCHEDULES, AdamW, decays

unit = st.floats(0, 1)
CPU = torch.device("cpu")
IDS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def student(student_dir):
    def student(variant, folder=None):
        return build_student(CausalLM(path=str(folder or student_dir)), variant, CPU, 0)

    return student


def kinds_of_branch(folder):
    """What can be trained beside A and B: magnitudes, biases, norms, a head, an embedding."""
    biased = tiny_model(folder, family="qwen2")
    return biased, {
        "plain": lora(r=2, target_modules="all-linear"),
        "magnitudes": lora(r=2, use_dora=True, target_modules=["q_proj", "embed_tokens"]),
        "biases": lora(r=2, target_modules=["q_proj"], bias="all", lora_bias=True),
        "norms": lora(r=2, target_modules=["q_proj"], modules_to_save=["norm", "input_layernorm"]),
        "a head": lora(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "an embedding": lora(r=2, target_modules=["v_proj", "embed_tokens"]),
    }


KINDS = ("plain", "magnitudes", "biases", "norms", "a head", "an embedding")


@pytest.fixture(scope="module")
def branches(student, tmp_path_factory):
    folder, variants = kinds_of_branch(tmp_path_factory.mktemp("biased"))
    return {kind: student(variant, folder) for kind, variant in variants.items()}


def groups_of(optimizer, parameters):
    """The rate and the decay of each parameter, by name; one that is in two groups is an error."""
    names = {id(p): name for name, p in parameters.items()}
    found = [
        (names[id(p)], (group["lr"], group["weight_decay"]))
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert len(found) == len(dict(found))
    return dict(found)


@given(progress=unit, warmup=st.floats(0, 0.99), schedule=st.sampled_from(SCHEDULES))
def test_a_rate_lies_between_0_and_the_highest(progress, warmup, schedule):
    spec = AdamW(lr=0.5, warmup_ratio=warmup, schedule=schedule)
    assert 0 <= spec.rate(progress) <= 0.5


@given(a=unit, b=unit, schedule=st.sampled_from(SCHEDULES))
def test_a_rate_rises_in_the_warm_up_and_never_after_it(a, b, schedule):
    spec = AdamW(lr=1.0, warmup_ratio=0.3, schedule=schedule)
    first, second = sorted((a, b))
    if second <= 0.3:
        assert spec.rate(first) <= spec.rate(second)
    if first >= 0.3:
        assert spec.rate(first) >= spec.rate(second) - 1e-12


@pytest.mark.parametrize(("schedule", "end"), [("cosine", 0.0), ("linear", 0.0), ("constant", 2.0)])
def test_a_rate_ends_where_its_schedule_says(schedule, end):
    spec = AdamW(lr=2.0, warmup_ratio=0.25, schedule=schedule)
    assert spec.rate(0.0) == 0.0
    assert spec.rate(0.25) == 2.0
    assert spec.rate(1.0) == pytest.approx(end)


def test_a_cosine_is_halfway_down_in_the_middle():
    assert AdamW(lr=1.0, warmup_ratio=0.0).rate(0.5) == pytest.approx(0.5)
    quarter = 0.5 + 0.5 * math.cos(math.pi / 4)
    assert AdamW(lr=1.0, warmup_ratio=0.0).rate(0.25) == pytest.approx(quarter)


def test_without_a_warm_up_the_first_rate_is_the_highest():
    for schedule in SCHEDULES:
        assert AdamW(lr=3.0, warmup_ratio=0.0, schedule=schedule).rate(0.0) == 3.0


def test_vectors_do_not_decay_and_every_parameter_is_in_one_group():
    parameters = {
        "matrix": nn.Parameter(torch.ones(2, 2)),
        "norm": nn.Parameter(torch.ones(2)),
        "bias": nn.Parameter(torch.ones(3)),
    }
    optimizer = AdamW(lr=0.1, weight_decay=0.5).build(parameters)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [decays[id(p)] for p in parameters.values()] == [0.5, 0.0, 0.0]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 3


def test_a_step_is_that_of_torchs_adamw():
    torch.manual_seed(0)
    start, gradient = torch.randn(3, 3), torch.randn(3, 3)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    keys = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
    for optimizer, parameter in (
        (AdamW(**keys).build({"w": ours}), ours),
        (torch.optim.AdamW([theirs], **keys), theirs),
    ):
        parameter.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr": 0.0}, r"optim.lr=0.0: must be a finite number above 0"),
        ({"lr": -1.0}, r"optim.lr=-1.0"),
        ({"lr": math.inf}, r"optim.lr=inf"),
        ({"lr": math.nan}, r"optim.lr=nan"),
        ({"betas": (0.9, 1.0)}, r"optim.betas=\[0.9, 1.0\]: must be two numbers in \[0, 1\)"),
        ({"eps": 0.0}, r"optim.eps=0.0: must be above 0"),
        ({"weight_decay": -0.1}, r"optim.weight_decay=-0.1: must not be negative"),
        ({"schedule": "cosin"}, r"optim.schedule='cosin': must be one of cosine, linear, constant"),
        ({"warmup_ratio": 1.0}, r"optim.warmup_ratio=1.0: must lie in \[0, 1\)"),
        ({"loraplus_lr_ratio": 0.0}, r"optim.loraplus_lr_ratio=0.0: must be a finite number above"),
        ({"loraplus_lr_ratio": math.nan}, r"optim.loraplus_lr_ratio=nan"),
        (
            {"loraplus_lr_ratio": 2.0, "loraplus_lr_embedding": -1.0},
            r"optim.loraplus_lr_embedding=-1.0: must be a finite number above 0, or null",
        ),
        (
            {"loraplus_lr_embedding": 1e-4},
            r"optim.loraplus_lr_embedding=0.0001: .*; set optim.loraplus_lr_ratio as well",
        ),
    ],
)
def test_a_value_that_cannot_train_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        AdamW(**{"lr": 0.1, **keys})


def test_betas_may_come_from_yaml_as_a_list():
    from neo.config import build

    spec = build({"_target_": "neo.training.optim.AdamW", "lr": 0.1, "betas": [0.8, 0.9]})
    assert tuple(spec.betas) == (0.8, 0.9)


@pytest.mark.parametrize("ratio", [None, 16.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_groups_hold_everything_that_is_trained_once(branches, kind, ratio):
    parameters = trained_parameters(branches[kind])
    optimizer = AdamW(lr=0.1, weight_decay=0.1, loraplus_lr_ratio=ratio).build(parameters)
    assert groups_of(optimizer, parameters).keys() == parameters.keys()
    assert all(group["lr"] == group["peak_lr"] for group in optimizer.param_groups)


@pytest.mark.parametrize("kind", KINDS)
def test_under_loraplus_every_parameter_has_the_rate_that_peft_gives_it(branches, kind):
    parameters = trained_parameters(branches[kind])
    spec = AdamW(lr=1e-3, weight_decay=0.1, loraplus_lr_ratio=16.0)
    theirs = create_loraplus_optimizer(
        branches[kind],
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=16.0,
        loraplus_weight_decay=0.1,
    )
    expected = groups_of(theirs, parameters)
    for name, (lr, decay) in groups_of(spec.build(parameters), parameters).items():
        assert lr == expected[name][0], name
        if parameters[name].ndim == 2:  # PEFT decays magnitudes, and norms other than LayerNorm
            assert decay == expected[name][1], name


def test_a_branch_on_an_embedding_learns_at_its_own_rate_under_loraplus_alone(branches):
    parameters = trained_parameters(branches["an embedding"])
    embedding = {name for name in parameters if "lora_embedding_" in name}
    assert len(embedding) == 2
    for keys, expected in (
        ({"loraplus_lr_ratio": 4.0, "loraplus_lr_embedding": 3e-4}, 3e-4),
        ({"loraplus_lr_ratio": 4.0}, 1e-6),
        ({}, 0.1),
    ):
        found = groups_of(AdamW(lr=0.1, **keys).build(parameters), parameters)
        assert {found[name][0] for name in embedding} == {expected}


def test_two_steps_of_loraplus_are_those_of_two_groups_made_by_hand(student):
    variant = lora(r=4, init_lora_weights=False)  # A learns from the first step on
    ours, theirs = student(variant), student(variant)
    named = trained_parameters(theirs)
    start = {name: p.detach().clone() for name, p in named.items()}
    by_hand = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if "lora_A" in n], "lr": 1e-3},
            {"params": [p for n, p in named.items() if "lora_B" in n], "lr": 16e-3},
        ],
        weight_decay=0.1,
    )
    spec = AdamW(lr=1e-3, weight_decay=0.1, loraplus_lr_ratio=16.0)
    for model, optimizer in (
        (ours, spec.build(trained_parameters(ours))), (theirs, by_hand)
    ):  # fmt: skip
        for step in range(2):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            if step == 0 and model is ours:
                moved = {
                    n: float((p.detach() - start[n]).abs().median())
                    for n, p in trained_parameters(ours).items()
                }
    for name, parameter in trained_parameters(ours).items():
        torch.testing.assert_close(parameter, named[name], rtol=0, atol=1e-7)
        # Adam's first step is as long as the rate, whatever the gradient
        assert moved[name] == pytest.approx(16e-3 if "lora_B" in name else 1e-3, rel=0.05)


@given(progress=unit, schedule=st.sampled_from(SCHEDULES), ratio=st.floats(0.1, 64))
def test_the_schedule_keeps_the_ratio_of_the_groups(progress, schedule, ratio):
    parameters = {f"q_proj.lora_{x}.default.weight": nn.Parameter(torch.ones(2, 2)) for x in "AB"}
    spec = AdamW(lr=2e-4, schedule=schedule, loraplus_lr_ratio=ratio)
    optimizer = spec.build(parameters)
    optimizer.load_state_dict(optimizer.state_dict())  # as after a resume
    assert spec.set_rates(optimizer, progress) == spec.rate(progress)
    rates = {name: lr for name, (lr, _) in groups_of(optimizer, parameters).items()}
    down, up = rates.values()
    assert down == spec.rate(progress)
    assert up == pytest.approx(ratio * down, rel=1e-12)


def test_a_run_of_loraplus_keeps_the_ratio_at_every_step_and_logs_the_rate_of_a(
    student_dir, tmp_path, monkeypatch
):
    seen = []
    was = NeoModule.on_before_optimizer_step

    def watch(self, optimizer):
        was(self, optimizer)
        names = {id(p): name for name, p in trained_parameters(self.student).items()}
        seen.append(
            {
                "lora_B" in names[id(p)]: group["lr"]
                for group in optimizer.param_groups
                for p in group["params"]
            }
        )

    monkeypatch.setattr(NeoModule, "on_before_optimizer_step", watch)
    fit(student_dir, None, tmp_path, "lora=loraplus", "method=lora", "optim.lr=0.001",
        "trainer.max_steps=6", "trainer.max_epochs=-1")  # fmt: skip
    assert len(seen) == 6
    assert [rates[True] for rates in seen] == pytest.approx([16 * r[False] for r in seen])
    assert history(tmp_path, "train/lr") == pytest.approx([rates[False] for rates in seen])


def test_loraplus_is_one_choice_that_changes_lora_by_the_ratio_alone():
    plain, plus = compose("lora=lora"), compose("lora=loraplus")
    assert plus["optim"].pop("loraplus_lr_ratio") == 16
    assert plus == plain
    typed = compose("lora=loraplus", "optim.loraplus_lr_ratio=4", "lora.r=8")
    assert (typed["optim"]["loraplus_lr_ratio"], typed["lora"]["lora_alpha"]) == (4, 16)
    typed["optim"]["loraplus_lr_ratio"] = "much"
    with pytest.raises(ConfigError, match="loraplus_lr_ratio='much': must be a number or null"):
        validate(typed)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", (2, 2), True),
        ("model.embed_tokens.weight", (2, 2), True),
        ("layers.0.mlp.experts.gate_up_proj", (2, 2, 2), True),
        ("layers.0.mlp.experts.gate_up_proj_bias", (2, 2), False),
        ("model.norm.weight", (2,), False),
        ("layers.0.self_attn.q_norm.weight", (2, 2), False),
        ("layers.0.input_layernorm.weight", (2, 2), False),
        ("h.0.ln_1.weight", (2, 2), False),
        ("backbone.norm_f.weight", (2, 2), False),
        ("norm.modules_to_save.default.weight", (2, 2), False),
        ("lm_head.modules_to_save.default.weight", (2, 2), True),
        ("q_proj.lora_A.default.weight", (2, 2), True),
        ("q_proj.lora_B.default.bias", (2,), False),
        ("q_proj.lora_magnitude_vector.default.weight", (2,), False),
        ("conv.lora_magnitude_vector.default.weight", (1, 2, 1, 1), False),
        ("weight", (2, 2), True),
    ],
)
def test_weight_decay_is_for_matrices_that_are_no_norm_bias_or_magnitude(name, shape, expected):
    assert decays(name, len(shape)) == expected
    parameters = {name: nn.Parameter(torch.ones(shape)), "w": nn.Parameter(torch.ones(2, 2))}
    found = groups_of(AdamW(lr=0.1, weight_decay=0.5).build(parameters), parameters)
    assert found == {name: (0.1, 0.5 if expected else 0.0), "w": (0.1, 0.5)}


def test_magnitudes_of_dora_do_not_decay_whatever_their_shape(branches):
    conv = get_peft_model(
        nn.Sequential(nn.Conv1d(3, 4, 2)), LoraConfig(r=2, use_dora=True, target_modules=["0"])
    )
    shapes = set()
    for model in (branches["magnitudes"], conv):
        parameters = trained_parameters(model)
        found = groups_of(AdamW(lr=0.1, weight_decay=0.5).build(parameters), parameters)
        magnitudes = {name for name in found if "magnitude" in name}
        assert magnitudes
        for name, (_, decay) in found.items():
            assert decay == (0.0 if name in magnitudes else 0.5), name
        shapes |= {parameters[name].ndim for name in magnitudes}
    assert shapes == {1, 3}


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("none", {"loraplus_lr_ratio": 16.0}, r"optim.loraplus_lr_ratio=16.0: .* not both are"),
        ("plain", {"loraplus_lr_ratio": 4.0, "loraplus_lr_embedding": 1e-4},
         r"optim.loraplus_lr_embedding=0.0001: no branch on an embedding"),
        ("vectors", {"weight_decay": 0.1}, r"optim.weight_decay=0.1: no matrix is trained"),
    ],
)  # fmt: skip
def test_a_group_that_is_asked_for_and_matches_nothing_is_refused_with_what_there_is(
    student, kind, keys, message
):
    model = student(none() if kind == "none" else lora(r=2, target_modules=["q_proj"]))
    parameters = trained_parameters(model)
    if kind == "vectors":
        parameters = {"model.layers.1.norm.weight": nn.Parameter(torch.ones(2))}
    with pytest.raises(ValueError, match=message) as refused:
        AdamW(lr=0.1, **keys).build(parameters)
    there = {
        "none": "model.layers.*.mlp.down_proj.weight, model.layers.*.mlp.gate_proj.weight",
        "plain": "model.layers.*.self_attn.q_proj.lora_A.default.weight",
        "vectors": "trained are: model.layers.*.norm.weight",
    }
    assert there[kind] in str(refused.value)
    assert ".0." not in str(refused.value)


def test_groups_are_checked_by_names_and_shapes_alone():
    AdamW(lr=0.1, loraplus_lr_ratio=2.0).check({"lora_A.weight": (2, 3), "lora_B.weight": (3, 2)})
    with pytest.raises(ValueError, match=r"trained are: lora_B\.weight"):
        AdamW(lr=0.1, loraplus_lr_ratio=2.0).check({"lora_B.weight": (3, 2)})
    with pytest.raises(ValueError, match="no parameters") as refused:
        AdamW(lr=0.1, loraplus_lr_ratio=2.0, loraplus_lr_embedding=1.0, weight_decay=1.0).check({})
    assert len(str(refused.value).splitlines()) == 3
