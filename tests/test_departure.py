import pytest
from lab import tokenizer

from neo.data.departure import departure
from neo.data.mini_data import MiniData
from neo.data.prompt import IGNORE, PromptEncoder


def messages(answer, question="2 + 3?"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def encode(answer, question="2 + 3?"):
    return PromptEncoder(tokenizer(), 128).encode(messages(answer, question))


@pytest.mark.parametrize(
    ("given", "right", "prefix"),
    [("12+3=99", "12+3=15", "12+3="), ("7", "5", ""), ("15", "1", "1"), ("1", "15", "1")],
)
def test_it_is_the_first_target_that_differs(given, right, prefix):
    wrong = encode(given)
    at = departure(wrong, encode(right))
    shared = [t for t in wrong.targets[:at] if t != IGNORE]
    assert tokenizer().decode(shared) == prefix
    assert wrong.targets[at] != encode(right).targets[at]


def test_a_right_answer_departs_nowhere():
    assert departure(encode("5"), encode("5")) is None


def test_an_answer_that_was_cut_off_departs_nowhere_behind_its_end():
    short, whole = PromptEncoder(tokenizer(), 14).encode(messages("15")), encode("15")
    assert short.truncated
    assert departure(short, whole) is None
    assert departure(whole, short) is None


def test_another_question_is_refused():
    with pytest.raises(ValueError, match="right_rows: must be the rows in the same order"):
        departure(encode("5"), encode("5", "3 + 3?"))
    with pytest.raises(ValueError, match="right_rows: must be the rows in the same order"):
        departure(encode("4"), encode("5", "3 + 3?"))


def test_all_noisy_rows_of_the_mini_lab_depart_and_no_others():
    data = MiniData(num_rows=80)
    encoder = PromptEncoder(tokenizer(), 256)
    for row, right in zip(data.rows(), data.right_rows(), strict=True):
        at = departure(*(encoder.encode(r["messages"]) for r in (row, right)))
        assert (at is not None) == row["noisy"]
