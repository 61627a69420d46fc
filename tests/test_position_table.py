from dataclasses import replace

import numpy as np
import pytest
from example_positions import example_positions, unlabelled

from neo.results.position_table import render_positions


def test_the_table_has_the_means_of_each_label_and_of_all():
    lines = render_positions({"base": example_positions(), "after": example_positions(0.5)})
    head, _, *body = [[cell.strip() for cell in row.split("|")[1:-1]] for row in lines.splitlines()]
    assert head == [
        "target", "positions", "p(target), teacher", "missed by the label",
        "entropy, teacher (nats)", "p(target), base", "p(target), after", "kd, base (nats)",
        "kd, after (nats)",
    ]  # fmt: skip
    assert body == [
        ["right", "4", "0.900", "0.100", "0.250", "0.650", "0.650", "1.000", "0.500"],
        ["wrong", "1", "0.100", "0.900", "0.200", "0.200", "0.200", "4.000", "2.000"],
        ["behind", "1", "0.500", "0.500", "0.700", "0.500", "0.500", "2.000", "1.000"],
        ["all", "6", "0.700", "0.300", "0.317", "0.550", "0.550", "1.667", "0.833"],
    ]


def test_targets_of_which_nothing_is_known_are_called_so():
    lines = render_positions({"a": unlabelled()}).splitlines()
    names = [line.split("|")[1].strip() for line in lines]
    assert names[2:] == ["unknown", "all"]


def test_choosing_positions_keeps_what_belongs_together():
    wrong = example_positions().labelled("wrong", "behind")
    assert (wrong.token, wrong.teacher_top) == (("9", "<|im_end|>"), ("2", "5"))
    np.testing.assert_array_equal(wrong.row, [1, 1])
    np.testing.assert_allclose(wrong.student_target, [0.2, 0.5])
    assert wrong.of_row(0).token == ()


def test_students_that_were_asked_other_rows_are_not_compared():
    whole = example_positions()
    others = [whole.of_row(0), replace(whole, token=["5", *whole.token[1:]])]
    for other in others:
        with pytest.raises(ValueError, match=r"students\['b'\]: positions of other rows"):
            render_positions({"a": whole, "b": other})
    with pytest.raises(ValueError, match="students: name at least one"):
        render_positions({})
