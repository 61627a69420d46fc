"""Rows of any instruction schema in `SCHEMAS`, turned into conversations.

A *row* is what a data set holds; a *conversation* is what everything after this file reads: a list
of messages, each with a role and a text.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]
Conversation = list[Message]

REASONS = ("empty", "no_assistant_turn", "nothing_supervised", "malformed", "template")

# Every name under which the four roles stand in public data sets.
ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}


class BadRow(ValueError):
    """A row that cannot be trained on, with one of `REASONS` and what is wrong with it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class Schema:
    """How the rows of a data set are laid out.

    Args:
        columns: All of these are there; they tell the schema.
        one_of: And one of these at least.
        optional: What is read besides where it is there.
        read: From a row to its messages. It need not check that there is an answer, and of a row
            that is laid out otherwise it raises a `BadRow`.
        example: A row that asks "2 + 2 =" and answers "4", which the tests read.
    """

    columns: tuple[str, ...]
    one_of: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    read: Callable[[Mapping[str, Any]], Conversation]
    example: Mapping[str, Any]

    def fits(self, names: set[str]) -> bool:
        """Whether columns of these names are of this schema."""
        return names.issuperset(self.columns) and (not self.one_of or bool(names & {*self.one_of}))

    def spelt(self) -> str:
        """The columns in words."""
        needed = ", ".join((*self.columns, *([" or ".join(self.one_of)] if self.one_of else [])))
        return f"{needed}; optional {', '.join(self.optional)}" if self.optional else needed


def detect_schema(columns: Collection[str]) -> str:
    """The one of `SCHEMAS` that these columns belong to.

    Raises:
        ValueError: No schema fits, or more than one does.

    Example:
        >>> detect_schema(["id", "conversations", "source"])
        'sharegpt'
    """
    names = set(columns)
    found = [name for name, schema in SCHEMAS.items() if schema.fits(names)]
    if len(found) == 1:
        return found[0]
    problem = f"fit {' and '.join(found)}" if found else "fit none of the schemas"
    known = ", ".join(f"{name} ({schema.spelt()})" for name, schema in SCHEMAS.items())
    raise ValueError(
        f"data.schema: the columns {sorted(names)} {problem}. A schema is known by its columns: "
        f"{known}. Rename the columns, or set data.schema to one of {', '.join(SCHEMAS)}"
    )


def to_conversation(row: Any, schema: str) -> Conversation:
    """The row's messages in their order, roles named system, user, assistant, tool.

    Raises:
        BadRow: For the reason "malformed", "empty" or "no_assistant_turn".

    Example:
        >>> to_conversation({"prompt": "2 + 2 =", "completion": "4"}, "prompt_completion")
        [{'role': 'user', 'content': '2 + 2 ='}, {'role': 'assistant', 'content': '4'}]
    """
    if not isinstance(row, Mapping):
        raise BadRow("malformed", f"a row is an object with named fields, got {_show(row)}")
    if schema not in SCHEMAS:
        raise ValueError(f"data.schema={schema!r}: must be one of {', '.join(SCHEMAS)}")
    conversation = SCHEMAS[schema].read(row)
    if not conversation:
        raise BadRow("empty", "the conversation has no messages")
    answers = [m["content"] for m in conversation if m["role"] == "assistant"]
    if not answers:
        raise BadRow("no_assistant_turn", f"its roles are {[m['role'] for m in conversation]}")
    if not any(answer.strip() for answer in answers):
        raise BadRow("empty", "every assistant turn is empty")
    return conversation


def turns(row: Mapping[str, Any], **columns: str) -> Conversation:
    """One message per role, in the order given, with the text of its column.

    Example:
        >>> turns({"q": "2 + 2 =", "a": "4"}, user="q", assistant="a")
        [{'role': 'user', 'content': '2 + 2 ='}, {'role': 'assistant', 'content': '4'}]
    """
    return [_message(role, _field(row, column), column) for role, column in columns.items()]


