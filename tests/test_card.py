"""The released model's card: what is composed is what the card says, and what its table awaits."""

from pathlib import Path

import pytest
from example_runs import example_run
from hydra import compose, initialize_config_dir
from lab import compose_raw

from neo.config import conf_dir, register, resolve, validate
from neo.results.table_spec import read_table_spec
from neo.results.tables import matches
from neo.training.command_line import REFUSED, explain

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "card"
# Of the model card, as percentages; MMLU of Neo was cut off.
SCORES = {
    "Instruct (card)": [36.09, 68.52, 39.45, 35.62, 45.91],
    "Neo (card)": [36.43, 67.51, 39.67, 36.48, None],
}
TASKS = ["arc_challenge", "arc_easy", "ceval-valid", "cmmlu", "mmlu"]


@pytest.fixture(scope="module")
def composed():
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        found = compose("config", ["experiment=card", "scale=paper"], return_hydra_config=True)
    choices = {k: v for k, v in found.hydra.runtime.choices.items() if v is not None}
    del found.hydra
    return choices, resolve(found)


def test_the_setting_is_that_of_the_card(composed):
    _, config = composed
    validate(config)
    assert config["student"]["path"] == "meta-llama/Llama-3.2-1B-Instruct"
    assert config["teacher"]["path"] == "meta-llama/Llama-3.1-8B-Instruct"
    assert (config["lora"]["r"], config["lora"]["lora_alpha"]) == (128, 256)
    assert (config["optim"]["lr"], config["loss"]["kd_ratio"]) == (1e-4, 0.9)
    assert config["method"]["name"] == "neo"
    trainer, data = config["trainer"], config["data"]
    assert trainer["max_epochs"] == 1
    a_step = trainer["accumulate_grad_batches"] * data["batch_size"]
    assert trainer["max_steps"] * a_step == 10_000
    assert data["path"] == "BAAI/Infinity-Instruct"


def test_the_table_has_the_scores_of_the_card_and_awaits_the_runs_of_the_command(composed):
    spec = read_table_spec(EXPERIMENT / "table.yaml")
    rows = {row.label: row for row in spec.rows}
    for label, scores in SCORES.items():
        assert rows[label].quoted == {
            f"eval/{task}/acc": None if score is None else pytest.approx(score / 100)
            for task, score in zip(TASKS, scores, strict=True)
        }
    choices, config = composed
    run = example_run(choices=choices, config=config)
    assert matches(run, rows["Neo (ours)"].where)
    other = example_run(choices=choices, config={**config, "loss": {"kd_ratio": 0.5}})
    assert not matches(other, rows["Neo (ours)"].where)
    base = example_run(choices={"method": "base"}, config={})
    assert matches(base, rows["Instruct (ours)"].where)
    assert not matches(base, rows["Neo (ours)"].where)


def test_the_readme_has_the_commands_of_the_table():
    readme = (EXPERIMENT / "README.md").read_text(encoding="utf-8")
    for command in read_table_spec(EXPERIMENT / "table.yaml").command.split("; "):
        assert f"\n{command.strip()}\n" in readme


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        ("card", "experiment=card: there is no scale=mini of it; add scale=paper"),
        ("crad", "In 'config': Could not find 'experiment/crad'"),
    ],
)
def test_without_the_papers_scale_it_is_refused_with_what_to_add(experiment, message):
    with pytest.raises(REFUSED) as refused:
        compose_raw(f"experiment={experiment}")
    assert explain(refused.value).startswith(message)
