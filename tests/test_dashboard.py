import json
import sys

import pytest
from example_runs import example_run
from wandb_files import nobody_logged_in

from neo.results.dashboard import compared, dashboard, push, summary_key, swept
from neo.results.table_spec import read_table_spec
from neo.results.tables import build_table

# wandb-workspaces uses what pydantic is going to drop
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")

SPEC = """
title: Ranks
rows:
  - {label: LoRA, where: {lora: lora}}
  - {label: DoRA, where: {lora: dora}}
  - {label: teacher, where: {method: sft}, reference: true}
columns:
  - {metric: eval/mini/exact_match}
  - {metric: val/kd}
  - {field: seconds}
  - {config: optim.lr}
"""


def run(lora, r, alpha, seed, **changes):
    fields = {
        "run_id": f"{lora}{r}{alpha}{seed}",
        "experiment_name": "ranks",
        "choices": {"method": "neo", "lora": lora},
        "config": {
            "lora": {"_target_": f"neo.models.variants.{lora}", "r": r, "lora_alpha": alpha},
            "optim": {"lr": 1e-4},
            "seed": seed,
            "logger": {"_target_": "neo.training.loggers.Wandb", "project": "p", "entity": None},
        },
        "metrics": {"eval/mini/exact_match": 0.5, "val/kd": 1.0, "val/ce": 2.0, "train/loss": 1.5},
        "seconds": 3.0,
        "peak_memory_gib": 0.5,
    }
    return example_run(seed=seed, **(fields | changes))


GRID = [
    run(lora, r, alpha, r + alpha)
    for lora in ("lora", "dora") for r in (8, 16) for alpha in (8, 32)
]  # fmt: skip


@pytest.fixture
def table(tmp_path):
    def build(runs=GRID, spec=SPEC):
        (tmp_path / "table.yaml").write_text(spec)
        return build_table(read_table_spec(tmp_path / "table.yaml"), runs)

    return build


@pytest.fixture
def spec(table):
    """The specification as it is sent, and its panels by section."""
    view = dashboard("ranks", table(), entity="me", project="p")
    section = json.loads(view._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))[
        "section"
    ]
    panels = {part["name"]: part["panels"] for part in section["panelBankConfig"]["sections"]}
    return section, panels


def test_the_library_reads_the_specification_as_what_was_written(table):
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.workspaces.internal import View, WorkspaceViewspec

    view = dashboard("ranks", table(), entity="me", project="p")
    model = view._to_model()
    sent = model.spec.model_dump_json(by_alias=True, exclude_none=True)
    read = WorkspaceViewspec.model_validate_json(sent)
    again = ws.Workspace._from_model(
        View(entity="me", project="p", display_name="ranks", name="nw-x-v", id="1", spec=read)
    )
    back = again._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    panels = lambda text: [  # noqa: E731
        (section["name"], [{**panel, "__id__": ""} for panel in section["panels"]])
        for section in json.loads(text)["section"]["panelBankConfig"]["sections"]
    ]
    assert panels(back) == panels(sent)
    assert json.loads(back)["section"]["runSets"] == json.loads(sent)["section"]["runSets"]
    assert again.runset_settings.filters == view.runset_settings.filters


def test_the_view_shows_the_runs_of_the_experiment_by_variant(spec):
    section, _ = spec
    (runs,) = section["runSets"]
    (kept,) = runs["filters"]["filters"]
    assert (kept["key"], kept["op"], kept["value"]) == (
        {"section": "run", "name": "group"}, "=", "ranks",
    )  # fmt: skip
    assert runs["grouping"] == [{"section": "config", "name": "choices.value.lora"}]
    shown = [key for key, pinned in runs["runFeed"]["columnPinned"].items() if pinned]
    assert shown == [
        "run:displayName", "summary:status", "summary:eval/mini/exact_match",
        "summary:val/kd.last", "summary:seconds",
    ]  # fmt: skip


def test_variants_stand_side_by_side_in_every_column_of_the_table(spec):
    bars = [panel["config"] for panel in spec[1]["Side by side"]]
    assert [bar["metrics"] for bar in bars] == [
        ["eval/mini/exact_match"], ["val/kd.last"], ["seconds"],
    ]  # fmt: skip
    assert {bar["groupBy"] for bar in bars} == {"choices.value.lora"}
    assert {(bar["groupAgg"], bar["groupArea"]) for bar in bars} == {("mean", "stddev")}


def test_learning_curves_are_drawn_over_the_steps_for_what_was_logged(spec):
    curves = [panel["config"] for panel in spec[1]["Learning curves"]]
    assert [curve["metrics"] for curve in curves] == [["train/loss"], ["val/kd"], ["val/ce"]]
    assert {curve["xAxis"] for curve in curves} == {"trainer/global_step"}
    assert {curve["groupBy"] for curve in curves} == {"choices.value.lora"}


