"""Answers to the rows of a file, drawn as they were asked for and kept with what was right."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neo.data.files import read_files
from neo.data.prompt import PromptEncoder
from neo.data.rows import BadRow, Conversation, detect_schema, to_conversation
from neo.evaluation.loading import Loaded, free_bytes, out_of_memory, rows_that_fit
from neo.evaluation.settings import LARGEST_BATCH, Settings

MAX_GEN_TOKS = 256  # unless more or less is asked for


@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation up to the answer that is asked for.

    Attributes:
        row: Its number in the file.
        asked: The messages before the answer.
        reference: The answer that the row has; None where it ends in a question.
    """

    row: int
    asked: Conversation
    reference: str | None


def read_questions(path: str) -> list[Question]:
    """The questions of a file, a glob or a folder of rows in any of the four schemas.

    Raises:
        ValueError: It cannot be read, or a row asks nothing; the message names the row.
    """
    rows = read_files(path)
    if not len(rows):
        raise ValueError(f"prompts={path!r}: holds no row")
    schema = detect_schema(list(rows[0]))
    found = []
    for i in range(len(rows)):
        try:
            found.append(_question(i, rows[i], schema))
        except BadRow as error:
            raise ValueError(f"prompts={path!r}: row {i} asks nothing: {error}") from error
    return found


def answer(
    loaded: Loaded,
    encoder: PromptEncoder,
    questions: Sequence[Question],
    settings: Settings,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """A line for each question: its messages, the answer, and the reference where there is one.

    A prompt that leaves no room for an answer has none, and the line says so. Where memory runs out
    all begin again with half as many at once.

    Raises:
        RuntimeError: Memory is too small for one row.
    """
    given = {"eos_token_id": _stops(loaded.lm, encoder)} | settings.generation.given()
    longest = int(given.pop("max_gen_toks", MAX_GEN_TOKS))
    lines: list[dict[str, Any]] = []
    asked: dict[int, list[int]] = {}
    for place, question in enumerate(questions):
        line: dict[str, Any] = {"row": question.row, "messages": question.asked}
        ids = encoder.prompt_ids(
            [*question.asked, {"role": "assistant", "content": question.reference or "."}]
        )
        if len(ids) + 1 > loaded.lm.max_length:
            line["error"] = (
                f"its {len(ids)} tokens leave no room: the model takes {loaded.lm.max_length}"
            )
        else:
            asked[place] = ids
        lines.append(line)
    order = sorted(asked, key=lambda place: -len(asked[place]))
    size = settings.batch_size or LARGEST_BATCH
    if settings.batch_size is None and order:
        lm = loaded.lm
        free, length = free_bytes(lm.device), len(asked[order[0]]) + longest
        size = min(size, rows_that_fit(lm.model, length, free, False))
    while True:
        try:
            texts = _generate(loaded, asked, order, size, longest, given)
            break
        except Exception as error:
            if not out_of_memory(error) or settings.batch_size is not None or size == 1:
                raise
            size //= 2
        gc.collect()
        say(f"prompts: {size} rows at once")
    for place, line in enumerate(lines):
        if place in texts:
            line["answer"] = texts[place]
        if questions[place].reference is not None:
            line["reference"] = questions[place].reference
    return lines


def _stops(lm: Any, encoder: PromptEncoder) -> list[int]:
    """Where an answer ends: as the model says itself, and as the student has learned to.

    A base model's own end is that of a text, which a chat template need not use.
    """
    own = lm.model.generation_config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    return [*dict.fromkeys([*own, lm.tokenizer.eos_token_id, encoder.end_of_turn()])]


@torch.no_grad()
def _generate(
    loaded: Loaded,
    asked: Mapping[int, Sequence[int]],
    order: Sequence[int],
    size: int,
    longest: int,
    given: Mapping[str, Any],
) -> dict[int, str]:
    """The text of each answer, by its place."""
    lm = loaded.lm
    tokenizer, device = lm.tokenizer, lm.device
    loaded.state.set()
    texts = {}
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        width = len(asked[chosen[0]])
        pads = [width - len(asked[place]) for place in chosen]
        ids = [
            [tokenizer.pad_token_id] * pad + list(asked[place])
            for pad, place in zip(pads, chosen, strict=True)
        ]
        mask = [[0] * pad + [1] * (width - pad) for pad in pads]
        output = lm.model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=min(longest, lm.max_length - width),
            pad_token_id=tokenizer.pad_token_id,
            **({"do_sample": False} | dict(given)),
        )
        for place, row in zip(chosen, output[:, width:].tolist(), strict=True):
            texts[place] = tokenizer.decode(row, skip_special_tokens=True)
    return texts


def _question(number: int, row: Any, schema: str) -> Question:
    conversation = _conversation(row, schema)
    if conversation[-1]["role"] == "assistant":
        asked, reference = conversation[:-1], conversation[-1]["content"]
    else:
        asked, reference = conversation, None
    if not any(message["role"] == "user" for message in asked):
        raise BadRow("empty", "there is no user's message before the answer")
    return Question(row=number, asked=asked, reference=reference)


def _conversation(row: Any, schema: str) -> Conversation:
    """As `to_conversation`; a question that nobody has answered yet is one, too."""
    try:
        return to_conversation(row, schema)
    except BadRow as error:
        key = {"messages": "messages", "sharegpt": "conversations"}.get(schema)
        if error.reason != "no_assistant_turn" or key is None:
            raise
        answered = {**row, key: [*row[key], {"role": "assistant", "content": "."}]}
        return to_conversation(answered, schema)[:-1]
