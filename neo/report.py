"""Renders an experiment from its records, as tables, figures and a page: `neo.report NAME`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from neo.results.choice import Choice, choose, notes, overrides
from neo.results.collect import collect, log_of
from neo.results.draft import draft
from neo.results.latex import render_latex
from neo.results.markdown import render_markdown
from neo.results.pending import check_all_pending, check_waits
from neo.results.records import RunRecord, find_records, read_record, write_atomically
from neo.results.row_spec import RowSpec
from neo.results.table_csv import render_csv
from neo.results.table_spec import TableSpec, read_table_spec
from neo.results.tables import Table, build_table
from neo.results.terminal import print_table

USAGE = """\
python -m neo.report NAME [runs=DIR] [experiments=DIR] [out=DIR] [wandb=push]
python -m neo.report [NAME] check=true [experiments=DIR]

Renders table.md, table.csv, table.tex, figure.png (figure-X.png too, of each panel with a name) and
report.html of the experiment NAME from its records, by what experiments/NAME/table.yaml asks for,
and prints the table; with `choose` also chosen.txt. An experiment that has no table.yaml gets one
to start from, with a row for each setting of its runs.

  runs=DIR         first copy the records under DIR/NAME into experiments/NAME/results; one that
                   is recorded there is never changed, unless the run had failed and was run again
  experiments=DIR  where the experiments lie (default: experiments)
  out=DIR          with runs=: copy nothing; render into out, with each record under DIR/NAME in
                   the place of the recorded run of the same id
  check=true       write nothing; say where the rendered files are not what the records give, for
                   all experiments with a table.yaml where no NAME is given
  wandb=push       make the experiment's view in W&B, too; nothing is sent without it

Exit status: 0 rendered, or all is as it should be; 1 check=true found a difference; 2 something is
wrong with what was asked for or with a record.
"""
FOLDERS = ("runs", "experiments", "out")
TEXTS = ("table.md", "table.csv", "table.tex", "chosen.txt")
FIGURE = "figure.png"
PAGE = "report.html"
SHOWN = 60  # characters of a line that differs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 1 where a check failed, 2 after a mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0 if arguments else 2
    try:
        names, folders, flags = _parse(arguments)
        if "check" not in flags:
            table = report(names[0], **folders)
            if "wandb" in flags:
                from neo.results.dashboard import push

                print(push(names[0], table))
            return 0
        experiments = folders.get("experiments", Path("experiments"))
        names = names or _known(experiments)
        problems = [text for name in names for text in check(name, experiments=experiments)]
    except (ValueError, OSError) as error:
        print(f"neo.report: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"as the records give them: {', '.join(names)}")
    return 1 if problems else 0


@dataclass(frozen=True)
class Report:
    """What is to be rendered.

    Attributes:
        records: Of all runs, those that stand in no row, too.
        curves: Run id to a copy of the run's `metrics.csv`, for the runs that have one.
    """

    name: str
    table: Table
    records: list[RunRecord]
    choices: list[Choice]
    curves: dict[str, Path]

    def texts(self) -> dict[str, bytes]:
        """Return the content of every file of text, by its name."""
        found = {
            "table.md": render_markdown(self.table, self.notes),
            "table.csv": render_csv(self.table),
            "table.tex": render_latex(self.table, self.name, self.notes),
        }
        if spec := self.table.spec.choose:
            found["chosen.txt"] = overrides(spec, self.choices)
        return {name: text.encode() for name, text in found.items()}

    @property
    def notes(self) -> list[str]:
        """Lines on what was chosen."""
        spec = self.table.spec.choose
        return notes(spec, self.choices) if spec else []

    def page(self) -> bytes:
        """Return report.html."""
        from neo.results.page import render_page  # for the same reason

        return render_page(self.table, self.records, self.curves, self.notes).encode()

    def figure(self) -> bytes | None:
        """Return the figure as PNG, or None where there is nothing to draw."""
        # Not above: a check draws nothing, and would wait for matplotlib longer than for the rest.
        from neo.results.figures import draw_figure

        return draw_figure(self.table, self.curves)

    def named_figures(self) -> dict[str, bytes]:
        """Return the panels that are files of their own, by the files' names."""
        from neo.results.figures import draw_named

        return draw_named(self.table, self.curves)


