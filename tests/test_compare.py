"""A comparison: two stages, one look at the test rows, and what would make it unfair."""

import json
import math
from pathlib import Path

import pytest
from example_runs import example_run
from hydra.errors import HydraException
from sweepers import start

from neo.config import ConfigError
from neo.results.table_spec import read_table_spec
from neo.training.compare import Compare
from neo.training.compare_table import _columns
from neo.training.sweep import SweepFailed

KEYS = {
    "over": "lora",
    "choices": ["lora", "dora"],
    "baseline": "lora",
    "search": {"key": "optim.lr", "values": [1e-3, 1e-2, 1e-1], "seeds": [100, 101],
               "metric": "val/kd"},
    "seeds": [0, 1, 2],
}  # fmt: skip
SHARED = ("experiment_name=c", "trainer=cpu", "eval_split=test")
BEST = {False: 1e-2, True: 1e-3}  # by use_dora


def came(config):
    best = BEST[config["lora"].get("use_dora", False)]
    kd = abs(math.log10(config["optim"]["lr"] / best)) + 0.01 * (config["seed"] % 10)
    answered = {} if config["eval_split"] is None else {"eval/mini/exact_match": 0.5 - kd}
    return "ok", {"val/kd": kd, "val/ce": 1.0, **answered}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def compare(keys=(), *arguments, came=came):
    return start(Compare, KEYS | dict(keys), came, *SHARED, *arguments)


def searching(**changes):
    return {"search": KEYS["search"] | changes}


def of(sweeper, name):
    return [job.config for job in sweeper.ran if job.config["experiment_name"] == name]


def test_each_choice_is_run_at_its_own_best_rate_over_the_same_seeds():
    sweeper = compare()
    first, final = of(sweeper, "c_search"), of(sweeper, "c")
    assert len(first) == 2 * 3 * 2
    assert {config["seed"] for config in first} == {100, 101}
    points = [(c["lora"].get("use_dora", False), c["optim"]["lr"], c["seed"]) for c in final]
    assert points == [(dora, BEST[dora], seed) for dora in (False, True) for seed in (0, 1, 2)]
    assert Path("runs/c/chosen.txt").read_text().splitlines()[-2:] == [
        "lora=lora optim.lr=0.01", "lora=dora optim.lr=0.001"
    ]  # fmt: skip
    assert compare().ran == []  # all is recorded


def test_test_rows_are_answered_in_the_second_stage_alone_and_behind_the_first():
    ran = compare().ran
    assert [job.config["eval_split"] for job in ran] == 12 * [None] + 6 * ["test"]
    assert all(job.config["experiment_name"] == "c" for job in ran[12:])


def test_the_budget_is_the_same_for_all():
    configs = [job.config for job in compare().ran]
    for key in ("data", "trainer", "student", "teacher", "loss"):
        assert all(config[key] == configs[0][key] for config in configs)


def test_the_table_compares_with_the_baseline_and_says_the_budget_and_the_warnings():
    compare()
    spec = read_table_spec("runs/c/table.yaml")
    assert (spec.baseline, spec.interval) == ("lora", "bootstrap")
    assert [row.label for row in spec.rows] == ["lora", "dora"]
    text = Path("runs/c/table.md").read_text()
    assert "1,000 supervised tokens" in text
    assert "Test rows were answered by these runs alone" in text
    assert "## Against lora, seed by seed" in text
    assert "| dora | 3 |" in text
    edge = "lora=dora: optim.lr=0.001 (0.0050 nats/token); at the edge of its grid, the lowest"
    assert edge in text
    assert f"# * {edge}" in Path("runs/c/chosen.txt").read_text()


