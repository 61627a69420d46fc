"""What a run says on the terminal before and after it trains."""

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from neo.data.datamodule import DataModule
from neo.data.peek import peek
from neo.data.prompt import IGNORE
from neo.results.metrics import metric_info
from neo.results.records import RunRecord
from neo.training.device_plan import Plan
from neo.training.devices import num_processes
from neo.training.meet import Meeting
from neo.training.plan_table import compute_line, memory_line, short, traffic_line
from neo.training.preflight import limit_gib


def print_plan(
    console: Console,
    config: dict[str, Any],
    specs: dict[str, Any],
    folder: Path,
    meeting: Meeting,
    data: DataModule,
    plan: Plan | str,
) -> None:
    """Says what trains, what it takes, and where the outputs go.

    Args:
        console: Where to.
        config: Of the run.
        specs: Built from it.
        folder: Of the run.
        meeting: Of its models.
        data: Its rows.
        plan: Of its memory and FLOPs, or why there is none.
    """
    table = _table(f"{config['experiment_name']}: method={config['method']['name']}")
    whole, trained = meeting.num_parameters, meeting.num_trainable_parameters
    table.add_row("student", f"{config['student']['path']}  {whole:,} parameters")
    what = (
        f"{trained:,} parameters ({trained / whole:.1%}) in {len(meeting.trained_tensors)} tensors"
    )
    kinds = Counter(_layer(name) for name in meeting.trained_tensors)
    table.add_row("trained", f"{what}: {', '.join(sorted(kinds))}")
    teacher = config["teacher"].get("path")
    size = f"{teacher}  {meeting.num_teacher_parameters:,} parameters" if teacher else "none"
    if (cache := specs.get("cache")) is not None:
        size = cache.describe()
    table.add_row("teacher", size)
    if note := specs.get("cache_note"):
        table.add_row("note", escape(note))
    loss, optim = specs["loss"], specs["optim"]
    divergence = getattr(loss.divergence, "func", loss.divergence).__name__
    table.add_row(
        "loss",
        f"{1 - loss.kd_ratio:g} * ce + {loss.kd_ratio:g} * {divergence} at T={loss.temperature:g}",
    )
    table.add_row("data", _rows(config, data))
    table.add_row("steps", _steps(config, data))
    table.add_row(
        "optimizer", f"AdamW, lr {optim.lr:g}, {optim.schedule}, warm-up {optim.warmup_ratio:.0%}"
    )
    if isinstance(plan, str):
        table.add_row("memory", plan)
    else:
        table.add_row("memory", memory_line(plan))
        table.add_row("compute", compute_line(plan))
        if (traffic := traffic_line(plan)) is not None:
            table.add_row("traffic", traffic)
        limit = limit_gib(config["trainer"], plan.placement)
        if limit is not None and plan.gib > limit:
            table.add_row("note", f"that is more than the {short(limit)} GiB of the GPU here")
    for note in meeting.notes:
        table.add_row("note", escape(note))
    table.add_row("outputs", str(folder))
    console.print(table)


def print_result(console: Console, record: RunRecord, folder: Path) -> None:
    """Says how the run ended, its numbers with their units, and what lies where."""
    table = _table(f"{record.experiment_name}/{record.run_id}: {record.status}")
    if record.error:
        table.add_row("stopped by", escape(record.error))
    for name, value in sorted(record.metrics.items()):
        info = metric_info(name)
        table.add_row(name, f"{value * info.scale:,.{info.decimals}f} {info.printed_unit}".rstrip())
    table.add_row("supervised tokens", f"{record.num_tokens or 0:,}")
    rows = record.rows
    bad = ", ".join(f"{count} {reason}" for reason, count in rows.get("bad", {}).items()) or "none"
    table.add_row(
        "rows",
        f"{rows.get('read', 0):,} read, {rows.get('truncated', 0):,} truncated, unusable: {bad}",
    )
    table.add_row("time", f"{record.seconds or 0:,.1f} s")
    table.add_row("outputs", f"{folder}: {', '.join(sorted(p.name for p in folder.glob('[!.]*')))}")
    console.print(table)


def _table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left", box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def _steps(config: dict[str, Any], data: DataModule) -> str:
    """Optimizer steps and supervised tokens, estimated from a sample of the rows."""
    trainer, spec = config["trainer"], data.data
    accumulate = trainer["accumulate_grad_batches"]
    sample = peek(data, 4)
    tokens = sum(int((batch.targets != IGNORE).sum()) for batch in sample) / len(sample)
    rows_per_batch = sum(batch.num_rows for batch in sample) / len(sample)
    num = num_processes(trainer)
    micro = f"{spec.batch_size} x {accumulate} sequences of at most {spec.max_length} tokens"
    micro += f" on each of {num} devices" * (num > 1)
    per_step = tokens * accumulate * num
    steps, epochs = trainer["max_steps"], trainer["max_epochs"] or -1
    if epochs > 0 and data.num_rows is not None:
        by_epochs = epochs * data.num_rows / max(1.0, rows_per_batch) / accumulate / num
        if steps <= 0 or by_epochs < steps:
            return (
                f"about {by_epochs:,.0f} ({epochs} epoch{'s' * (epochs != 1)}) of {micro}, "
                f"about {by_epochs * per_step:,.0f} supervised tokens"
            )
    return f"{steps:,} of {micro}, about {steps * per_step:,.0f} supervised tokens"


def _layer(name: str) -> str:
    """The kind of layer a tensor belongs to: q_proj, embed_tokens, norm."""
    parts = [
        p for p in name.split(".") if p not in ("weight", "bias", "default", "lora_A", "lora_B")
    ]
    return parts[-1]


def _rows(config: dict[str, Any], data: DataModule) -> str:
    """Where the rows come from and how many there are."""
    source = config["data"].get("path") or "the mini-lab"
    if noise := config["data"].get("label_noise"):
        source += f" ({noise:.0%} of the answers wrong)"
    train = "a stream of rows" if data.num_rows is None else f"{data.num_rows:,} rows"
    return f"{source}: {train} ({data.schema}) to train on, {data.num_val_rows:,} to validate on"
