import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab import compose

from neo.config import (
    GROUPS,
    ConfigError,
    build,
    conf_dir,
    meant,
    open_groups,
    run_id,
    validate,
)
from neo.losses.distillation import Distillation
from neo.losses.divergences import forward_kl, jsd
from neo.models.variants import Variant


@pytest.fixture(scope="module")
def default():
    return compose()


def changed(config, path, value):
    config = copy.deepcopy(config)
    node = config
    *parents, key = path.split(".")
    for parent in parents:
        node = node[parent]
    node[key] = value
    return config


@pytest.mark.parametrize(
    "path",
    ["logger", "run_dir", "experiment_name", "dry_run", "rerun", "trainer.accelerator",
     "trainer.devices", "trainer.num_nodes", "trainer.enable_progress_bar",
     "trainer.log_every_n_steps", "teacher.device"],
)  # fmt: skip
def test_where_and_how_loudly_a_run_ran_does_not_change_its_id(path, default):
    assert run_id(changed(default, path, "other")) == run_id(default)


@pytest.mark.parametrize(
    "path",
    ["seed", "lora.r", "data.path", "student.path", "trainer.max_steps", "trainer.precision",
     "loss.divergence._target_", "eval_split", "method.name"],
)  # fmt: skip
def test_whatever_changes_the_numbers_changes_the_id(path, default):
    assert run_id(changed(default, path, "other")) != run_id(default)


def test_an_id_is_eight_hex_digits_and_blind_to_the_order_of_keys(default):
    identity = run_id(default)
    assert len(identity) == 8
    int(identity, 16)
    assert run_id(dict(reversed(default.items()))) == identity


def test_finding_an_id_leaves_the_config_as_it_was(default):
    before = copy.deepcopy(default)
    run_id(default)
    assert default == before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("loss.kd_ratio=1", "loss.kd_ratio=1.0"),
        ("optim.weight_decay=0", "optim.weight_decay=0.0"),
        ("lora.lora_dropout=0", "lora.lora_dropout=0.0"),
    ],
)
def test_a_whole_number_for_a_fraction_is_the_same_run(one, other):
    assert run_id(compose(one)) == run_id(compose(other))


@given(
    group=st.sampled_from(GROUPS),
    key=st.from_regex(r"[a-z_]{1,8}(\.[a-z_]{1,8}){0,2}", fullmatch=True),
    value=st.text(max_size=8),
)
def test_keys_of_groups_are_opened_and_nothing_else_is(group, key, value):
    assert open_groups([f"{group}.{key}={value}"]) == [f"++{group}.{key}={value}"]
    for left in (f"{group}={key}", f"+{group}.{key}=1", f"~{group}.{key}", f"x.{key}=1", "-m"):
        assert open_groups([left]) == [left]


def test_a_key_that_a_groups_file_does_not_mention_can_be_given():
    config = compose("student.dtype=bfloat16", "lora.use_dora=true", "data.batch_size=3")
    assert config["student"]["dtype"] == "bfloat16"
    assert config["lora"]["use_dora"] is True
    validate(config)


def test_a_validated_node_builds_what_it_describes(default):
    assert build(default["loss"]).divergence.func is forward_kl
    built = build(compose("loss=jsd", "loss.divergence.beta=0.25")["loss"])
    assert isinstance(built, Distillation)
    assert built.divergence.func is jsd
    assert built.divergence.keywords == {"beta": 0.25}
    variant = build(default["lora"])
    assert isinstance(variant, Variant)
    assert (variant.adapter.r, variant.adapter.lora_alpha) == (64, 128)


def test_alpha_follows_r_and_the_learning_rate_the_method():
    assert compose("lora.r=3")["lora"]["lora_alpha"] == 6
    assert compose("optim.base_lr=3e-5")["optim"]["lr"] == 3e-4
    assert compose("optim.lr=1e-3")["optim"]["lr"] == 1e-3


def test_the_command_line_beats_the_method():
    assert compose("method=kd", "loss.kd_ratio=0.9")["loss"]["kd_ratio"] == 0.9


def test_a_group_that_is_no_mapping_is_a_problem_and_not_a_crash(default):
    for value in (None, 3, "lora", [1]):
        with pytest.raises(ConfigError, match=r"lora._target_=None: must be one of neo.models"):
            validate(changed(default, "lora", value))


def test_an_error_lists_every_problem_on_a_line_of_its_own():
    error = ConfigError(["a: one", "b: two"])
    assert str(error) == "this config cannot run:\n  a: one\n  b: two"
    assert error.problems == ["a: one", "b: two"]


def test_a_guess_is_made_only_where_something_is_near():
    assert meant("sedd", ["seed", "rerun"]) == " (did you mean seed?)"
    assert meant("zzzzzz", ["seed", "rerun"]) == ""


def test_the_configs_lie_where_the_package_finds_them():
    assert (conf_dir() / "config.yaml").is_file()


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_has_choices(group):
    assert list((conf_dir() / group).glob("*.yaml"))