def test_a_rate_whose_run_failed_is_not_chosen_and_is_named():
    def some(config):
        if config["optim"]["lr"] == 1e-2 and config["seed"] == 101:
            return "diverged", {}
        return came(config)

    sweeper = compare(came=some)
    assert {c["optim"]["lr"] for c in of(sweeper, "c") if not c["lora"].get("use_dora")} <= {
        1e-3, 1e-1
    }  # fmt: skip
    assert "optim.lr=0.01, seed 101 (diverged)" in Path("runs/c/chosen.txt").read_text()


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_choice_whose_search_is_incomplete_answers_no_test_row(status):
    def some(config):
        return (status, {}) if config["lora"].get("use_dora") else came(config)

    keys = {"choices": ["lora", "dora", "rslora"]}
    with pytest.raises(SweepFailed, match=r"(?s)left out.*lora=dora: its search is inc") as failed:
        compare(keys, came=some)
    final = of(failed.value.sweeper, "c")
    assert len(final) == 6
    assert not any(config["lora"].get("use_dora") for config in final)


@pytest.mark.parametrize("status", ["interrupted", "failed", "oom"])
def test_a_rate_is_not_chosen_while_another_is_unknown_and_no_test_row_is_answered(status):
    def some(config):
        unlucky = config["optim"]["lr"] == 1e-2 and config["seed"] == 101
        return (status, {}) if unlucky and not config["lora"].get("use_dora") else came(config)

    with pytest.raises(
        SweepFailed, match=rf"(?s)1 runs of the.*lora, 0.01, seed 101: {status}"
    ) as no:
        compare(came=some)
    assert of(no.value.sweeper, "c") == []


def test_another_budget_behind_the_test_rows_is_refused():
    compare()
    with pytest.raises(ConfigError, match=r"answered already with another optim\.lr or budget"):
        compare({}, "trainer.max_steps=77")


def test_without_a_baseline_nothing_is_compared_and_no_test_row_answered():
    def some(config):
        return came(config) if config["lora"].get("use_dora") else ("oom", {})

    with pytest.raises(SweepFailed, match="nothing to compare") as failed:
        compare({"choices": ["dora", "lora"]}, came=some)
    assert of(failed.value.sweeper, "c") == []


def test_a_second_choice_behind_the_test_rows_is_refused():
    compare()
    better = [*KEYS["search"]["values"], 1e-4]
    BEST[True] = 1e-4
    try:
        for record in Path("runs/c_search").rglob("record.json"):
            record.unlink()
        with pytest.raises(ConfigError, match=r"lora=dora by run \w+, optim.lr=0\.001") as refused:
            compare(searching(values=better))
    finally:
        BEST[True] = 1e-3
    assert of(refused.value.sweeper, "c") == []
    assert "lora=dora optim.lr=0.001" in Path("runs/c/chosen.txt").read_text()
    compare({"seeds": [0, 1, 2, 3]})  # more seeds at the same rates are no second choice


def test_rows_without_a_test_split_are_compared_on_what_was_held_out():
    sweeper = start(Compare, KEYS, came, "experiment_name=c", "trainer=cpu")
    assert {config["eval_split"] for config in of(sweeper, "c")} == {None}
    text = Path("runs/c/table.md").read_text()
    assert "No test row was answered" in text
    assert "exact match" not in text


def test_any_group_can_be_compared():
    keys = {"over": "loss", "choices": ["forward_kl", "jsd"], "baseline": "jsd"}
    start(Compare, KEYS | keys, lambda c: came(c | {"lora": {}}), *SHARED[:2], "lora.r=4")


def test_halving_stops_hopeless_rates_by_the_first_seed():
    pytest.importorskip("optuna")

    def some(config):
        place = config["prune"]
        assert (place is not None) == (config["seed"] == 100)
        if place is not None:
            assert place["storage"] == "runs/c_search/optuna.journal"
            assert place["study"] == (
                "lora-dora" if config["lora"].get("use_dora") else "lora-lora"
            )
            if config["optim"]["lr"] == 1e-1:
                return "pruned", {"val/kd": 0.0}  # what it had is no result
        return came(config)

    keys = {"halving": {"factor": 2, "first": 10}}
    sweeper = compare(keys, came=some)
    assert len(of(sweeper, "c_search")) == 2 * (2 * 2 + 1)
    assert {config["optim"]["lr"] for config in of(sweeper, "c")} == set(BEST.values())
    assert "optim.lr=0.1, seed 100 (pruned)" in Path("runs/c/chosen.txt").read_text()
    assert compare(keys, came=some).ran == []


