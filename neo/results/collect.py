"""Records of runs taken into an experiment's folder, where they stay."""

from pathlib import Path

from neo.results.evaluations import without_evaluations
from neo.results.records import RunRecord, find_records, read_record, write_atomically
from neo.results.table_spec import TableSpec


def collect(runs: Path, results: Path, name: str, spec: TableSpec) -> list[Path]:
    """Copy new records and logs under `runs` into `results`; return the new records' paths.

    Raises:
        ValueError: A record belongs to another experiment, or its run came to its end and is
            recorded in `results` with other content, which is never changed. What an evaluation
            has added since is no other content, and taken over.
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
            target = results / f"{stem_of(record, spec)}.json"
            results.mkdir(parents=True, exist_ok=True)
            # The log goes first: a record without its log would never be completed.
            if log_of(path).is_file():
                write_atomically(log_of(target), log_of(path).read_bytes())
            write_atomically(target, path.read_bytes())
            recorded[record.run_id] = target
            new.append(target)
        elif known.read_bytes() == path.read_bytes():
            continue
        elif _same_run(record, read_record(known)):
            if record.evaluations:  # taken since, or taken anew
                write_atomically(known, path.read_bytes())
        elif read_record(known).status != "ok":  # what failed was run again
            if log_of(path).is_file():
                write_atomically(log_of(known), log_of(path).read_bytes())
            write_atomically(known, path.read_bytes())
        else:
            raise ValueError(
                f"{path}: run {record.run_id} is recorded with other content in {known}, and what "
                "is recorded is not edited; use out=DIR to render these runs elsewhere"
            )
    return new


def _same_run(left: RunRecord, right: RunRecord) -> bool:
    """Return whether the two differ in their evaluations at most."""
    plain = [without_evaluations(record) for record in (left, right)]
    return plain[0] == plain[1]


def stem_of(record: RunRecord, spec: TableSpec) -> str:
    """Return a file name that tells runs apart at a glance: what the rows choose by, seed, id."""
    groups = dict.fromkeys(key for row in spec.rows for key in row.where if key in record.choices)
    return "-".join([*(record.choices[group] for group in groups), str(record.seed), record.run_id])


def log_of(record_path: Path) -> Path:
    """Return where the `metrics.csv` that belongs to a record lies, or its copy."""
    if record_path.name == "record.json":
        return record_path.with_name("metrics.csv")
    return record_path.with_suffix(".csv")
