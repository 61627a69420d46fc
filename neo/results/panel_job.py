"""One panel of one table: what it is drawn from, how much room it takes, and the drawing."""

import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from matplotlib.axes import Axes

from neo.results.curves import Curve, draw_curves, group_curves
from neo.results.heatmap_panel import cell_lines, draw_heatmap
from neo.results.key_cells import key_scales
from neo.results.keyed_runs import KeyedRuns, ends_of, keyed_runs, runs_without, shown_runs
from neo.results.looks import COLOURS, DASHES, HATCHES, axis_text, group_looks, write_notes
from neo.results.metrics import quantity
from neo.results.panel_spec import PanelSpec
from neo.results.panels import draw_bars, draw_scatter, draw_seeds, expand
from neo.results.parallel_panel import draw_parallel
from neo.results.pareto_panel import draw_pareto
from neo.results.records import RunRecord
from neo.results.scales import key_scale
from neo.results.summary import ABSENT, TableRow, lookup, summarize
from neo.results.sweep_panel import draw_sweep
from neo.results.tables import Table

HALF, WHOLE = 3.9, 8.0  # inches that the axes of a panel have, roughly
LINE = 0.2  # inches of a legend's line


@dataclass(frozen=True)
class PanelJob:
    """A panel to be drawn for one group of rows, or for all where it is drawn over keys.

    Attributes:
        logs: Run id to a copy of the run's `metrics.csv`, for the runs that have one.
    """

    table: Table
    panel: PanelSpec
    group: str
    logs: Mapping[str, Path]

    @property
    def has_content(self) -> bool:
        """Whether there is anything to show."""
        panel = self.panel
        if panel.kind == "curves":
            return any(self._curves[0].values())
        if panel.over_keys:
            return bool(self._keyed.finished)
        rows = self._own if panel.kind == "seeds" else self._own + self._references
        if panel.kind in ("scatter", "pareto"):
            return any(
                all(summarize(row.runs, name).n for name in (*panel.x, panel.y)) for row in rows
            )
        return any(summarize(r.runs, n).n for r in self._own for n in expand(panel.x, self._own))

    @property
    def is_wide(self) -> bool:
        """Whether the panel takes a whole line of the figure."""
        kind = self.panel.kind
        if kind == "sweep":
            return self._num_groups > 4 or self._num_across > 8
        if kind == "heatmap":
            return self._num_across > 5
        return kind in ("bars", "parallel") or (kind == "curves" and self._num_groups > 7)

    @property
    def height(self) -> float:
        """Inches; a line of seeds needs room for its label, and so do legends and values."""
        kind = self.panel.kind
        if kind == "seeds":
            return 1.4 + 0.29 * len(self._own)
        if kind == "pareto":
            return max(3.5, 1.4 + LINE * len(self._own + self._references))
        if kind == "heatmap":
            cell = 0.28 + 0.16 * cell_lines(self._keyed)
            return 1.7 + cell * max(len(key_scales(self._keyed)[1].labels), 2)
        if kind == "parallel":
            longest = max(len(scale.ticks()[1]) for scale in key_scales(self._keyed))
            return max(4.0, 1.4 + LINE * min(longest, 30))
        if kind == "sweep" or self.panel.by:
            return max(3.9, 1.6 + LINE * (self._num_groups + 2))
        return 3.9 if kind == "bars" else 3.5

    def draw(self, axes: Axes) -> None:
        """Draw the panel with its title, labels and notes."""
        panel = self.panel
        draw = {
            "bars": self._draw_bars,
            "curves": self._draw_curves,
            "scatter": self._draw_scatter,
            "seeds": self._draw_seeds,
            "pareto": self._draw_pareto,
            "sweep": self._draw_sweep,
            "parallel": self._draw_parallel,
            "heatmap": self._draw_heatmap,
        }[panel.kind]
        notes = draw(axes)
        title = panel.title or self._made_title
        title = f"{title}: {self.group}" if self.group else title
        # Some have their legend between title and axes.
        above = panel.kind in ("bars", "seeds", "pareto")
        above |= panel.kind == "sweep" and (bool(panel.by) or any("▲" in note for note in notes))
        above |= panel.kind == "parallel" and bool(self._keyed.failed)
        axes.set_title(
            textwrap.fill(title, 90 if self.is_wide else 50),
            loc="left",
            pad=24.0 if above else 14.0 if panel.kind == "parallel" else 8.0,
            weight="bold",
        )
        axes.spines[["top", "right"]].set_visible(False)
        write_notes(axes, notes, 125 if self.is_wide else 58)

    def _draw_bars(self, axes: Axes) -> list[str]:
        names = expand(self.panel.x, self._own)
        styles = {
            label: (colour, HATCHES[i // len(COLOURS) % len(HATCHES)])
            for i, (label, colour) in enumerate(self._row_colours.items())
        }
        draw_bars(axes, names, self._own, self._references, styles)
        unit = quantity(names[0])[0].printed_unit
        axes.set_ylabel(axis_text(_metric_label(names[0]), {}, unit))
        return []

    def _draw_curves(self, axes: Axes) -> list[str]:
        groups, notes = self._curves
        if self.panel.by:
            looks = {label: look[:2] for label, look in group_looks(list(groups)).items()}
        else:
            looks = {
                label: (colour, DASHES[i // len(COLOURS) % len(DASHES)])
                for i, (label, colour) in enumerate(self._row_colours.items())
            }
        notes = notes + draw_curves(
            axes,
            self.panel.y,
            self.panel.x[0],
            groups,
            looks,
            self._label(self.panel.by),
        )
        axes.set_ylabel(self._text(self.panel.y))
        return notes

    def _draw_scatter(self, axes: Axes) -> list[str]:
        x, y = self.panel.x[0], self.panel.y
        draw_scatter(axes, x, y, self._own + self._references, self._row_colours)
        axes.set(xlabel=self._text(x), ylabel=self._text(y))
        return []

    def _draw_seeds(self, axes: Axes) -> list[str]:
        draw_seeds(axes, self.panel.x[0], self._own, self.table.spec.baseline)
        axes.set_xlabel(self._text(self.panel.x[0]))
        return []

    def _draw_pareto(self, axes: Axes) -> list[str]:
        x, y = self.panel.x[0], self.panel.y
        axes.set(xlabel=self._text(x, better=True), ylabel=self._text(y, better=True))
        return draw_pareto(
            axes, x, y, self._own, self._references, self.height - 1.2, log=self.panel.log
        )

    def _draw_sweep(self, axes: Axes) -> list[str]:
        panel, info = self.panel, quantity(self.panel.y)[0]
        by = self._label(panel.by)
        notes = draw_sweep(axes, self._keyed, self._keys, info, self._inches, by)
        axes.set(xlabel=self._text(panel.x[0]), ylabel=self._text(panel.y))
        return notes + self._keyed.left_out

    def _draw_parallel(self, axes: Axes) -> list[str]:
        names = [self._label(name) for name in (*self.panel.x, self.panel.y)]
        info, text = quantity(self.panel.y)[0], self._text(self.panel.y)
        return draw_parallel(axes, self._keyed, names, info, text) + self._keyed.left_out

    def _draw_heatmap(self, axes: Axes) -> list[str]:
        panel, info = self.panel, quantity(self.panel.z)[0]
        text = self._text(panel.z)
        notes = draw_heatmap(axes, self._keyed, self._keys, info, self._inches, text)
        axes.set(xlabel=self._text(panel.x[0]), ylabel=self._text(panel.y))
        return notes + self._keyed.left_out

    @cached_property
    def _own(self) -> list[TableRow]:
        """The rows that compete in the group."""
        return [
            row
            for row in self.table.rows
            if not row.spec.reference and row.spec.group == self.group
        ]

    @cached_property
    def _references(self) -> list[TableRow]:
        """The reference rows that go with the group."""
        return [
            row
            for row in self.table.rows
            if row.spec.reference and row.spec.group in ("", self.group)
        ]

    @cached_property
    def _runs(self) -> list[RunRecord]:
        return shown_runs(self.table)

    @cached_property
    def _keys(self) -> list[str]:
        """The keys of a panel over keys, in the order in which it takes their values."""
        return [key for entry in ("x", "y", "by") for key in self.panel.keys.get(entry, [])]

    @cached_property
    def _keyed(self) -> KeyedRuns:
        return keyed_runs(self._runs, self._keys, self.panel.z or self.panel.y)

    @cached_property
    def _curves(self) -> tuple[dict[str, list[Curve]], list[str]]:
        """The curves of each group or row, and notes on the runs that have none."""
        name, x, by = self.panel.y, self.panel.x[0], self.panel.by
        if not by:
            runs = {row.spec.label: row.runs for row in self._own}
            return _read_all(runs, name, x, self.logs, [])
        known = [run for run in self._runs if lookup(run, by) is not ABSENT]
        finished = [run for run in known if run.status == "ok"]
        notes = [runs_without(n, by)] if (n := len(self._runs) - len(known)) else []
        if len(finished) < len(known):
            notes.append(ends_of([run for run in known if run.status != "ok"]))
        scale = key_scale([lookup(run, by) for run in known])
        found: dict[str, list[RunRecord]] = {label: [] for label in scale.labels}
        for run in finished:
            found[scale.labels[scale.index(lookup(run, by))]].append(run)
        return _read_all(found, name, x, self.logs, notes)

    @property
    def _num_across(self) -> int:
        return len(key_scales(self._keyed)[0].labels)

    @property
    def _num_groups(self) -> int:
        if not self.panel.by:
            return 1
        if self.panel.kind == "curves":
            return len(self._curves[0])
        return len(key_scales(self._keyed)[1].labels)

    @property
    def _inches(self) -> float:
        return WHOLE if self.is_wide else HALF

    @property
    def _labels(self) -> dict[str, str]:
        return {column.key: column.label for column in self.table.spec.columns}

    @property
    def _row_colours(self) -> dict[str, str]:
        """The colour per label, so that a label looks the same in every panel of rows."""
        labels = dict.fromkeys(r.spec.label for r in self.table.rows if not r.spec.reference)
        return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}

    def _label(self, name: str) -> str:
        return self._labels.get(name, name)

    def _text(self, name: str, *, better: bool = False) -> str:
        """Return the table's label of a number or key, with its unit and its better end."""
        try:
            info = quantity(name)[0]
        except ValueError:
            return self._label(name)
        end = f", {info.better} is better" if better else ""
        return axis_text(name, self._labels, info.printed_unit) + end

    @property
    def _made_title(self) -> str:
        panel = self.panel
        if panel.kind == "bars":
            parts = panel.x[0].split("/")
            return _metric_label(panel.x[0]) + (f" on {parts[1]}" if parts[0] == "eval" else "")
        if panel.kind == "heatmap":
            return (
                f"{self._label(panel.z)} over {self._label(panel.x[0])} and {self._label(panel.y)}"
            )
        if panel.kind == "parallel":
            return f"{self._label(panel.y)} over {', '.join(self._label(key) for key in panel.x)}"
        if panel.kind in ("sweep", "pareto"):
            return f"{self._label(panel.y)} against {self._label(panel.x[0])}"
        return self._label(panel.x[0] if panel.kind == "seeds" else panel.y)


def _read_all(
    groups: Mapping[str, list[RunRecord]],
    name: str,
    x: str,
    logs: Mapping[str, Path],
    notes: list[str],
) -> tuple[dict[str, list[Curve]], list[str]]:
    curves: dict[str, list[Curve]] = {}
    lacking: Counter[str] = Counter()
    for label, runs in groups.items():
        curves[label], without = group_curves(runs, name, x, logs)
        lacking.update(without)
    return curves, notes + [runs_without(number, what) for what, number in lacking.items()]


def _metric_label(name: str) -> str:
    parts = name.split("/")
    return parts[2].replace("_", " ") if parts[0] == "eval" else name
