"""How far a cache is: on a terminal a bar, else now and then a line."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)  # fmt: skip


class CacheProgress:
    """Rows done, supervised tokens per second, and time left; silent where it is not wanted.

    Args:
        num_rows: Of this process, at most.
        shown: Whether it says anything.
        every_s: Between two lines, where there is no terminal.
    """

    def __init__(self, num_rows: int, *, shown: bool, every_s: float = 15.0) -> None:
        self.num_rows, self.every_s = num_rows, every_s
        self.num_done = self.num_skipped = self.num_tokens = 0
        self.console = Console(file=sys.stderr, quiet=not shown)
        self.bar: Progress | None = None
        if shown and self.console.is_terminal:
            self.bar = Progress(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(),
                TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn(), TextColumn("left"),
                TimeRemainingColumn(), console=self.console, transient=True,
            )  # fmt: skip

    def __enter__(self) -> "CacheProgress":
        self.began = self.spoke = time.perf_counter()
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("rows", total=self.num_rows)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def skip(self, num_rows: int) -> None:
        """Counts rows that were done before."""
        self.num_skipped += num_rows
        self._show()

    def advance(self, num_rows: int, num_tokens: int) -> None:
        """Counts rows that are done now."""
        self.num_done += num_rows
        self.num_tokens += num_tokens
        self._show()

    @property
    def text(self) -> str:
        """What there is to say."""
        seconds = max(1e-9, time.perf_counter() - self.began)
        done = self.num_done + self.num_skipped
        said = f"{done:,}/{self.num_rows:,} rows {self.num_tokens / seconds:,.0f} tokens/s"
        if self.bar is not None or not self.num_done:
            return said
        left = seconds * (self.num_rows - done) / self.num_done
        return f"{said}, {left:,.0f} s left"

    def _show(self) -> None:
        now = time.perf_counter()
        if self.bar is not None:
            done = self.num_done + self.num_skipped
            self.bar.update(self.task, completed=done, description=self.text)
        elif now - self.spoke >= self.every_s:
            self.spoke = now
            self.console.print(self.text, highlight=False)
