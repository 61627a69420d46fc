"""The largest memory that a run, or a part of it, holds at a time."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


class PeakMemory:
    """The largest memory of one device during a run, in GiB, above what was held before it.

    On a GPU it is what the allocator gave out; on the CPU the resident memory of the process,
    whose high-water mark Linux can reset (elsewhere, and where it refuses, there is no number).
    """

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self.highest = 0  # bytes, before the mark was reset for a part
        self.before = self._reset()

    def gib(self) -> float | None:
        """The peak so far."""
        return self._above(self.before, max(self.highest, self._peak()))

    @contextmanager
    def part(self) -> Iterator[dict[str, float]]:
        """Measures a part of the run: its peak, above what was held before it, as `gib`."""
        self.highest = max(self.highest, self._peak())
        before, measured = self._reset(), dict[str, float]()
        yield measured
        if (peak := self._above(before, self._peak())) is not None:
            measured["gib"] = peak

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens within does not count."""
        self.highest = max(self.highest, self._peak())
        yield
        self._reset()

    def _above(self, before: int, peak: int) -> float | None:
        return max(0, peak - before) / 2**30 if peak or self.cuda else None

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else _status_bytes("VmHWM")

    def _reset(self) -> int:
        """Makes the peak what is held now, and returns that."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        with suppress(OSError):  # what an earlier run freed goes back first
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return 0
