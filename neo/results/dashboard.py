"""An experiment's view in Weights & Biases, made from its table."""

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from neo.results.metrics import METRICS, quantity
from neo.results.records import RunRecord
from neo.results.summary import ABSENT, leaves, lookup, number_of
from neo.results.table_spec import ColumnSpec
from neo.results.tables import Table

STEP = "trainer/global_step"
CURVES = ("train/loss", "train/kd", "val/kd", "val/ce")
COSTS = ("peak_memory_gib", "seconds")
# Validation is where a run can have been better than it ended: W&B's summary holds both.
BEST = {
    name: {"lower": "min", "higher": "max"}[metric.better]
    for name, metric in METRICS.items()
    if name.startswith("val/") and metric.better is not None
}
# Keys that differ between runs without being what a sweep asks about.
NOT_SWEPT = ("seed", "run_dir", "experiment_name", "logger", "hydra", "dry_run", "rerun")
GOOD, MIDDLE, BAD = "#1a9850", "#ffffbf", "#d73027"


def summary_key(name: str) -> str:
    """Where W&B's summary has the number that the record calls `name`."""
    return f"{name}.last" if name in BEST else name


def push(
    experiment: str, table: Table, *, entity: str | None = None, project: str | None = None
) -> str:
    """Makes the view in the user's project and returns its address; nothing else is sent.

    Args:
        experiment: The runs' group.
        table: Of the experiment; which runs, rows and columns the view is about.
        entity: The account or team; None is where the runs went, or that of who is logged in.
        project: None is where the runs went.

    Raises:
        ValueError: Nobody is logged in, a package is missing, no run went to W&B, or W&B refuses.
    """
    if find_spec("wandb_workspaces") is None:
        raise ValueError("wandb=push: needs wandb-workspaces: pip install 'llm-neo[dashboards]'")
    project = project or _where_logged(experiment, table, "project")
    entity = entity or _where_logged(experiment, table, "entity")
    if os.environ.get("WANDB_MODE", "online") not in ("online", "run"):
        raise ValueError(f"wandb=push: WANDB_MODE={os.environ['WANDB_MODE']} keeps W&B offline")
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise ValueError(
            "wandb=push: nobody is logged in to W&B. First `wandb login`, or set WANDB_API_KEY; "
            "then send the runs that were kept offline: "
            f"wandb sync runs/{experiment}/*/wandb/offline-run-*"
        )
    try:
        entity = entity or wandb.Api().default_entity
        view = dashboard(experiment, table, entity=entity, project=project)
        view.save()
        return str(view.url)
    except Exception as error:
        raise ValueError(
            f"wandb=push: {entity}/{project}: {' '.join(str(error).split())}"
        ) from error


def dashboard(experiment: str, table: Table, *, entity: str, project: str) -> Any:
    """The view, a `wandb_workspaces.workspaces.Workspace` that is not saved yet."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    by = compared(table)
    columns = [column for column in table.spec.columns if column.source != "config"]
    sections = {
        "Side by side": list(_bars(columns, by)),
        "Learning curves": list(_curves(table.runs, by)),
        "Quality and cost (the line is the Pareto front)": list(_pareto(table, columns)),
        "What the sweep varies": list(_sweep(table, columns)),
        "Differences between runs": [_comparer()],
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name=experiment,
        sections=[
            ws.Section(name=name, panels=panels, is_open=True)
            for name, panels in sections.items()
            if panels
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=expr.And(expr.Metric("Group") == experiment),
            groupby=[expr.Config(by)],
            pinned_columns=[
                "summary:status",
                *(f"summary:{summary_key(column.key)}" for column in columns),
            ],
        ),
    )


def compared(table: Table) -> str:
    """The config key that tells the table's rows apart, such as "choices.lora"."""
    rows = [row for row in table.spec.rows if not row.reference]
    for key in dict.fromkeys(key for row in rows for key in row.where):
        if len({repr(row.where.get(key)) for row in rows}) > 1:
            return f"choices.{key}" if any(key in run.choices for run in table.runs) else key
    return "choices.lora"


def swept(runs: Sequence[RunRecord]) -> list[str]:
    """The config keys that differ between runs, numbers first among them those of the branch."""
    keys = dict.fromkeys(key for run in runs for key, _ in leaves(run.config))
    found = [
        key
        for key in keys
        if key.split(".")[0] not in NOT_SWEPT
        and not key.split(".")[-1].startswith("_")
        and len({repr(lookup(run, key)) for run in runs}) > 1
    ]
    first = ("lora.r", "lora.lora_alpha", "optim.lr")
    return sorted(found, key=lambda key: (first.index(key) if key in first else 9, key))


