"""Positions for tests, whose numbers can be added up by hand."""

from dataclasses import replace

import numpy as np

from neo.results.position_table import Positions


def example_positions(kd: float = 1.0) -> Positions:
    """Two rows: `42` with its end, right; and `49` where 42 is right, with the end behind it."""
    target = np.array([0.9, 0.8, 1.0, 0.9, 0.1, 0.5])
    return Positions(
        row=np.array([0, 0, 0, 1, 1, 1]),
        token=["4", "2", "<|im_end|>", "4", "9", "<|im_end|>"],
        label=["right", "right", "right", "right", "wrong", "behind"],
        teacher_target=target,
        teacher_entropy=np.array([0.3, 0.4, 0.0, 0.3, 0.2, 0.7]),
        teacher_top=["4", "2", "<|im_end|>", "4", "2", "5"],
        student_entropy=np.full(6, 0.5),
        ce=-np.log(np.array([0.5, 0.5, 1.0, 0.6, 0.2, 0.5])),
        kd=kd * np.array([1.0, 2.0, 0.0, 1.0, 4.0, 2.0]),
        agree=np.array([True, False, True, True, False, False]),
    )


def unlabelled() -> Positions:
    """The same where nobody says what is right."""
    return replace(example_positions(), label=["unknown"] * 6)
