import pytest
from lab import compose

from neo.config import GROUPS, conf_dir, validate

CHOICES = [
    (folder.name, file.stem)
    for folder in sorted(conf_dir().iterdir())
    if folder.is_dir()
    for file in sorted(folder.glob("*.yaml"))
]
# What a choice needs before it can stand alone.
NEEDS = {
    ("lora", "none"): ["method=kd"],
    ("teacher", "none"): ["method=lora"],
    ("data", "jsonl"): ["data.path=rows.jsonl"],
}


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_shipped_choice_makes_a_config_that_is_valid(group, choice):
    given = [f"{'+' if group == 'extra' else ''}{group}={choice}", *NEEDS.get((group, choice), [])]
    validate(compose(*given))


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_shipped_file_says_first_what_it_is(group, choice):
    lines = (conf_dir() / group / f"{choice}.yaml").read_text().splitlines()
    first = lines[1] if lines[0].startswith("# @package") else lines[0]
    assert first.startswith("# ")
    assert len(first) > 20


def test_the_groups_of_the_schema_are_the_folders():
    folders = {folder.name for folder in conf_dir().iterdir() if folder.is_dir()}
    assert folders == {*GROUPS, "experiment"}


@pytest.mark.parametrize("experiment", [c for g, c in CHOICES if g == "experiment"])
@pytest.mark.parametrize("method", ["sft", "lora", "kd", "neo"])
def test_every_experiment_runs_with_every_method(experiment, method):
    config = compose(f"experiment={experiment}", f"method={method}")
    if experiment in ("mini_teacher", "mini_student") and method != "sft":
        return  # they build the base that there is no branch on yet
    validate(config)


def test_lora_and_neo_learn_at_ten_times_the_rate_of_all_weights():
    rates = {m: compose(f"method={m}")["optim"]["lr"] for m in ("sft", "lora", "kd", "neo")}
    assert rates == {"sft": 2e-5, "lora": 2e-4, "kd": 2e-5, "neo": 2e-4}


def test_the_methods_differ_in_what_trains_and_in_the_teacher_as_the_paper_says():
    for method, branch, teacher in (
        ("sft", False, False), ("lora", True, False), ("kd", False, True), ("neo", True, True)
    ):  # fmt: skip
        config = compose(f"method={method}")
        assert (config["lora"]["_target_"] == "neo.models.variants.lora") == branch
        assert (config["loss"]["kd_ratio"] > 0) == teacher
        assert (config["teacher"]["path"] is not None) == teacher
