"""Laws of every row schema, found in neo/data/rows.py: a new one is held to them unasked."""

import copy
import json
from collections.abc import Mapping

import pytest
from lab import tokenizer

from neo.data import rows
from neo.data.prompt import IGNORE, PromptEncoder
from neo.data.rows import SCHEMAS, BadRow, Schema, detect_schema, to_conversation, turns

ASKED, ANSWERED = "2 + 2 =", "4"
SAID = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]

each_schema = pytest.mark.parametrize("name", SCHEMAS)


def replaced(value, text, by):
    """The row with one of its texts changed, however deep it lies."""
    if isinstance(value, Mapping):
        return {key: replaced(child, text, by) for key, child in value.items()}
    if isinstance(value, list):
        return [replaced(child, text, by) for child in value]
    return by if value == text else value


def law_of_the_columns(name):
    """Its columns tell it from all others, and each is needed."""
    schema, example = SCHEMAS[name], SCHEMAS[name].example
    assert detect_schema([*example, "id", "source"]) == name
    for column in schema.columns:
        rest = {key: value for key, value in example.items() if key != column}
        assert not schema.fits(set(rest))
        with pytest.raises(BadRow, match=column) as caught:
            to_conversation(rest, name)
        assert caught.value.reason == "malformed"


def law_of_what_is_said(name):
    example = copy.deepcopy(SCHEMAS[name].example)
    assert to_conversation(example, name) == SAID
    assert example == SCHEMAS[name].example
    # rows lie in files, and other texts are not the example's
    row = json.loads(json.dumps(replaced(replaced(example, ASKED, "Größe?"), ANSWERED, "東京 🙂")))
    assert [m["content"] for m in to_conversation(row, name)] == ["Größe?", "東京 🙂"]


def law_of_bad_rows(name):
    """What is no text is refused as malformed and what has no answer as empty; nothing crashes."""
    example = SCHEMAS[name].example
    wrong = {
        "empty": [replaced(example, ANSWERED, by) for by in ("", " \n")],
        "malformed": [
            *(replaced(example, t, by) for t in (ASKED, ANSWERED) for by in (42, None, "\ud83d")),
            *({**example, column: by} for column in SCHEMAS[name].columns for by in (None, 7, [7])),
        ],
    }
    for reason, bad in wrong.items():
        for row in bad:
            with pytest.raises(BadRow) as caught:
                to_conversation(row, name)
            assert caught.value.reason == reason


def law_of_supervision(name):
    """The answer is what is trained on, and nothing of the question."""
    encoder = PromptEncoder(tokenizer(), 64, None)
    example = encoder.encode(to_conversation(SCHEMAS[name].example, name))
    supervised = tokenizer().decode([t for t in example.targets if t != IGNORE])
    assert ANSWERED in supervised
    assert "2" not in supervised


LAWS = [law_of_the_columns, law_of_what_is_said, law_of_bad_rows, law_of_supervision]


def name_of(law):
    return law.__name__.removeprefix("law_of_")


@each_schema
@pytest.mark.parametrize("law", LAWS, ids=name_of)
def test_a_schema_keeps_the_law_of(law, name):
    law(name)


def question_answer(**changed):
    """A schema of one's own, right but for what is changed."""
    return Schema(
        **{
            "columns": ("question", "answer"),
            "read": lambda row: turns(row, user="question", assistant="answer"),
            "example": {"question": ASKED, "answer": ANSWERED},
            **changed,
        }
    )


def raw(row):
    return [
        {"role": "user", "content": row.get("question")},
        {"role": "assistant", "content": row.get("answer")},
    ]


WRONG = {
    "columns of another": (
        law_of_the_columns,
        question_answer(
            columns=("prompt", "answer"),
            read=lambda row: turns(row, user="prompt", assistant="answer"),
            example={"prompt": ASKED, "response": "", "answer": ANSWERED},
        ),
    ),
    "a column that it does without": (law_of_the_columns, question_answer(read=raw)),
    "roles exchanged": (
        law_of_what_is_said,
        question_answer(read=lambda row: turns(row, assistant="question", user="answer")),
    ),
    "the example learnt by heart": (law_of_what_is_said, question_answer(read=lambda row: SAID)),
    "texts that are none": (law_of_bad_rows, question_answer(read=raw)),
    "the question trained on": (
        law_of_supervision,
        question_answer(read=lambda row: turns(row, user="answer", assistant="question")),
    ),
}


@pytest.mark.parametrize("law", LAWS, ids=name_of)
def test_a_right_schema_of_ones_own_is_found_and_keeps_every_law(law, monkeypatch):
    monkeypatch.setitem(rows.SCHEMAS, "question_answer", question_answer())
    law("question_answer")


@pytest.mark.parametrize(("law", "wrong"), WRONG.values(), ids=WRONG)
def test_every_law_sees_a_wrong_schema(law, wrong, monkeypatch):
    monkeypatch.setitem(rows.SCHEMAS, "wrong", wrong)
    # pytest's own where a row should have been refused, or what a row led to that should not
    with pytest.raises((AssertionError, pytest.fail.Exception, ValueError, AttributeError)):
        law("wrong")
