import re
from pathlib import Path

import pytest
from lab import compose

from neo.config import GROUPS, WHOLE, conf_dir, validate

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
    ("student", "llama3_1_pruned_1b"): ["student.path=pruned"],
    ("pair", "llama3_1_pruned_1b"): ["student.path=pruned"],
    ("experiment", "card"): ["scale=paper"],
    ("teacher", "cached"): ["teacher.path=targets"],
}
# The experiments that have two scales; card has the paper's alone.
TWO_SCALES = sorted(
    folder.name for folder in (conf_dir() / "experiment").iterdir()
    if folder.is_dir() and (folder / "mini.yaml").is_file() and folder.name != "shared"
)  # fmt: skip

SEARCHED = ("variants", "variants_search")


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
    assert folders == {*GROUPS, *WHOLE, "hydra"}


@pytest.mark.parametrize("experiment", [c for g, c in CHOICES if g == "experiment"])
@pytest.mark.parametrize("method", ["sft", "lora", "kd", "neo"])
def test_every_experiment_runs_with_every_method(experiment, method):
    given = NEEDS.get(("experiment", experiment), [])
    config = compose(f"experiment={experiment}", f"method={method}", *given)
    if experiment in ("mini_teacher", "mini_student") and method != "sft":
        return  # they build the base that there is no branch on yet
    if experiment in (*SEARCHED, "card") and method in ("sft", "kd"):
        return  # they compare branches; the card gives a rank
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


def compared_variants():
    text = (Path(__file__).parent.parent / "experiments/variants/table.yaml").read_text()
    return re.findall(r"where: \{lora: (\w+)\}", text)


def test_the_comparison_has_variants_that_there_are_each_once():
    # not all: a variant is one file, and is compared when someone has compared it
    names = {choice for group, choice in CHOICES if group == "lora"}
    assert len(compared_variants()) == len(set(compared_variants())) > 10
    assert set(compared_variants()) <= names - {"none", "lora_r16", "qlora"}


@pytest.mark.parametrize("variant", compared_variants())
@pytest.mark.parametrize("experiment", SEARCHED)
def test_the_variants_are_compared_at_one_rank_on_one_budget(experiment, variant):
    config = compose(f"experiment={experiment}", f"lora={variant}", "optim.lr=1e-3")
    plain = compose(f"experiment={experiment}", "optim.lr=1e-3")
    assert config["lora"]["r"] == 16
    shared = ("method", "student", "teacher", "loss", "data", "trainer", "eval_split")
    assert {key: config[key] for key in shared} == {key: plain[key] for key in shared}
    assert config["optim"] | {"loraplus_lr_ratio": 0} == plain["optim"] | {"loraplus_lr_ratio": 0}
    assert config["eval_split"] == ("test" if experiment == "variants" else None)


def test_the_rates_of_the_variants_are_searched_with_seeds_that_are_not_reported():
    texts = [(conf_dir() / f"experiment/{name}.yaml").read_text() for name in SEARCHED]
    reported, searched = (re.search(r"seed: ([\d,]+)", text)[1].split(",") for text in texts)
    assert len(reported) == 5
    assert not set(reported) & set(searched)


def test_the_table_of_the_search_asks_for_every_point_of_the_grid():
    text = (conf_dir() / "experiment/variants_search.yaml").read_text()
    grid = [float(lr) for lr in re.search(r"optim\.lr: (\S+)", text)[1].split(",")]
    folder = Path(__file__).parent.parent / "experiments/variants_search"
    points = re.findall(r"\{lora: (\w+), optim\.lr: ([^}]+)\}", (folder / "table.yaml").read_text())
    assert [(name, float(lr)) for name, lr in points] == [
        (name, lr) for name in compared_variants() for lr in grid
    ]


@pytest.mark.parametrize("experiment", TWO_SCALES)
def test_every_experiment_of_the_paper_has_its_settings_at_both_scales(experiment):
    mini, paper = (compose(f"experiment={experiment}", f"scale={s}") for s in ("mini", "paper"))
    for config, name in ((mini, experiment), (paper, f"{experiment}_paper")):
        validate(config)
        assert config["experiment_name"] == name  # so that their runs are never mixed
    assert mini["lora"]["r"] == 16
    if experiment != "cost":  # the mini-lab's models are too small to time
        assert mini["student"]["path"] == "neo://mini-student"
        assert mini["data"]["label_noise"] == 0.3
    assert paper["student"]["path"] == "meta-llama/Llama-3.2-1B-Instruct"
    assert paper["teacher"]["path"] == "meta-llama/Llama-3.1-8B-Instruct"
    assert paper["data"]["path"] == "BAAI/Infinity-Instruct"
    assert paper["lora"]["lora_alpha"] == 2 * paper["lora"]["r"]
    assert paper["trainer"]["precision"] == "bf16-mixed"


def test_the_scale_of_the_paper_has_the_settings_of_its_released_code():
    config = compose("experiment=main", "scale=paper")
    assert config["optim"]["lr"] == 2e-4
    assert config["lora"]["r"] == 64
    assert config["loss"]["kd_ratio"] == 0.5
    assert config["data"]["max_length"] == 2048
    assert config["data"]["batch_size"] * config["trainer"]["accumulate_grad_batches"] == 8
    # 10,000 rows that are trained on, and a few more to hold out
    assert config["trainer"]["max_steps"] * 8 == 10_000
    kept = config["data"]["max_rows"] * (1 - config["data"]["val_share"])
    assert 10_150 < kept < 10_200  # a few may be of no use
    sft = compose("experiment=main", "scale=paper", "method=sft")
    assert sft["optim"]["lr"] == 2e-5
    assert sft["teacher"]["path"] is None


def test_what_is_typed_beats_the_pair_and_the_pair_beats_the_scale():
    given = ["experiment=main", "scale=paper", "pair=llama2_tinyllama"]
    config = compose(*given)
    assert config["teacher"]["path"] == "meta-llama/Llama-2-7b-chat-hf"
    assert config["student"]["path"] == "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    assert compose(*given, "student=mini")["student"]["path"] == "neo://mini-student"


def test_without_an_experiment_the_default_scale_changes_nothing():
    assert compose()["lora"]["r"] == 64
    assert compose("scale=mini") == compose()


def test_the_steps_of_the_data_sizes_follow_from_their_rows():
    for steps in (1250, 12_500, 125_000):
        config = compose("experiment=data_size", "scale=paper", f"trainer.max_steps={steps}")
        assert config["data"]["max_rows"] * (1 - config["data"]["val_share"]) > 8 * steps


@pytest.mark.parametrize("group", ["student", "teacher"])
def test_every_model_of_the_pairs_says_whose_choice_it_is(group):
    for file in sorted((conf_dir() / "pair").glob("*.yaml")):
        (choice,) = re.findall(rf"override /{group}: (\w+)", file.read_text())
        assert (conf_dir() / group / f"{choice}.yaml").is_file()