def report(
    name: str,
    *,
    experiments: Path = Path("experiments"),
    runs: Path | None = None,
    out: Path | None = None,
) -> Table:
    """Render the experiment `name` and return its table.

    Raises:
        ValueError: The experiment is not there, its `table.yaml` or a record is wrong, or a run
            is recorded already with other content, or the runs do not allow the choice that is
            asked for.
    """
    folder = experiments / name
    if out is not None and runs is None:
        raise ValueError("out= needs runs=, the folder whose records are to be rendered")
    known = [place for place in (folder, out) if place and (place / "table.yaml").is_file()]
    if runs is not None and not (runs / name).is_dir():
        raise ValueError(f"runs={runs}: there is no folder {runs / name}")
    sources = [folder] if runs is None else [folder, runs / name]
    if known:
        spec = read_table_spec(known[0] / "table.yaml")
    else:
        spec = _start(name, experiments, sources, folder if out is None else out)
    if runs is not None and out is None:
        collect(runs / name, folder / "results", name, spec)
    found = _read(name, spec, sources if out is not None else [folder])
    target = folder if out is None else out
    target.mkdir(parents=True, exist_ok=True)
    files = {
        **dict.fromkeys(TEXTS),
        **dict.fromkeys(path.name for path in target.glob("figure-*.png")),
        **found.texts(),
        FIGURE: found.figure(),
        **found.named_figures(),
        PAGE: found.page(),
    }
    for file, content in files.items():
        if content is None:
            (target / file).unlink(missing_ok=True)  # what it showed is no longer there
        else:
            write_atomically(target / file, content)
    print_table(found.table, found.choices)
    return found.table


def load(name: str, *, experiments: Path = Path("experiments")) -> Report:
    """Return what the committed records of the experiment `name` give, nothing written.

    Raises:
        ValueError: The experiment is not there, its `table.yaml` or a record is wrong, or there
            is no record and a row does not say that it waits for one.
    """
    folder = experiments / name
    if not (folder / "table.yaml").is_file():
        raise ValueError(_unknown(name, experiments))
    return _read(name, read_table_spec(folder / "table.yaml"), [folder])


def check(name: str, *, experiments: Path = Path("experiments")) -> list[str]:
    """Return a sentence for each file of the experiment that is not what its records give.

    Pixels depend on the fonts of a machine: of the figure only is asked whether it is there.

    Raises:
        ValueError: The experiment is not there, or its `table.yaml` or a record is wrong.
    """
    folder, found = experiments / name, load(name, experiments=experiments)
    expected = found.texts()
    problems = [_difference(folder / file, expected.get(file)) for file in TEXTS]
    figure = folder / FIGURE
    if figure.is_file() and not found.table.spec.figures:
        problems.append(f"{figure}: is there, and table.yaml asks for no figure")
    if not figure.is_file() and found.table.spec.figures and found.figure() is not None:
        problems.append(f"{figure}: is missing")
    return [problem for problem in problems if problem]


def _parse(arguments: list[str]) -> tuple[list[str], dict[str, Path], set[str]]:
    """Return the names, the folders by option, and which of check and wandb are asked for."""
    names = [argument for argument in arguments if "=" not in argument]
    folders: dict[str, Path] = {}
    flags: set[str] = set()
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            continue
        if (key, value) in (("check", "true"), ("wandb", "push")):
            flags.add(key)
        elif key in FOLDERS and value:
            folders[key] = Path(value)
        else:
            legal = f"{'=DIR, '.join(FOLDERS)}=DIR, check=true, wandb=push"
            raise ValueError(f"{argument!r}; legal: {legal}")
    if len(names) > 1 or not (names or "check" in flags):
        raise ValueError(f"one experiment's name is needed, got {len(names)}; see --help")
    if "check" in flags and ({"runs", "out"} & set(folders) or "wandb" in flags):
        raise ValueError(
            "check=true compares what lies in experiments; it takes no runs=, out= or wandb="
        )
    return names, folders, flags


