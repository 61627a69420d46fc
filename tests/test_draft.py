import pytest
from example_runs import example_run

from neo.results.draft import draft
from neo.results.table_spec import read_table_spec
from neo.results.tables import build_table

WHERE_IT_RAN = ("run_dir", "logger", "trainer.devices")


def runs(*settings, seeds=(0, 1), metrics=None, first=0, **changes):
    """A run for each setting and seed; a setting is dotted paths and choices to values."""
    found = []
    for i, setting in enumerate(settings, first):
        for seed in seeds:
            config = {}
            for path, value in setting.items():
                *parents, last = path.split(".")
                node = config
                for parent in parents if parents else ():
                    node = node.setdefault(parent, {})
                if parents:
                    node[last] = value
            choices = {key: value for key, value in setting.items() if "." not in key}
            config |= {"seed": seed, "run_dir": f"r{i}{seed}"}
            found.append(
                example_run(
                    seed=seed,
                    run_id=f"run{i}{seed}",
                    choices={"method": "neo"} | choices,
                    overrides=[f"{key}={value}" for key, value in setting.items()],
                    config=config,
                    metrics=metrics or {"val/kd": 0.1},
                    **changes,
                )
            )
    return found


def table_of(tmp_path, records):
    """The table that the started table.yaml gives of these records."""
    (tmp_path / "table.yaml").write_text(draft("mine", records, WHERE_IT_RAN))
    return build_table(read_table_spec(tmp_path / "table.yaml"), records)


def rows(tmp_path, records):
    return {row.spec.label: row.spec.where for row in table_of(tmp_path, records).rows}


def test_a_row_is_a_setting_and_holds_its_seeds_and_no_others(tmp_path):
    settings = [{"lora": v, "lora.r": r} for v in ("lora", "dora") for r in (16, 8)]
    table = table_of(tmp_path, runs(*settings))
    assert [(row.spec.label, len(row.runs)) for row in table.rows] == [
        ("dora, r 8", 2),
        ("dora, r 16", 2),
        ("lora, r 8", 2),
        ("lora, r 16", 2),
    ]
    assert table.unmatched == []
    assert table.spec.title == "mine: by lora, lora.r"


def test_a_key_that_follows_from_another_is_left_out(tmp_path):
    settings = [
        {"lora": v, "lora.use_dora": v == "dora", "optim.lr": lr}
        for v, lr in (("lora", 0.1), ("dora", 0.2))
    ]
    assert rows(tmp_path, runs(*settings)) == {
        "dora": {"lora": ["dora"]},
        "lora": {"lora": ["lora"]},
    }


def test_of_two_keys_that_go_together_the_typed_one_names_the_row(tmp_path):
    records = runs({"lora.r": 8}, {"lora.r": 16})
    for run in records:
        run.config["lora"]["alpha"] = 2 * run.config["lora"]["r"]
    assert list(rows(tmp_path, records)) == ["r 8", "r 16"]


def test_a_choice_that_a_later_one_includes_is_left_out(tmp_path):
    settings = [
        {"method": m, "experiment": e} for m, e in (("sft", "a"), ("neo", "b"), ("neo", "c"))
    ]
    assert list(rows(tmp_path, runs(*settings))) == ["a", "b", "c"]


def test_neither_the_seed_nor_a_copy_of_it_nor_where_a_run_ran_makes_rows(tmp_path):
    records = runs({"lora.r": 8, "trainer.devices": 1, "logger": "csv"})
    for run in records:
        run.config["data"] = {"shuffle_seed": run.seed}
        run.config["trainer"]["devices"] = run.seed + 1
        run.config["logger"] = {"name": str(run.seed)}
        run.choices["logger"] = str(run.seed)
    assert rows(tmp_path, records) == {"neo": {"method": ["neo"]}}


def test_values_keep_their_type(tmp_path):
    values = [True, 1, "1e-3", "0.002", 0.001, None, "all", ["q", "v"]]
    found = rows(tmp_path, runs(*[{"lora.x": value} for value in values], seeds=(0,)))
    assert sorted(map(repr, found.values())) == sorted(repr({"lora.x": [v]}) for v in values)


def test_where_two_keys_end_alike_the_label_has_all_of_both(tmp_path):
    settings = [{"student.path": s, "teacher.path": t} for s in "ab" for t in "cd"]
    label = next(iter(rows(tmp_path, runs(*settings))))
    assert label == "student.path a, teacher.path c"


def test_a_key_that_some_settings_lack_is_in_the_rows_of_the_others(tmp_path):
    settings = [{"lora": "none"}, {"lora": "lora", "lora.r": 8}, {"lora": "lora", "lora.r": 16}]
    assert rows(tmp_path, runs(*settings)) == {
        "lora, r 8": {"lora": ["lora"], "lora.r": [8]},
        "lora, r 16": {"lora": ["lora"], "lora.r": [16]},
        "none": {"lora": ["none"]},
    }


def test_a_key_that_only_some_runs_know_makes_no_rows(tmp_path):
    records = runs({"lora.r": 8}, {"lora.r": 16})
    records[0].config["new"] = 1  # as a later version of the code writes it
    assert list(rows(tmp_path, records)) == ["r 8", "r 16"]


def test_runs_that_no_keys_can_tell_apart_are_refused_by_name():
    records = runs({"lora.r": 8}, {"lora.r": 16}, {"lora.alpha": 1})
    with pytest.raises(ValueError, match=r"runs run00 and|run20.*cannot be told apart by lora\.r"):
        draft("mine", records, WHERE_IT_RAN)


def test_a_failed_setting_has_a_row_too(tmp_path):
    records = [*runs({"lora.r": 8}), *runs({"lora.r": 512}, first=1, status="oom")]
    rows = table_of(tmp_path, records).rows
    assert [(row.spec.label, len(row.runs), len(row.failed)) for row in rows] == [
        ("r 8", 2, 0),
        ("r 512", 0, 2),
    ]


def test_columns_are_the_numbers_that_the_runs_have(tmp_path):
    metrics = {
        "val/kd": 0.1,
        "val/ce": 0.2,
        "eval/mini/exact_match": 0.5,
        "eval/mini/exact_match/dates": 0.5,
        "train/loss": 1.0,
    }
    records = runs({"lora.r": 8}, metrics=metrics, seconds=3.0)
    spec = table_of(tmp_path, records).spec
    assert [column.key for column in spec.columns] == [
        "val/kd",
        "val/ce",
        "eval/mini/exact_match",
        "seconds",
    ]
    assert [(panel.kind, panel.x, panel.y) for panel in spec.figures] == [
        ("curves", ["step"], "val/kd"),
        ("seeds", ["val/kd"], ""),
    ]


def test_where_nothing_was_measured_the_table_stands_with_dashes(tmp_path):
    records = [example_run(status="failed", error="x")]
    spec = table_of(tmp_path, records).spec
    assert [column.key for column in spec.columns] == ["val/kd"]
    assert spec.figures == []
