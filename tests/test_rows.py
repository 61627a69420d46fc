import re

import pytest

from neo.data.rows import REASONS, SCHEMAS, BadRow, detect_schema, to_conversation

EXCHANGE = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
IN_PARTS = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in EXCHANGE]


@pytest.mark.parametrize(
    ("schema", "row"),
    [
        ("messages", {"messages": EXCHANGE}),
        ("sharegpt", {"conversations": EXCHANGE}),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        ),
        (
            # what a table of mixed rows looks like: the other spelling's columns are null
            "sharegpt",
            {
                "conversations": [
                    {"from": "Human", "value": "q", "role": None, "content": None},
                    {"from": None, "value": None, "role": "assistant", "content": "a"},
                ]
            },
        ),
        ("alpaca", {"instruction": "q", "output": "a"}),
        ("alpaca", {"instruction": "q", "input": None, "output": "a", "history": None}),
        ("alpaca", {"instruction": "", "input": "q", "output": "a"}),
        ("prompt_completion", {"prompt": "q", "completion": "a"}),
        ("prompt_completion", {"prompt": "q", "response": "a"}),
        ("prompt_completion", {"prompt": EXCHANGE[:1], "completion": EXCHANGE[1:]}),
        ("messages", {"messages": IN_PARTS}),
    ],
)
def test_every_schema_says_the_same_conversation(schema, row):
    assert to_conversation(row, schema) == EXCHANGE


def test_alpaca_keeps_system_history_and_input_in_their_order():
    row = {
        "system": "s",
        "history": [["q1", "a1"]],
        "instruction": "q2",
        "input": "text",
        "output": "a2",
    }
    assert [tuple(m.values()) for m in to_conversation(row, "alpaca")] == [
        ("system", "s"),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2\n\ntext"),
        ("assistant", "a2"),
    ]


@pytest.mark.parametrize("name", ["gpt", "assistant", "model", "chatgpt", "bing", "bard"])
def test_every_name_of_the_assistant_is_known(name):
    turns = [{"from": "human", "value": "q"}, {"from": name, "value": "a"}]
    assert to_conversation({"conversations": turns}, "sharegpt")[1]["role"] == "assistant"


@pytest.mark.parametrize("name", ["tool", "function", "observation"])
def test_tools_are_neither_user_nor_assistant(name):
    turns = [*EXCHANGE, {"role": name, "content": "t"}]
    assert to_conversation({"messages": turns}, "messages")[2]["role"] == "tool"


@pytest.mark.parametrize(
    ("row", "schema", "reason", "detail"),
    [
        ({"messages": []}, "messages", "empty", "no messages"),
        ({"instruction": "q", "output": " \n"}, "alpaca", "empty", "every assistant turn"),
        ({"messages": EXCHANGE[:1]}, "messages", "no_assistant_turn", r"\['user'\]"),
        ({"messages": None}, "messages", "malformed", "list of messages, got None"),
        ({"messages": "text"}, "messages", "malformed", "list of messages, got 'text'"),
        ({"other": 1}, "messages", "malformed", "has no messages"),
        ({"messages": ["q"]}, "messages", "malformed", r"messages\[0\] must be an object"),
        ({"messages": [{"content": "q"}]}, "messages", "malformed", r"messages\[0\] has no role"),
        ({"messages": [{"role": "user"}]}, "messages", "malformed", "has no content"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "messages", "malformed", "'wizard'"),
        ({"messages": [{"role": 7, "content": ""}]}, "messages", "malformed", "unknown role 7"),
        (
            {"instruction": "q", "output": 42},
            "alpaca",
            "malformed",
            "output must be a text, got 42",
        ),
        ({"instruction": "q"}, "alpaca", "malformed", "has no output"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "alpaca", "malformed", "history"),
        ({"prompt": "q", "completion": None}, "prompt_completion", "malformed", "got None"),
        ({"prompt": "q\ud800", "completion": "a"}, "prompt_completion", "malformed", "half of a"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "messages",
            "malformed",
            "parts of type text",
        ),
        ([1, 2], "messages", "malformed", "object with named fields"),
    ],
)
def test_a_bad_row_says_its_reason_and_place(row, schema, reason, detail):
    with pytest.raises(BadRow) as caught:
        to_conversation(row, schema)
    assert caught.value.reason == reason
    assert reason in REASONS
    assert re.search(detail, caught.value.detail)


def test_an_empty_turn_among_others_is_kept():
    turns = [*EXCHANGE, {"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    assert to_conversation({"messages": turns}, "messages") == turns


@pytest.mark.parametrize(
    ("columns", "schema"),
    [
        (["messages", "prompt", "prompt_id"], "messages"),
        (["id", "conversations", "system"], "sharegpt"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["prompt", "completion"], "prompt_completion"),
        (["response", "prompt"], "prompt_completion"),
    ],
)
def test_columns_tell_the_schema(columns, schema):
    assert detect_schema(columns) == schema


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (["text"], "fit none"),
        (["messages", "conversations"], "fit messages and sharegpt"),
        (["prompt", "response", "instruction", "output"], "fit alpaca and prompt_completion"),
    ],
)
def test_columns_of_no_or_several_schemas_ask_for_data_schema(columns, problem):
    with pytest.raises(ValueError, match=rf"(?s){problem}.*set data.schema") as caught:
        detect_schema(columns)
    assert all(schema in str(caught.value) for schema in SCHEMAS)