def _known(experiments: Path) -> list[str]:
    """Return the names of the experiments that have a `table.yaml`."""
    return sorted(path.parent.name for path in experiments.glob("*/table.yaml"))


def _unknown(name: str, experiments: Path) -> str:
    known = _known(experiments)
    legal = f"there are: {', '.join(known)}" if known else "there is none"
    return f"no experiment {name!r} in {experiments} (a folder with table.yaml); {legal}"


def _start(name: str, experiments: Path, sources: list[Path], target: Path) -> TableSpec:
    """Write a `table.yaml` to start from into `target` and return what it says."""
    from neo.config import WHERE_IT_RAN  # Hydra with it, which no other report needs

    records = {run.run_id: run for _, run in _records(sources)}
    if not records:
        raise ValueError(
            f"{_unknown(name, experiments)}; with runs=DIR one is started from DIR/{name}"
        )
    text = draft(name, list(records.values()), WHERE_IT_RAN)
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / "table.yaml", text.encode())
    print(f"{target / 'table.yaml'}: written from {len(records)} records, to start from; edit it")
    return read_table_spec(target / "table.yaml")


def _records(sources: list[Path]) -> list[tuple[Path, RunRecord]]:
    return [(path, read_record(path)) for source in sources for path in find_records(source)]


def _read(name: str, spec: TableSpec, sources: list[Path]) -> Report:
    """Return what is to be rendered; of records of one run, that under the last source counts."""
    latest = {record.run_id: (path, record) for path, record in _records(sources)}
    records = [record for _, record in latest.values()]
    if not records:
        check_all_pending(spec)
    table = build_table(spec, records)
    if table.not_run:
        _check_waits(table.not_run)
    curves = {
        run_id: log for run_id, (path, _) in latest.items() if (log := log_of(path)).is_file()
    }
    choices = [] if spec.choose is None else choose(spec.choose, spec.rows, table.runs)
    return Report(name, table, records, choices, curves)


def _check_waits(rows: list[RowSpec]) -> None:
    """Raise ValueError where a row waits for a run that no config can make."""
    from neo.config import RunConfig, conf_dir  # Hydra with it, which few reports need

    folders = [folder for folder in conf_dir().iterdir() if folder.is_dir()]
    choices = {folder.name: {file.stem for file in folder.glob("*.yaml")} for folder in folders}
    choices["method"] |= {"base", "teacher"}  # what an evaluation records beside the runs
    check_waits(rows, choices, [field.name for field in fields(RunConfig)])


def _difference(path: Path, expected: bytes | None) -> str:
    """Return where the file is not what is expected, None for no file; empty where it is."""
    if expected is None:
        return f"{path}: is there, and table.yaml asks for none" if path.is_file() else ""
    if not path.is_file():
        return f"{path}: is missing"
    if path.read_bytes() == expected:
        return ""
    has = [*path.read_text("utf-8", "replace").splitlines(keepends=True), ""]
    gives = [*expected.decode().splitlines(keepends=True), ""]
    number = _first_difference(has, gives)
    left, right = has[number], gives[number]
    column = _first_difference(left, right)
    start = max(0, column - SHOWN // 2)
    return (
        f"{path}: line {number + 1} has {left[start : start + SHOWN]!r}, the records give "
        f"{right[start : start + SHOWN]!r}"
    )


def _first_difference(left: Sequence[str], right: Sequence[str]) -> int:
    """Return the first index at which the two differ, at the latest where the shorter ends."""
    shorter = min(len(left), len(right))
    return next((i for i in range(shorter) if left[i] != right[i]), shorter)


if __name__ == "__main__":
    sys.exit(main())