@pytest.mark.parametrize(
    ("keys", "arguments", "problem"),
    [
        ({"over": None}, (), "over=None: must be a group or key"),
        ({"over": "data"}, (), "over=data: belongs to the budget"),
        ({"over": "trainer.max_steps"}, (), "over=trainer.max_steps: belongs to the budget"),
        ({"choices": []}, (), r"choices=\[\]: must be two or more"),
        ({"choices": ["lora", "lora"]}, (), "choices=.*each once"),
        ({"choices": ["lora", "lorra"]}, (), "lorra"),
        ({"baseline": "pissa"}, (), "baseline='pissa': is none of the choices; they are"),
        ({"seeds": []}, (), r"seeds=\[\]: must be a list of integers"),
        ({"seeds": [0]}, (), r"seeds=\[0\]: two at least"),
        ({"seeds": [0, 100]}, (), "seeds: 100 are seeds of the search, too"),
        ({"search": {"key": "optim.lr"}}, (), "search=.*must have the keys key, values, seeds"),
        (searching(values=[]), (), r"search.values=\[\]: must be a list of numbers"),
        (searching(values=[1, "a"]), (), "search.values=.*: must be a list of numbers"),
        (searching(values=[1.0, 1.0]), (), "search.values=.*each once"),
        (searching(values=[0.0, 1.0]), (), r"optim\.lr"),
        (searching(seeds=[]), (), r"search.seeds=\[\]: must be a list"),
        (searching(metric="val/kdd"), (), "search.metric: unknown metric"),
        (searching(metric="eval/mini/exact_match"), (), "is not of the validation rows"),
        (searching(key="lora"), (), "search.key='lora': must be a key besides"),
        (searching(key="optim.lrr"), (), "lrr"),
        ({"halving": {"factor": 1, "first": 1}}, (), "halving.factor=1: must be an integer of"),
        ({"halving": {"factor": 2}}, (), "halving=.*have the keys factor, first"),
        ({"params": {"seed": "0,1"}}, (), "params: a comparison makes its own runs"),
        ({}, ("lora=pissa",), r"lora: is given by hydra\.sweeper\.choices"),
        ({}, ("optim.lr=1",), r"optim\.lr: is given by hydra\.sweeper\.search\.values"),
        ({}, ("seed=1",), "seed: is given by hydra.sweeper.seeds"),
        ({}, ("data.batch_size=2,4",), "data.batch_size: is one value for all runs"),
        ({}, ("data=jsonl", "data.path=x.jsonl"), "eval_split='test': only data=mini"),
        ({"over": "method", "choices": ["neo", "kd"], "baseline": "neo",
          "search": KEYS["search"] | {"key": "data.batch_size", "values": [2, 4]}}, (),
         r"data\.batch_size: is not the same for all choices"),
    ],
)  # fmt: skip
def test_what_is_wrong_or_unfair_is_refused_before_anything_runs(keys, arguments, problem):
    with pytest.raises((ConfigError, HydraException), match=problem) as refused:
        compare(keys, *arguments)
    assert refused.value.sweeper.ran == []
    assert not list(Path().rglob("record.json"))


def test_all_that_is_wrong_is_named_at_once():
    keys = {"baseline": "x", "seeds": [100], "over": "data"} | searching(values=[])
    with pytest.raises(ConfigError) as refused:
        compare(keys, "seed=3")
    assert len(refused.value.problems) == 6
    assert json.dumps(refused.value.problems).count("hydra.sweeper") == 6


def test_losses_are_not_compared_by_a_divergence_that_each_measures_in_its_own_units():
    runs = [example_run(metrics={"val/kd": 0.1, "val/ce": 0.2})]
    for over, compared in (("loss", False), ("loss.temperature", False), ("lora", True)):
        columns = {c["metric"]: c for c in _columns(over, "val/ce", runs) if "metric" in c}
        assert columns["val/kd"].get("compare", False) is compared
        assert columns["val/ce"]["compare"]
