import pytest
from example_runs import example_run

from neo.results.choice import choose, notes, overrides
from neo.results.row_spec import RowSpec
from neo.results.table_spec import ChooseSpec

SPEC = ChooseSpec(by="lora", key="optim.lr", metric="val/kd")
GRID = [0.001, 0.003, 0.01]


def run(lora, lr, seed, kd, **changes):
    metrics = {} if kd is None else {"val/kd": kd}
    return example_run(
        **{
            "seed": seed,
            "run_id": f"{lora}-{lr}-{seed}",
            "choices": {"lora": lora},
            "config": {"optim": {"lr": lr}},
            "metrics": metrics,
            **changes,
        }
    )


def search(scores, lora="dora", grid=GRID):
    """Runs of seeds 0 and 1 around the given mean of every setting."""
    return [
        run(lora, lr, seed, mean + (0.01 if seed else -0.01))
        for lr, mean in zip(grid, scores, strict=True)
        for seed in (0, 1)
    ]


def test_the_best_mean_over_seeds_is_chosen_for_each_value():
    runs = search([0.5, 0.3, 0.4]) + search([0.3, 0.5, 0.4], "lora")
    # one lucky seed is no best mean
    runs[0].metrics["val/kd"] = 0.1
    runs[1].metrics["val/kd"] = 0.9
    found = choose(SPEC, [], runs)
    assert [(c.value, c.setting) for c in found] == [("dora", 0.003), ("lora", 0.001)]
    assert found[0].mean == pytest.approx(0.3)
    assert overrides(SPEC, found) == "lora=dora optim.lr=0.003\nlora=lora optim.lr=0.001\n"


def test_where_higher_is_better_the_highest_mean_is_chosen():
    spec = ChooseSpec(by="lora", key="optim.lr", metric="val/agreement")
    runs = [run("dora", lr, 0, None, metrics={"val/agreement": lr}) for lr in GRID]
    (choice,) = choose(spec, [], runs)
    assert choice.setting == 0.01
    assert "(1.0 %)" in notes(spec, [choice])[-1]


@pytest.mark.parametrize(
    ("scores", "edge"),
    [([0.3, 0.4, 0.5], "lowest"), ([0.5, 0.3, 0.4], ""), ([0.5, 0.4, 0.3], "highest")],
)
def test_a_choice_at_the_edge_of_its_grid_says_so(scores, edge):
    for order in (1, -1):  # of the records, which says nothing
        (choice,) = choose(SPEC, [], search(scores)[::order])
        assert choice.edge == edge
        line = notes(SPEC, [choice])[-1]
        assert (f"at the edge of its grid, the {edge} value" in line) == bool(edge)


@pytest.mark.parametrize("status", ["failed", "oom", "diverged"])
def test_a_point_with_a_run_that_failed_counts_as_the_worst_and_is_named(status):
    runs = search([0.5, 0.1, 0.4])
    runs[3] = run("dora", 0.003, 1, 0.0, status=status)
    (choice,) = choose(SPEC, [], runs)
    assert choice.setting == 0.01
    expected = f"counted as the worst: optim.lr=0.003, seed 1 ({status})"
    assert expected in notes(SPEC, [choice])[-1]


def test_a_run_without_the_metric_counts_as_the_worst():
    runs = search([0.5, 0.1, 0.4])
    runs[3] = run("dora", 0.003, 1, None)
    (choice,) = choose(SPEC, [], runs)
    assert choice.setting == 0.01
    assert choice.spoilt == ["optim.lr=0.003, seed 1 (no val/kd)"]


def test_a_value_whose_every_point_failed_is_refused():
    runs = [run("dora", lr, 0, None, status="diverged") for lr in GRID]
    with pytest.raises(ValueError, match=r"lora=dora has no optim\.lr whose runs all finished"):
        choose(SPEC, [], runs)


def test_a_missing_grid_point_is_refused_and_named():
    runs = search([0.5, 0.3, 0.4]) + search([0.5, 0.3], "lora", GRID[:2])
    with pytest.raises(ValueError, match=r"1 points.*\n  lora=lora optim\.lr=0\.01 seed=0,1$"):
        choose(SPEC, [], runs)


def test_a_missing_seed_is_refused_and_named():
    with pytest.raises(ValueError, match=r"\n  lora=dora optim\.lr=0\.001 seed=0$"):
        choose(SPEC, [], search([0.5, 0.3, 0.4])[1:])


def test_an_interrupted_run_is_missing():
    runs = search([0.5, 0.3, 0.4])
    runs[0] = run("dora", 0.001, 0, 0.1, status="interrupted")
    with pytest.raises(ValueError, match=r"lora=dora optim\.lr=0\.001 seed=0"):
        choose(SPEC, [], runs)


def test_what_a_row_of_the_table_asks_for_must_have_been_run():
    rows = [
        RowSpec(label=f"{lora} {lr}", where={"lora": [lora], "optim.lr": [lr]})
        for lora in ("lora", "dora")
        for lr in (*GRID, 0.03)
    ]
    with pytest.raises(ValueError, match="5 points lack runs") as refused:
        choose(SPEC, rows, search([0.5, 0.3, 0.4]))
    assert "lora=lora optim.lr=0.001 seed=0,1" in str(refused.value)
    assert "lora=dora optim.lr=0.03 seed=0,1" in str(refused.value)


def test_the_values_stand_in_the_order_of_the_rows():
    rows = [RowSpec(label=name, where={"lora": [name]}) for name in ("lora", "dora")]
    runs = search([0.5, 0.3, 0.4]) + search([0.5, 0.3, 0.4], "lora")
    assert [c.value for c in choose(SPEC, rows, runs)] == ["lora", "dora"]


def test_without_any_run_nothing_is_chosen():
    with pytest.raises(ValueError, match=r"there are no runs to choose optim\.lr from"):
        choose(SPEC, [], [])


def test_two_runs_of_one_seed_at_one_point_are_refused():
    runs = [*search([0.5, 0.3, 0.4]), run("dora", 0.001, 0, 0.2, run_id="again")]
    with pytest.raises(ValueError, match=r"dora-0\.001-0 and again are both seed 0 of lora=dora"):
        choose(SPEC, [], runs)


def test_a_run_that_lacks_the_setting_is_refused():
    runs = [*search([0.5, 0.3, 0.4]), run("dora", 0.001, 2, 0.2, config={})]
    with pytest.raises(ValueError, match=r"no plain config value 'optim\.lr'"):
        choose(SPEC, [], runs)


def test_of_equal_means_the_lower_setting_is_chosen():
    (choice,) = choose(SPEC, [], search([0.5, 0.3, 0.3])[::-1])
    assert choice.setting == 0.003
