import io
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
from example_positions import example_positions, unlabelled

from neo.results.position_figures import draw_labels, draw_rows, labels_figure, rows_figure

STUDENTS = {"base": example_positions(), "after": example_positions(0.5)}


def bars(axes):
    return {
        round(bar.get_x() + bar.get_width() / 2): bar.get_height()
        for container in axes.containers
        for bar in container
    }


def test_a_row_shows_the_teachers_probability_the_students_and_what_it_would_have_said():
    figure = rows_figure(STUDENTS, {1: "What is 6 times 7?"})
    upper, lower = figure.axes
    assert bars(upper) == pytest.approx({0: 0.9, 1: 0.1, 2: 0.5})
    assert bars(lower) == pytest.approx({0: 0.3, 1: 0.2, 2: 0.7})
    for line in upper.lines:
        np.testing.assert_allclose(line.get_ydata(), [0.6, 0.2, 0.5])
    drawn = [line.get_ydata().tolist() for line in lower.lines]
    assert drawn == [[1.0, 4.0, 2.0], [0.5, 2.0, 1.0]]
    assert lower.get_ylim()[1] > 4
    assert [label.get_text() for label in lower.get_xticklabels()] == ["4", "9\n(2)", "■\n(5)"]
    assert upper.get_title() == "What is 6 times 7?"
    (legend,) = figure.legends
    told = [text.get_text() for text in legend.get_texts()]
    assert told[-3:] == ["teacher's entropy", "base", "after"]
    assert "wrong target" in told


def test_rows_stand_side_by_side_on_one_scale():
    figure = rows_figure(STUDENTS, {1: "one", 0: "other"})
    first, second = figure.axes[2:]
    assert [len(axes.get_xticks()) for axes in (first, second)] == [3, 3]
    assert first.get_ylim() == second.get_ylim()
    assert [axes.get_title() for axes in figure.axes[:2]] == ["one", "other"]


def test_the_distribution_is_in_shares_of_each_label():
    left, right = labels_figure(STUDENTS).axes
    shares = {
        container.get_label(): [bar.get_height() for bar in container]
        for container in left.containers
    }
    assert list(shares) == ["right (4)", "wrong (1)", "behind (1)"]
    assert all(sum(values) == pytest.approx(100) for values in shares.values())
    assert shares["wrong (1)"][1] == 100
    means = {c.get_label(): [bar.get_height() for bar in c] for c in right.containers}
    assert means == {"base": [1, 4, 2], "after": [0.5, 2, 1]}


def test_both_are_drawn_without_a_warning_whatever_the_tokens():
    tokens = ["$", " ", "\n", "<s>", "$\\frac{$", "_^"]  # none of them a formula
    odd = {"base": replace(unlabelled(), token=tokens, teacher_top=tokens[::-1])}
    titles = {0: "from $5 to $\\frac{6", 1: "two"}
    pictures = [draw_rows(odd, titles), draw_labels(odd), draw_labels(STUDENTS)]
    for picture in pictures:
        height, width, _ = matplotlib.image.imread(io.BytesIO(picture)).shape
        assert width == 1600
        assert height > 400


def test_rows_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="titles: no positions of row 7; there are rows 0 to 1"):
        draw_rows(STUDENTS, {1: "", 7: ""})
    for titles in ({}, dict.fromkeys(range(5), "")):
        with pytest.raises(ValueError, match="between 1 and 4 can be drawn"):
            draw_rows(STUDENTS, titles)
