import re
import subprocess
import sys
from collections import Counter

import pytest

from neo.data.mini import mini_rows, split_of
from neo.data.mini_tasks import KINDS
from neo.data.mini_wordings import NAMES


def texts(rows):
    return [tuple(message["content"] for message in row["messages"]) for row in rows]


def pair(a, b):
    return ("numbers", frozenset((int(a), int(b))))


def shown_operands(row):
    """The operands as a reader finds them in the questions, blind to wording and order."""
    kind = row["kind"]
    text = " ".join(m["content"] for m in row["messages"] if m["role"] == "user")
    found = [int(n) for n in re.findall(r"\d+", text)]
    if people := re.findall(rf"({'|'.join(NAMES)}) (\d+)", text):
        return {("table", frozenset(people))}
    if facts := re.findall(r"([A-Z]\w+) is \w+er than ([A-Z]\w+)", text):
        return {("order", frozenset(map(frozenset, facts)))}
    if letters := [s for s in re.findall(r"\b[A-Z]+\b", text) if len(s) > 2]:
        return {("letters", "".join(sorted(max(letters, key=len))))}
    if kind == "dates":
        ((day, month),) = re.findall(r"(\d+) ([A-Z]\w+)", text)
        found.remove(int(day))
        return {("date", day, month, *found)}
    if kind == "units":
        parts = re.findall(r"\d+", text)
        hours = int(parts[0]) if len(parts) == 2 and "min" in text else 0
        n = 60 * hours + int(parts[1]) if hours else int("".join(parts))
        return {("amount", re.search(r"min|c?m\b|k?g\b", text)[0].strip("ck"), n)}
    if kind == "two_step":
        c = found.pop(0) if text.startswith("Add") else found.pop()
        return {pair(*found), pair(max(found) if "larger" in text else min(found), c)}
    first = pair(*found[:2])
    return {first, pair(sum(found[:2]), found[2])} if len(found) == 3 else {first}


def working_and_result(row):
    """What a reader takes for the working of the last answer, and the rest of it."""
    answer = row["messages"][-1]["content"]
    working = re.match(r".*=|[A-Z]\w+ (?=\d)|", answer)[0]
    return working, answer[len(working) :]


@pytest.mark.parametrize("split", ["train", "val", "test", "teacher"])
def test_no_row_stands_twice_and_every_kind_comes_equally_often(split):
    rows = mini_rows(split, 604, seed=0)
    counts = Counter(row["kind"] for row in rows)
    assert len(rows) == len(set(texts(rows))) == 604
    assert set(counts) == set(KINDS)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_no_operands_of_a_held_out_row_stand_in_training_however_they_are_worded():
    train = set()
    for row in mini_rows("teacher", 6_000, seed=1) + mini_rows("train", 3_000, seed=0):
        train |= shown_operands(row)
    held_out = {}
    for split in ("val", "test"):
        held_out[split] = set().union(*map(shown_operands, mini_rows(split, 500, seed=0)))
        assert len(held_out[split]) > 250
        assert not held_out[split] & train
    assert not held_out["val"] & held_out["test"]


def test_a_tenth_of_all_operands_is_for_the_test_and_a_twentieth_for_validation():
    counts = Counter(split_of(("numbers", a, b)) for a in range(100) for b in range(a, 100))
    share = {split: count / counts.total() for split, count in counts.items()}
    assert share == pytest.approx({"test": 0.10, "val": 0.05, "train": 0.85}, abs=0.015)


@pytest.mark.parametrize(
    ("operands", "split"),
    [
        (("numbers", 4, 4), "test"),
        (("numbers", 6, 7), "test"),
        (("numbers", 7, 7), "val"),
        (("numbers", 12, 30), "train"),
    ],
)
def test_places_in_the_split_are_pinned_because_shipped_models_were_trained_by_it(operands, split):
    assert split_of(operands) == split


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_rows_depend_on_seed_and_split_and_on_nothing_else(split):
    rows = mini_rows(split, 50, seed=3)
    assert rows == mini_rows(split, 50, seed=3)
    assert set(texts(rows)) != set(texts(mini_rows(split, 50, seed=4)))