def _bars(columns: Sequence[ColumnSpec], by: str) -> Iterator[Any]:
    """Mean and deviation of every column, a bar for each variant."""
    import wandb_workspaces.reports.v2 as wr

    for column in columns:
        yield wr.BarPlot(
            title=column.header,
            metrics=[summary_key(column.key)],
            groupby=wr.Config(by),
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
            max_runs_to_show=500,
            max_bars_to_show=50,
        )


def _curves(runs: Sequence[RunRecord], by: str) -> Iterator[Any]:
    """Mean and deviation of what was logged, a line for each variant."""
    import wandb_workspaces.reports.v2 as wr

    for name in CURVES:
        if any(name in run.metrics for run in runs):
            unit = METRICS[name].printed_unit
            yield wr.LinePlot(
                title=f"{name} ({unit})",
                x=STEP,
                y=[name],
                groupby=wr.Config(by),
                groupby_aggfunc="mean",
                groupby_rangefunc="stddev",
                title_x="optimizer step",
                title_y=unit,
                max_runs_to_show=500,
            )


def _pareto(table: Table, columns: Sequence[ColumnSpec]) -> Iterator[Any]:
    """Quality against memory and time; the line is the best for no more than that cost."""
    import wandb_workspaces.reports.v2 as wr

    quality = _quality(columns)
    for cost in COSTS:
        if quality and any(number_of(run, cost) is not None for run in table.runs):
            info, _ = quantity(cost)
            yield wr.ScatterPlot(
                title=f"{quality.label} against {info.description} ({info.unit})",
                x=wr.SummaryMetric(cost),
                y=wr.SummaryMetric(summary_key(quality.key)),
                running_ymin=quality.better == "lower" or None,
                running_ymax=quality.better == "higher" or None,
            )


def _sweep(table: Table, columns: Sequence[ColumnSpec]) -> Iterator[Any]:
    """Quality over what was varied: all keys side by side, and two of them as a heat map."""
    import wandb_workspaces.reports.v2 as wr

    quality, keys = _quality(columns), swept(table.runs)
    if not quality or not keys:
        return
    outcome = wr.SummaryMetric(summary_key(quality.key))
    colours = (BAD, MIDDLE, GOOD) if quality.better == "higher" else (GOOD, MIDDLE, BAD)
    gradient = [
        wr.GradientPoint(color=colour, offset=offset)
        for colour, offset in zip(colours, (0, 50, 100), strict=True)
    ]
    numeric = [key for key in keys if _is_numeric(table.runs, key)]
    if len(numeric) > 1:
        x, y = numeric[:2]
        yield wr.ScatterPlot(
            title=f"{quality.label} over {x} and {y}",
            x=wr.Config(x),
            y=wr.Config(y),
            z=outcome,
            gradient=gradient,
            log_x=_is_positive(table.runs, x) or None,
            log_y=_is_positive(table.runs, y) or None,
        )
    axes = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key)) for key in keys[:8]]
    last = wr.ParallelCoordinatesPlotColumn(metric=outcome, display_name=quality.label)
    yield wr.ParallelCoordinatesPlot(
        title=f"{quality.label} by what was varied", columns=[*axes, last], gradient=gradient
    )


def _comparer() -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.RunComparer(diff_only="split")


def _quality(columns: Sequence[ColumnSpec]) -> ColumnSpec | None:
    """The first column that says how good a run is, not what it costs."""
    good = (c for c in columns if c.better and c.key.startswith(("eval/", "val/")))
    return next(good, None)


def _where_logged(experiment: str, table: Table, key: str) -> Any:
    """The W&B project or entity that the runs went to, by their records."""
    loggers = [run.config.get("logger") or {} for run in table.runs]
    found = {node.get(key) for node in loggers if _is_wandb(node)}
    if not found:
        raise ValueError(f"wandb=push: no run of {experiment} was logged there; use logger=wandb")
    if len(found) > 1:
        raise ValueError(
            f"wandb=push: the runs of {experiment} went to more than one {key}: "
            f"{', '.join(sorted(map(str, found)))}; a view shows one"
        )
    return found.pop()


def _is_wandb(logger: dict[str, Any]) -> bool:
    return str(logger.get("_target_")).lower() == "neo.training.loggers.wandb"


def _is_numeric(runs: Sequence[RunRecord], key: str) -> bool:
    values = [value for run in runs if (value := lookup(run, key)) is not ABSENT]
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _is_positive(runs: Sequence[RunRecord], key: str) -> bool:
    return all(value is ABSENT or value > 0 for run in runs for value in [lookup(run, key)])
