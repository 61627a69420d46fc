"""The mini-lab's rows as the data of a run."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from neo.data.datamodule import Data
from neo.data.mini import SPLITS, mini_rows


@dataclass(frozen=True, kw_only=True)
class MiniData(Data):
    """Instruction tasks with exact answers, with validation and test rows of their own.

    Args:
        split: What to train on: `train`, or `teacher` for the larger sample of the teacher.
        num_rows: Rows to train on.
        label_noise: The share of training rows whose answer is wrong.
        rows_seed: Chooses the rows, so that runs with other seeds train on the same ones.
        num_val_rows: Validation rows, always right.
        num_test_rows: Test rows, always right.
        val_share: Must stay 0: validation has rows of its own.
    """

    split: str = "train"
    num_rows: int = 2000
    label_noise: float = 0.3
    rows_seed: int = 0
    num_val_rows: int = 400
    num_test_rows: int = 1000
    val_share: float = 0.0

    def problems(self) -> list[str]:
        """What is wrong with these values, each with what would be legal."""
        problems = super().problems()
        if self.split not in SPLITS:
            legal = ", ".join(SPLITS)
            problems.append(f"data.split={self.split!r}: must be one of {legal}")
        for name, least in (("num_rows", 1), ("num_val_rows", 0), ("num_test_rows", 1)):
            if getattr(self, name) < least:
                problems.append(f"data.{name}={getattr(self, name)}: must be at least {least}")
        if not 0 <= self.label_noise <= 1:
            problems.append(f"data.label_noise={self.label_noise}: must lie in [0, 1]")
        if self.rows_seed < 0:
            problems.append(f"data.rows_seed={self.rows_seed}: must be at least 0")
        if self.val_share:
            problems.append(
                f"data.val_share={self.val_share}: must be 0 here, because the mini-lab brings "
                "validation rows of its own (data.num_val_rows)"
            )
        return problems

    def rows(self) -> list[dict[str, Any]]:
        """The training rows."""
        return mini_rows(
            self.split, self.num_rows, seed=self.rows_seed, label_noise=self.label_noise
        )

    def right_rows(self) -> list[dict[str, Any]]:
        """The rows of `rows` in the same order, all of them with their right answers."""
        return mini_rows(self.split, self.num_rows, seed=self.rows_seed)

    def val_rows(self) -> list[dict[str, Any]] | None:
        """The validation rows, the same for every noise."""
        if not self.num_val_rows:
            return None
        return mini_rows("val", self.num_val_rows, seed=self.rows_seed)

    def identity(self) -> dict[str, str]:
        """The hash of the rows to train on and to validate on."""
        digest = hashlib.sha256()
        for rows in (self.rows(), self.val_rows() or []):
            digest.update(json.dumps(rows).encode())
        return {"hash": digest.hexdigest()[:16]}

    def test_rows(self) -> list[dict[str, Any]]:
        """The test rows, the same for every noise."""
        return mini_rows("test", self.num_test_rows, seed=self.rows_seed)
