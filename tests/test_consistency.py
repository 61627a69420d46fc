import copy

import pytest
from lab import compose

from neo.config import ConfigError
from neo.training.consistency import check_config, run_problems


@pytest.fixture(scope="module")
def default():
    return compose("trainer=cpu")


@pytest.mark.parametrize("method", ["sft", "lora", "kd", "neo"])
def test_the_papers_methods_are_consistent_as_they_are_shipped(method):
    check_config(compose(f"method={method}", "trainer=cpu"))


@pytest.mark.parametrize(
    "name", ["x", "mini/teacher", "Llama-3.2_1B", "a.b", "2026", "größe", "..a", "a../b"]
)
def test_a_name_of_an_experiment_may_hold_folders(name, default):
    assert list(run_problems(default | {"experiment_name": name})) == []


@pytest.mark.parametrize("name", ["", "/x", "../x", "x/..", "x/../y", ".", "a b", "x/", "a:b", "~"])
def test_a_name_of_an_experiment_never_leads_out_of_runs(name, default):
    (problem,) = run_problems(default | {"experiment_name": name})
    assert problem.startswith(f"experiment_name={name!r}: must be a name")


def test_a_validation_split_of_no_rows_cannot_be_answered(default):
    config = copy.deepcopy(default) | {"eval_split": "val"}
    assert list(run_problems(config)) == []
    config["data"]["num_val_rows"] = 0
    assert list(run_problems(config)) == [
        "eval_split='val': data.num_val_rows=0 leaves no rows to answer"
    ]


def test_problems_of_groups_trainer_and_root_come_together(default):
    config = copy.deepcopy(default) | {"seed": -1}
    config["lora"]["rr"] = 2
    config["trainer"]["log_every_n_steps"] = 0
    with pytest.raises(ConfigError) as refused:
        check_config(config)
    assert [p.split("=")[0].split(":")[0] for p in refused.value.problems] == [
        "lora.rr", "trainer.log_every_n_steps", "seed",
    ]  # fmt: skip