def test_quality_stands_against_memory_and_time_with_the_front_on_the_good_side(table, spec):
    name = "Quality and cost (the line is the Pareto front)"
    plots = [panel["config"] for panel in spec[1][name]]
    assert [plot["xAxis"] for plot in plots] == ["summary:peak_memory_gib", "summary:seconds"]
    assert {plot["yAxis"] for plot in plots} == {"summary:eval/mini/exact_match"}
    assert all(plot["showMaxYAxisLine"] and "showMinYAxisLine" not in plot for plot in plots)
    lower = table(spec=SPEC.replace("  - {metric: eval/mini/exact_match}\n", ""))
    view = dashboard("ranks", lower, entity="me", project="p")
    (section,) = [section for section in view.sections if section.name == name]
    assert [(panel.running_ymin, panel.running_ymax) for panel in section.panels] == [
        (True, None), (True, None),
    ]  # fmt: skip


def test_rank_and_alpha_make_a_heat_map_and_all_that_varies_parallel_axes(spec):
    heat, parallel = [panel["config"] for panel in spec[1]["What the sweep varies"]]
    assert (heat["xAxis"], heat["yAxis"]) == ("config:lora.value.r", "config:lora.value.lora_alpha")
    assert heat["zAxis"] == "summary:eval/mini/exact_match"
    colours = [point["color"] for point in heat["customGradient"]]
    assert colours[-1] == "#1a9850"  # more is better: green at the upper end
    assert [column["accessor"] for column in parallel["columns"]] == [
        "config:lora.value.r", "config:lora.value.lora_alpha", "summary:eval/mini/exact_match",
    ]  # fmt: skip


def test_what_was_swept_is_what_differs_but_for_the_seed():
    assert swept(GRID) == ["lora.r", "lora.lora_alpha"]
    assert swept(GRID[:1]) == []


def test_rows_are_compared_by_what_tells_them_apart(table):
    assert compared(table()) == "choices.lora"
    by_rank = SPEC.replace("{lora: lora}", "{lora: lora, lora.r: 8}").replace(
        "{lora: dora}", "{lora: lora, lora.r: 16}"
    )
    assert compared(table(spec=by_rank)) == "lora.r"


def test_a_sweep_of_one_setting_has_a_view_without_a_heat_map(table):
    view = dashboard("ranks", table(GRID[:1]), entity="me", project="p")
    assert "What the sweep varies" not in [section.name for section in view.sections]


def test_a_record_and_the_summary_call_a_number_by_names_that_agree():
    assert summary_key("val/kd") == "val/kd.last"
    assert summary_key("val/agreement") == "val/agreement.last"
    assert summary_key("eval/mini/exact_match") == "eval/mini/exact_match"


# -- push --------------------------------------------------------------------------------------


@pytest.fixture
def logged_in(tmp_path, monkeypatch):
    """Somebody is logged in, and what would be sent is caught."""
    import wandb

    nobody_logged_in(tmp_path, monkeypatch)
    sent = []

    def upsert(view):
        sent.append(view)
        return {"upsertView": {"view": {"name": "nw-abc-v", "id": "1"}}}

    class Api:
        default_entity = "me"

    monkeypatch.setattr(wandb, "login", lambda prompt, verify: True)
    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setattr("wandb_workspaces.workspaces.internal.upsert_view2", upsert)
    address = "wandb_workspaces.workspaces.interface.get_app_url"
    monkeypatch.setattr(address, lambda api: "https://wandb.ai")
    return sent


def test_the_view_goes_to_where_the_runs_went(table, logged_in, capsys):
    assert push("ranks", table()) == "https://wandb.ai/me/p?nw=abc"
    (view,) = logged_in
    assert (view.entity, view.project, view.display_name) == ("me", "p", "ranks")
    assert push("ranks", table(), entity="us", project="q").startswith("https://wandb.ai/us/q?")


def test_what_wandb_refuses_is_the_users_message(table, logged_in, monkeypatch):
    def refuse(view):
        raise RuntimeError("permission\n denied")

    monkeypatch.setattr("wandb_workspaces.workspaces.internal.upsert_view2", refuse)
    with pytest.raises(ValueError, match="wandb=push: me/p: permission denied"):
        push("ranks", table())


def test_without_a_login_it_says_what_is_needed_and_asks_no_network(table, tmp_path, monkeypatch):
    nobody_logged_in(tmp_path, monkeypatch)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    with pytest.raises(
        ValueError, match=r"wandb login.*WANDB_API_KEY.*wandb sync runs/ranks"
    ) as said:
        push("ranks", table())
    assert "\n" not in str(said.value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ValueError, match="WANDB_MODE=offline"):
        push("ranks", table())


def test_runs_that_never_went_to_wandb_have_no_view(table, logged_in):
    elsewhere = [run("lora", 8, 8, 0, config={"logger": {"_target_": "x"}, "optim": {"lr": 1}})]
    with pytest.raises(ValueError, match="no run of ranks was logged there; use logger=wandb"):
        push("ranks", table(elsewhere))
    other = {**GRID[1].config, "logger": {**GRID[1].config["logger"], "project": "q"}}
    with pytest.raises(ValueError, match="more than one project: p, q; a view shows one"):
        push("ranks", table([GRID[0], run("lora", 8, 32, 1, config=other)]))
    assert logged_in == []


def test_a_missing_package_is_named(table, monkeypatch):
    monkeypatch.setattr("neo.results.dashboard.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb-workspaces: pip install 'llm-neo\[dashboards\]'"):
        push("ranks", table())


def test_reading_tables_needs_no_wandb():
    import subprocess

    code = "import sys, neo.results.dashboard; assert not {'wandb', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
