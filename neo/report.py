"""Renders an experiment's table and figure from its records: `python -m neo.report NAME`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from neo.results.cells import against_lines, cells
from neo.results.choice import Choice, choose, notes, overrides
from neo.results.figures import draw_figure
from neo.results.latex import render_latex
from neo.results.markdown import render_markdown
from neo.results.printing import Cell
from neo.results.records import RunRecord, find_records, read_record, write_atomically
from neo.results.table_csv import render_csv
from neo.results.table_spec import TableSpec, read_table_spec
from neo.results.tables import Table, build_table

USAGE = """\
python -m neo.report NAME [runs=DIR] [experiments=DIR] [out=DIR]

Renders table.md, table.csv and figure.png of the experiment NAME from its records, by what
experiments/NAME/table.yaml asks for, and prints the table; with `choose` also chosen.txt.

  runs=DIR         first copy the records under DIR/NAME into experiments/NAME/results;
                   one that is recorded there is never changed
  experiments=DIR  where the experiments lie (default: experiments)
  out=DIR          with runs=: copy nothing; render into out, with each record under DIR/NAME in
                   the place of the recorded run of the same id

Exit status: 0 rendered, 2 something is wrong with what was asked for or with a record.
"""
OPTIONS = ("runs", "experiments", "out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 after a mistake of the user's."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0 if arguments else 2
    try:
        name, options = _parse(arguments)
        report(name, **options)
    except (ValueError, OSError) as error:
        print(f"neo.report: {error}", file=sys.stderr)
        return 2
    return 0


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
    if not (folder / "table.yaml").is_file():
        known = sorted(path.parent.name for path in experiments.glob("*/table.yaml"))
        legal = f"there are: {', '.join(known)}" if known else "there is none"
        raise ValueError(
            f"no experiment {name!r} in {experiments} (a folder with table.yaml); {legal}"
        )
    if out is not None and runs is None:
        raise ValueError("out= needs runs=, the folder whose records are to be rendered")
    spec = read_table_spec(folder / "table.yaml")
    if runs is not None and not (runs / name).is_dir():
        raise ValueError(f"runs={runs}: there is no folder {runs / name}")
    if runs is not None and out is None:
        collect(runs / name, folder / "results", name, spec)
    sources = [folder] if runs is None or out is None else [folder, runs / name]
    found = [(path, read_record(path)) for source in sources for path in find_records(source)]
    latest = {record.run_id: (path, record) for path, record in found}
    table = build_table(spec, [record for _, record in latest.values()])
    curves = {run_id: log for run_id, (path, _) in latest.items() if (log := _log(path)).is_file()}
    choices = []
    if spec.choose is not None:
        choices = choose(spec.choose, spec.rows, table.runs)
    _write(name, table, choices, curves, folder if out is None else out)
    _print(table, choices)
    return table


def collect(runs: Path, results: Path, name: str, spec: TableSpec) -> list[Path]:
    """Copy new records and logs under `runs` into `results`; return the new records' paths.

    Raises:
        ValueError: A record belongs to another experiment, or its run is recorded in `results`
            with other content, which is never changed.
    """
    recorded = {read_record(path).run_id: path for path in sorted(results.glob("*.json"))}
    new = []
    for path in find_records(runs):
        record = read_record(path)
        if record.experiment_name != name:
            raise ValueError(
                f"{path}: belongs to experiment {record.experiment_name!r}, not {name!r}"
            )
        known = recorded.get(record.run_id)
        if known is None:
            target = results / f"{_stem(record, spec)}.json"
            results.mkdir(parents=True, exist_ok=True)
            # The log goes first: a record without its log would never be completed.
            if _log(path).is_file():
                write_atomically(_log(target), _log(path).read_bytes())
            write_atomically(target, path.read_bytes())
            recorded[record.run_id] = target
            new.append(target)
        elif known.read_bytes() != path.read_bytes():
            raise ValueError(
                f"{path}: run {record.run_id} is recorded with other content in {known}, and what "
                "is recorded is not edited; use out=DIR to render these runs elsewhere"
            )
    return new


def _parse(arguments: list[str]) -> tuple[str, dict[str, Path]]:
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) != 1:
        raise ValueError(f"one experiment's name is needed, got {len(names)}; see --help")
    options: dict[str, Path] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            continue
        if key not in OPTIONS or not value:
            raise ValueError(f"{argument!r}; legal: {'=DIR, '.join(OPTIONS)}=DIR")
        options[key] = Path(value)
    return names[0], options


def _stem(record: RunRecord, spec: TableSpec) -> str:
    """Return a file name that tells runs apart at a glance: what the rows choose by, seed, id."""
    groups = dict.fromkeys(key for row in spec.rows for key in row.where if key in record.choices)
    return "-".join([*(record.choices[group] for group in groups), str(record.seed), record.run_id])


def _log(record_path: Path) -> Path:
    """Return where the `metrics.csv` that belongs to a record lies, or its copy."""
    if record_path.name == "record.json":
        return record_path.with_name("metrics.csv")
    return record_path.with_suffix(".csv")


def _write(
    name: str, table: Table, choices: list[Choice], curves: dict[str, Path], folder: Path
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    spec = table.spec.choose
    chosen = notes(spec, choices) if spec else []
    if spec:
        write_atomically(folder / "chosen.txt", overrides(spec, choices).encode())
    write_atomically(folder / "table.md", render_markdown(table, chosen).encode())
    write_atomically(folder / "table.csv", render_csv(table).encode())
    write_atomically(folder / "table.tex", render_latex(table, name, chosen).encode())
    figure = draw_figure(table, curves)
    if figure is None:
        (folder / "figure.png").unlink(missing_ok=True)  # what it showed is no longer there
    else:
        write_atomically(folder / "figure.png", figure)


def _print(table: Table, choices: list[Choice]) -> None:
    """Prints a table a group, turned: a terminal has room for many lines and for few columns."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log file has no edge to wrap at
    shown = cells(table)
    for group in dict.fromkeys(row.spec.group for row in table.rows if not row.spec.reference):
        rows = [
            (row, line)
            for row, line in zip(table.rows, shown, strict=True)
            if row.spec.group == group or (row.spec.reference and not row.spec.group)
        ]
        title = (
            f"{table.spec.title} ({table.spec.group_label}: {group})" if group else table.spec.title
        )
        turned = RichTable(title=title, title_justify="left")
        turned.add_column("", no_wrap=True)
        for row, _ in rows:
            turned.add_column(f"{row.spec.label}, n={len(row.runs)}", justify="right")
        for number, column in enumerate(table.spec.columns):
            turned.add_row(column.header, *(_styled(line[number]) for _, line in rows))
        console.print(turned)
    if table.spec.baseline:
        head, body = against_lines(table)
        against = RichTable(title=f"Against {table.spec.baseline}", title_justify="left")
        for text in head:
            against.add_column(text, no_wrap=not text)
        for cells_of_row in body:
            against.add_row(*(_styled(cell) for cell in cells_of_row))
        console.print(against)
    for text in notes(table.spec.choose, choices) if table.spec.choose else []:
        console.print(text, markup=False)
    for label, run in table.failed:
        console.print(f"not finished: {label}, seed {run.seed}, {run.run_id}: {run.status}")
    for run in table.unmatched:
        console.print(f"matches no row: {run.run_id}, seed {run.seed}, {run.choices}", markup=False)


def _styled(cell: Cell) -> str:
    """Return the cell with rich's bold, and nothing in it read as markup."""
    text = escape(cell.text)
    return (f"[bold]{text}[/bold]" if cell.bold else text) + escape(cell.rest)


if __name__ == "__main__":
    sys.exit(main())
