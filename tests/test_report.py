import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from example_runs import example_run

from neo.report import main, report
from neo.results.records import write_record

TABLE = """
title: Four methods
command: make demo
rows:
  - {label: SFT, where: {method: sft}}
  - {label: Neo, where: {method: neo}}
columns:
  - {metric: eval/mini/exact_match, label: exact match}
figures:
  - {kind: bars, x: eval/mini/exact_match}
  - {kind: curves, y: val/kd}
"""


TEXTS = {"table.md", "table.csv", "table.tex"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "experiments" / "mini"
    folder.mkdir(parents=True)
    (folder / "table.yaml").write_text(TABLE)
    for method, score in (("sft", 0.25), ("neo", 0.75)):
        for seed in range(2):
            run_dir = tmp_path / "runs" / "mini" / f"{method}{seed}"
            write_record(
                example_run(method, seed, metrics={"eval/mini/exact_match": score}), run_dir
            )
            (run_dir / "metrics.csv").write_text("step,val/kd\n1,0.5\n2,0.25\n")
    return tmp_path


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_records_and_logs_of_the_runs_are_collected_and_rendered(place):
    assert main(["mini", "runs=runs"]) == 0
    found = files(place / "experiments" / "mini")
    names = [f"results/{m}-{s}-{m}{s}" for m in ("sft", "neo") for s in range(2)]
    expected = {"table.yaml", "figure.png", "report.html", *TEXTS}
    assert set(found) == expected | {f"{n}.{end}" for n in names for end in ("json", "csv")}
    assert "| Neo | 2 | 75.0 |" in found["table.md"].decode()
    assert found["figure.png"].startswith(b"\x89PNG")


def test_rendering_again_changes_no_byte(place):
    main(["mini", "runs=runs"])
    first = files(place)
    assert main(["mini", "runs=runs"]) == 0
    assert main(["mini"]) == 0
    assert files(place) == first


def test_a_recorded_run_is_never_edited(place, capsys):
    main(["mini", "runs=runs"])
    kept = files(place / "experiments")
    write_record(
        example_run("neo", 1, metrics={"eval/mini/exact_match": 1.0}), place / "runs/mini/neo1"
    )
    assert main(["mini", "runs=runs"]) == 2
    assert "run neo1 is recorded with other content" in capsys.readouterr().err
    assert files(place / "experiments") == kept


def test_a_run_that_failed_and_was_run_again_takes_the_place_of_its_failure(place, capsys):
    failed = example_run("neo", 5, status="oom", error="too big")
    write_record(failed, place / "runs/mini/neo5")
    assert main(["mini", "runs=runs"]) == 0
    assert "oom (too big)" in capsys.readouterr().out
    write_record(
        example_run("neo", 5, metrics={"eval/mini/exact_match": 0.75}), place / "runs/mini/neo5"
    )
    (place / "runs/mini/neo5/metrics.csv").write_text("step,val/kd\n1,0.5\n")
    assert main(["mini", "runs=runs"]) == 0
    assert "oom" not in capsys.readouterr().out
    results = files(place / "experiments/mini/results")
    assert results["neo-5-neo5.csv"].startswith(b"step")
    assert len(results) == 10


def test_a_view_in_wandb_is_made_only_when_asked_for(place, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(
        "neo.results.dashboard.push", lambda name, table: made.append((name, table)) or "an address"
    )
    assert main(["mini", "runs=runs"]) == 0
    assert not made
    assert main(["mini", "runs=runs", "wandb=push"]) == 0
    ((name, table),) = made
    assert (name, table.spec.title) == ("mini", "Four methods")
    assert "an address" in capsys.readouterr().out


def test_out_touches_nothing_of_the_experiment(place):
    before = files(place / "experiments")
    assert main(["mini", "runs=runs", "out=mine"]) == 0
    assert files(place / "experiments") == before
    assert set(files(place / "mine")) == {"figure.png", "report.html", *TEXTS}


def test_out_shows_ones_own_runs_in_the_place_of_the_recorded_ones(place, capsys):
    main(["mini", "runs=runs"])
    write_record(
        example_run("neo", 1, metrics={"eval/mini/exact_match": 1.0}), place / "runs/mini/neo1"
    )
    for path in (place / "runs/mini").iterdir():
        if path.name != "neo1":
            shutil.rmtree(path)
    capsys.readouterr()
    main(["mini"])
    recorded = capsys.readouterr().out
    assert main(["mini", "runs=runs", "out=mine"]) == 0
    mine = capsys.readouterr().out
    assert mine != recorded
    assert mine.count("neo") == recorded.count("neo")


def test_the_printed_table_shows_every_row_and_what_is_not_in_it(place, capsys):
    write_record(example_run("kd", 0), place / "runs/mini/kd0")
    write_record(example_run("neo", 5, status="oom", error="too big"), place / "runs/mini/neo5")
    assert main(["mini", "runs=runs"]) == 0
    printed = capsys.readouterr().out
    assert "75.0" in printed
    assert "not finished: Neo, seed 5, run neo5: oom (too big)" in printed
    assert "n=2 (1 oom)" in " ".join(printed.replace("┃", " ").split())
    assert "matches no row: kd0" in printed
    assert "**" not in printed


def test_a_figure_that_nothing_is_left_for_is_removed(place):
    main(["mini", "runs=runs", "out=mine"])
    for path in (place / "runs").rglob("record.json"):
        write_record(example_run(path.parent.name[:-1], int(path.parent.name[-1])), path.parent)
        (path.parent / "metrics.csv").unlink()
    main(["mini", "runs=runs", "out=mine"])
    assert set(files(place / "mine")) == {"report.html", *TEXTS}


SEARCH = """
title: Which ratio
choose: {by: method, key: loss.kd_ratio, metric: val/kd}
rows:
  - {label: low, where: {method: neo, loss.kd_ratio: 0.5}}
  - {label: high, where: {method: neo, loss.kd_ratio: 0.9}}
columns:
  - {metric: val/kd}
"""


@pytest.fixture
def search(place):
    """The experiment `search`, with the ratio 0.9 better than 0.5."""
    folder = place / "experiments" / "search"
    folder.mkdir()
    (folder / "table.yaml").write_text(SEARCH)
    for ratio, kd in ((0.5, 0.4), (0.9, 0.3)):
        run = example_run(
            run_id=f"r{ratio}",
            experiment_name="search",
            config={"loss": {"kd_ratio": ratio}},
            metrics={"val/kd": kd},
        )
        write_record(run, place / "runs" / "search" / run.run_id)
    return place


def test_a_choice_is_written_as_overrides_and_stands_in_the_table_and_on_the_terminal(
    search, capsys
):
    assert main(["search", "runs=runs", "out=mine"]) == 0
    found = files(search / "mine")
    assert found["chosen.txt"] == b"method=neo loss.kd_ratio=0.9\n"
    line = "method=neo: loss.kd_ratio=0.9 (0.3000 nats/token); at the edge of its grid"
    assert line in found["table.md"].decode()
    assert line in capsys.readouterr().out


def test_a_choice_with_a_gap_ends_with_status_2_and_leaves_what_was_chosen_before(search, capsys):
    main(["search", "runs=runs", "out=mine"])
    before = files(search / "mine")
    shutil.rmtree(search / "runs/search/r0.5")
    assert main(["search", "runs=runs", "out=mine"]) == 2
    error = capsys.readouterr().err
    assert "1 points lack runs:\n  method=neo loss.kd_ratio=0.5 seed=0" in error
    assert files(search / "mine") == before


def test_the_comparison_with_a_baseline_is_printed(place, capsys):
    table = TABLE.replace("label: exact match}", "label: exact match, compare: true}")
    (place / "experiments/mini/table.yaml").write_text(f"{table}baseline: SFT\n")
    for seed in range(2):
        run = example_run("neo", seed, metrics={"eval/mini/exact_match": 0.7 + 0.1 * seed})
        write_record(run, place / "runs/mini" / run.run_id)
    assert main(["mini", "runs=runs", "out=mine"]) == 0
    printed = capsys.readouterr().out
    assert "Against SFT" in printed
    assert "+50.0 [-13.5, +113.5]" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["mini2"],
            "no experiment 'mini2' in experiments (a folder with table.yaml); there are: mini",
        ),
        (["mini", "experiments=nowhere"], "there is none"),
        (
            ["mini", "run=runs"],
            "'run=runs'; legal: runs=DIR, experiments=DIR, out=DIR, check=true, wandb=push",
        ),
        (["mini", "check=yes"], "'check=yes'; legal: "),
        (["mini", "wandb=true"], "'wandb=true'; legal: "),
        (["mini", "check=true", "wandb=push"], "it takes no runs=, out= or wandb="),
        (["mini", "check=true", "runs=runs"], "it takes no runs=, out="),
        (["mini2", "check=true"], "no experiment 'mini2' in experiments"),
        (["mini2"], "with runs=DIR one is started from DIR/mini2"),
        (["mini", "runs="], "legal: runs=DIR"),
        (["mini", "other"], "one experiment's name is needed, got 2"),
        (["runs=runs"], "one experiment's name is needed, got 0"),
        (["mini", "runs=elsewhere"], "there is no folder elsewhere/mini"),
        (["mini", "out=mine"], "out= needs runs="),
    ],
)
def test_a_mistake_ends_with_status_2_and_says_what_is_legal(place, capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_broken_record_is_named(place, capsys):
    (place / "runs/mini/neo0/record.json").write_text("{}")
    assert main(["mini", "runs=runs"]) == 2
    assert "runs/mini/neo0/record.json: key 'schema_version' is missing" in capsys.readouterr().err


def test_a_record_of_another_experiment_is_refused(place):
    write_record(example_run("neo", 0, experiment_name="other"), place / "runs/mini/neo0")
    with pytest.raises(ValueError, match="belongs to experiment 'other', not 'mini'"):
        report("mini", runs=place / "runs")


def test_help_is_printed_with_status_0_and_without_arguments_with_2(capsys):
    assert main(["--help"]) == 0
    assert main([]) == 2
    assert capsys.readouterr().out.count("experiments=DIR") >= 2


CHECK = ["mini", "check=true"]


@pytest.fixture
def rendered(place, capsys):
    """The folder of the experiment `mini`, rendered."""
    main(["mini", "runs=runs"])
    capsys.readouterr()
    return place / "experiments/mini"


def test_a_check_of_what_was_rendered_finds_nothing_and_writes_nothing(rendered, capsys):
    before = files(rendered)
    assert main(CHECK) == 0
    assert main(["check=true"]) == 0
    assert files(rendered) == before
    assert capsys.readouterr().out == "as the records give them: mini\n" * 2


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_a_check_names_the_file_and_the_first_line_that_differs(rendered, capsys, name):
    lines = (rendered / name).read_text().splitlines(keepends=True)
    changed = lines[0].rstrip()[:-1] + "X\n"
    (rendered / name).write_text("".join([changed, *lines[1:]]))
    before = files(rendered)
    assert main(CHECK) == 1
    (problem,) = capsys.readouterr().err.splitlines()
    assert problem.startswith(f"experiments/mini/{name}: line 1 has ")
    assert changed.rstrip()[-10:] in problem
    assert lines[0].rstrip()[-10:] in problem
    assert files(rendered) == before


def test_a_check_shows_the_place_of_a_long_line_at_which_it_differs(rendered, capsys):
    text = (rendered / "table.md").read_text()
    (rendered / "table.md").write_text(text.replace("was not measured", "was NOT measured"))
    assert main(CHECK) == 1
    problem = capsys.readouterr().err
    assert "was NOT measured" in problem
    assert "the records give" in problem
    assert "was not measured" in problem
    assert len(problem) < 250


def test_a_check_sees_a_line_too_many_and_one_too_few(rendered, capsys):
    text = (rendered / "table.csv").read_text()
    (rendered / "table.csv").write_text(text + "more\n")
    assert main(CHECK) == 1
    assert "table.csv: line 4 has 'more\\n', the records give ''" in capsys.readouterr().err
    (rendered / "table.csv").write_text(text.splitlines(keepends=True)[0])
    assert main(CHECK) == 1
    assert "table.csv: line 2 has '', the records give ',SFT" in capsys.readouterr().err
    (rendered / "table.csv").write_text(text.rstrip())
    assert main(CHECK) == 1
    assert "table.csv: line 3 has " in capsys.readouterr().err


@pytest.mark.parametrize("name", [*sorted(TEXTS), "figure.png"])
def test_a_check_misses_a_file_that_is_not_there(rendered, capsys, name):
    (rendered / name).unlink()
    assert main(CHECK) == 1
    assert capsys.readouterr().err == f"experiments/mini/{name}: is missing\n"
    assert not (rendered / name).exists()


def test_a_check_misses_no_figure_that_has_nothing_to_show(rendered):
    table = (rendered / "table.yaml").read_text()
    start = table.index("figures:")
    (rendered / "table.yaml").write_text(table[:start] + "figures: [{kind: seeds, x: val/ce}]\n")
    (rendered / "figure.png").unlink()
    assert main(CHECK) == 0


def test_a_check_sees_what_is_there_and_not_asked_for(rendered, capsys):
    table = (rendered / "table.yaml").read_text()
    (rendered / "table.yaml").write_text(table[: table.index("figures:")])
    (rendered / "chosen.txt").write_text("method=neo\n")
    assert main(CHECK) == 1
    chosen, figure = capsys.readouterr().err.splitlines()
    assert "chosen.txt: is there, and table.yaml asks for none" in chosen
    assert "figure.png: is there" in figure
    main(["mini"])
    assert main(CHECK) == 0


def test_a_check_sees_a_record_that_was_added_or_changed(rendered):
    path = next((rendered / "results").glob("neo-1-*.json"))
    path.write_text(path.read_text().replace("0.75", "0.76"))
    assert main(CHECK) == 1


def test_a_check_without_a_name_is_one_of_every_experiment(search, capsys):
    for name in ("mini", "search"):
        main([name, "runs=runs"])
    assert main(["check=true"]) == 0
    (search / "experiments/mini/table.md").unlink()
    (search / "experiments/search/chosen.txt").write_text("method=neo loss.kd_ratio=0.5\n")
    capsys.readouterr()
    assert main(["check=true"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "mini/table.md: is missing" in first
    assert "search/chosen.txt: line 1" in second


def test_what_is_committed_is_what_its_records_give_and_a_check_needs_no_torch():
    code = (
        "import sys; from neo.report import main; status = main(['check=true']); "
        "print({'torch', 'lightning', 'matplotlib'} & set(sys.modules)); sys.exit(status)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("set()\n")


@pytest.fixture
def unspecified(place):
    """The runs of `mini`, and no table.yaml."""
    shutil.rmtree(place / "experiments")
    return place


def test_an_experiment_without_a_table_yaml_gets_one_and_is_rendered(unspecified, capsys):
    assert main(["mini", "runs=runs"]) == 0
    printed = capsys.readouterr().out
    assert "experiments/mini/table.yaml: written from 4 records" in printed
    folder = unspecified / "experiments/mini"
    assert "| neo | 2 | 75.0 |" in (folder / "table.md").read_text()
    assert len(list((folder / "results").glob("*.json"))) == 4
    assert main(CHECK) == 0


def test_with_out_the_started_table_yaml_lies_there_and_is_never_written_again(unspecified, capsys):
    assert main(["mini", "runs=runs", "out=mine"]) == 0
    assert not (unspecified / "experiments").exists()
    path = unspecified / "mine/table.yaml"
    path.write_text(path.read_text().replace("label: neo", "label: Ours"))
    kept = path.read_bytes()
    capsys.readouterr()
    assert main(["mini", "runs=runs", "out=mine"]) == 0
    printed = capsys.readouterr().out
    assert "written from" not in printed
    assert "Ours" in printed
    assert path.read_bytes() == kept


def test_a_table_yaml_that_is_there_is_not_started_again(place):
    before = (place / "experiments/mini/table.yaml").read_bytes()
    main(["mini", "runs=runs", "out=mine"])
    main(["mini", "runs=runs"])
    assert (place / "experiments/mini/table.yaml").read_bytes() == before
    assert not (place / "mine/table.yaml").exists()