def test_another_process_draws_the_same_rows():
    call = "mini_rows('train', 40, seed=3, label_noise=0.5)"
    code = f"from neo.data.mini import mini_rows; print({call})"
    for hash_seed in ("1", "2"):
        out = subprocess.check_output(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, text=True
        )
        assert out.strip() == str(mini_rows("train", 40, seed=3, label_noise=0.5))


def test_the_teacher_learns_from_other_rows_than_the_student():
    train, teacher = (set(texts(mini_rows(split, 500, seed=0))) for split in ("train", "teacher"))
    assert len(train & teacher) < 50


@pytest.mark.parametrize("share", [0.0, 0.3, 0.333, 1.0])
def test_exactly_the_stated_share_of_training_answers_is_wrong_and_flagged(share):
    clean = mini_rows("train", 300, seed=5)
    noisy = mini_rows("train", 300, seed=5, label_noise=share)
    assert sum(row["noisy"] for row in noisy) == round(share * 300)
    for right, given in zip(clean, noisy, strict=True):
        assert right["kind"] == given["kind"]
        assert right["messages"][:-1] == given["messages"][:-1]
        assert (right["messages"][-1] != given["messages"][-1]) is given["noisy"]


def test_a_wrong_answer_ends_in_the_right_result_of_other_operands_of_the_kind():
    rows = mini_rows("train", 2_000, seed=0, label_noise=0.3)
    right = {}
    for row in mini_rows("train", 2_000, seed=0):
        right.setdefault(row["kind"], set()).add(working_and_result(row)[1])
    assert sum(row["noisy"] for row in rows) == 600
    assert all(working_and_result(row)[1] in right[row["kind"]] for row in rows if row["noisy"])


def test_a_wrong_answer_keeps_the_working_of_the_right_one():
    clean = mini_rows("train", 500, seed=0)
    noisy = mini_rows("train", 500, seed=0, label_noise=1.0)
    for right, wrong in zip(clean, noisy, strict=True):
        assert working_and_result(right)[0] == working_and_result(wrong)[0]


def test_the_wrong_rows_are_a_choice_of_the_seed():
    flags = [[r["noisy"] for r in mini_rows("train", 200, seed=s, label_noise=0.3)] for s in (0, 1)]
    assert flags[0] != flags[1]


def test_one_row_alone_can_be_wrong_too():
    (row,) = mini_rows("train", 1, seed=0, label_noise=1.0)
    (right,) = mini_rows("train", 1, seed=0)
    assert row["messages"][-1] != right["messages"][-1]


@pytest.mark.parametrize("split", ["val", "test", "teacher"])
def test_only_training_rows_are_ever_wrong(split):
    assert mini_rows(split, 100, seed=0, label_noise=0.9) == mini_rows(split, 100, seed=0)


def test_only_the_kinds_asked_for_are_drawn():
    rows = mini_rows("val", 30, seed=0, kinds=("dates", "logic"))
    assert Counter(row["kind"] for row in rows) == {"dates": 15, "logic": 15}


def test_every_row_alternates_user_and_assistant_and_ends_with_the_answer():
    for row in mini_rows("train", 300, seed=0, label_noise=0.3):
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "dev"}, "split is 'dev'; it must be one of train, val, test, teacher"),
        ({"num_rows": -1}, "num_rows is -1"),
        ({"label_noise": 1.5}, "label_noise is 1.5; it must be from 0 to 1"),
        ({"kinds": ("sums",)}, "kinds are ['sums']; they must be different ones of arithmetic,"),
        ({"kinds": ()}, "kinds are []"),
        ({"kinds": ("dates", "dates")}, "kinds are ['dates', 'dates']"),
    ],
)
def test_a_wrong_argument_is_named_with_what_would_be_legal(change, message):
    arguments = {"split": "train", "num_rows": 10, "seed": 0} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        mini_rows(**arguments)


def test_asking_for_more_rows_than_a_kind_has_is_refused(monkeypatch):
    monkeypatch.setattr("neo.data.mini.PATIENCE", 100)
    with pytest.raises(ValueError, match=r"hardly more than .* rows of kind arithmetic"):
        mini_rows("val", 100_000, seed=0, kinds=("arithmetic",))