def _sharegpt(row: Mapping[str, Any]) -> Conversation:
    conversation = _messages(_field(row, "conversations"), "conversations")
    system = row.get("system")
    if system and not any(m["role"] == "system" for m in conversation):
        conversation.insert(0, _message("system", system, "system"))
    return conversation


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    conversation: Conversation = []
    if row.get("system"):
        conversation.append(_message("system", row["system"], "system"))
    history = row.get("history") or []
    if not _is_list(history):
        raise BadRow("malformed", f"history must be a list of pairs, got {_show(history)}")
    for turn, pair in enumerate(history):
        if not _is_list(pair) or len(pair) != 2:
            raise BadRow(
                "malformed", f"history[{turn}] must be [question, answer], got {_show(pair)}"
            )
        conversation.append(_message("user", pair[0], f"history[{turn}][0]"))
        conversation.append(_message("assistant", pair[1], f"history[{turn}][1]"))
    question = _text(_field(row, "instruction"), "instruction")
    # null and "" both mean that the instruction needs no input
    extra = "" if row.get("input") is None else _text(row["input"], "input")
    question = "\n\n".join(part for part in (question, extra) if part.strip())
    conversation.append({"role": "user", "content": question})
    conversation.append(_message("assistant", _field(row, "output"), "output"))
    return conversation


def _prompt_completion(row: Mapping[str, Any]) -> Conversation:
    answer_key = "response" if "response" in row and "completion" not in row else "completion"
    conversation: Conversation = []
    for key, role in (("prompt", "user"), (answer_key, "assistant")):
        value = _field(row, key)
        if _is_list(value) and not _is_parts(value):
            conversation += _messages(value, key)
        else:
            conversation.append(_message(role, value, key))
    return conversation


def _messages(value: Any, place: str) -> Conversation:
    if not _is_list(value):
        raise BadRow("malformed", f"{place} must be a list of messages, got {_show(value)}")
    conversation = []
    for index, message in enumerate(value):
        where = f"{place}[{index}]"
        if not isinstance(message, Mapping):
            raise BadRow("malformed", f"{where} must be an object, got {_show(message)}")
        # data sets mix both spellings in one file; a null one is a column that another row filled
        role_key = "role" if message.get("role") is not None else "from"
        text_key = "content" if message.get("content") is not None else "value"
        role = message.get(role_key)
        if role is None:
            raise BadRow("malformed", f"{where} has no role (keys: {sorted(map(str, message))})")
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise BadRow(
                "malformed",
                f"{where} has the unknown role {_show(role)}; known: {', '.join(ROLES)}",
            )
        if message.get(text_key) is None:
            raise BadRow("malformed", f"{where} has no content (keys: {sorted(map(str, message))})")
        conversation.append(_message(ROLES[role.lower()], message[text_key], f"{where}.{text_key}"))
    return conversation


def _message(role: str, content: Any, place: str) -> Message:
    return {"role": role, "content": _text(content, place)}


def _text(value: Any, place: str) -> str:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRow(
                "malformed", f"{place} holds half of a character ({error.reason})"
            ) from error
        return value
    if _is_list(value):
        if not _is_parts(value):
            raise BadRow(
                "malformed", f"{place} may only hold parts of type text, got {_show(value)}"
            )
        return _text("".join(part["text"] for part in value), place)
    raise BadRow("malformed", f"{place} must be a text, got {_show(value)}")


def _is_parts(value: Any) -> bool:
    return all(
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
        for part in value
    ) and bool(value)


def _field(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise BadRow("malformed", f"has no {key} (keys: {sorted(map(str, row))})")
    return row[key]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# A row of another layout needs one more entry here and nothing else: tests/test_schema_laws.py
# finds it and reads its example.
SCHEMAS = {
    "messages": Schema(
        columns=("messages",),
        read=lambda row: _messages(_field(row, "messages"), "messages"),
        example={
            "messages": [
                {"role": "user", "content": "2 + 2 ="},
                {"role": "assistant", "content": "4"},
            ]
        },
    ),
    "sharegpt": Schema(
        columns=("conversations",),
        optional=("system",),
        read=_sharegpt,
        example={
            "conversations": [{"from": "human", "value": "2 + 2 ="}, {"from": "gpt", "value": "4"}]
        },
    ),
    "alpaca": Schema(
        columns=("instruction", "output"),
        optional=("input", "system", "history"),
        read=_alpaca,
        example={"instruction": "2 + 2 =", "input": "", "output": "4"},
    ),
    "prompt_completion": Schema(
        columns=("prompt",),
        one_of=("completion", "response"),
        read=_prompt_completion,
        example={"prompt": "2 + 2 =", "completion": "4"},
    ),
}
