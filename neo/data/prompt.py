"""A conversation as token ids and targets: the one place where targets are shifted.

Chat templates in the wild rarely mark what the assistant wrote, and some rewrite earlier turns, so
neither the template's own mask nor the tokens of prefixes can be trusted. Here the conversation is
rendered twice, once with a marker in place of every answer. What stands between the markers is the
template's own text; put together with the answers it must give the real text, character for
character. That fixes where every answer stands, and the tokenizer's offsets say which ids they are.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from neo.data.rows import BadRow, Conversation

IGNORE = -100
TEMPLATES = Path(__file__).parent / "templates"
# Of the rules by which a conversation becomes ids and targets: whoever changes what the same row
# gives counts it up, and a teacher's targets that were cached before are computed again.
SUPERVISION = 1

# Llama 3.2's template writes today's date into the prompt unless it is given one; this is the date
# that Llama 3.1's template falls back to. With it, a row has the same ids tomorrow.
TEMPLATE_DATE = "26 Jul 2024"

PROBE: Conversation = [
    {"role": "user", "content": "First question?"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "Second question?"},
    {"role": "assistant", "content": "Second answer."},
]


@dataclass(frozen=True)
class Example:
    """Ids and aligned targets: `targets[t]` is the id that position t must predict, or `IGNORE`.

    `row_id` is the index of its row in the table, or its number in the stream.
    """

    input_ids: list[int]
    targets: list[int]
    truncated: bool = False
    row_id: int | None = None


@dataclass(frozen=True)
class Turn:
    """Where one assistant turn stands in the rendered text, in characters, its end marker included.

    `marked` is false where the template puts no special token behind the turn.
    """

    start: int
    stop: int
    marked: bool


def template_names() -> list[str]:
    """The names of the templates shipped in `neo/data/templates`."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def read_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    """The Jinja text of the tokenizer's own template, of a shipped one, or of a `.jinja` file."""
    shipped = ", ".join(template_names())
    if chat_template is None:
        if not tokenizer.chat_template:
            raise ValueError(
                "data.chat_template=null: this tokenizer has no chat template of its own. Name a "
                f"shipped one ({shipped}) or a .jinja file"
            )
        return str(tokenizer.get_chat_template())
    if chat_template in template_names():
        return (TEMPLATES / f"{chat_template}.jinja").read_text(encoding="utf-8")
    path = Path(chat_template).expanduser()
    if path.suffix == ".jinja" and path.is_file():
        return path.read_text(encoding="utf-8")
    raise ValueError(
        f"data.chat_template={chat_template!r}: must be null (the tokenizer's own), one of "
        f"{shipped}, or the path of an existing .jinja file"
    )


class PromptEncoder:
    """Encodes conversations with one tokenizer and one chat template, to at most `max_length` ids.

    Raises:
        ValueError: The tokenizer is not a fast one, there is no template, or the template marks no
            end of an assistant turn, so that a student could never learn to stop.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        chat_template: str | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"the student's tokenizer ({type(tokenizer).__name__}) gives no character offsets; "
                "a fast one is needed (a folder with tokenizer.json)"
            )
        if max_length < 2:
            raise ValueError(f"data.max_length={max_length}: must be at least 2")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.template = read_template(tokenizer, chat_template)
        added = {str(t) for t in tokenizer.added_tokens_decoder.values()}
        special = sorted({*added, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
        # nothing special at all must match nowhere, not everywhere
        ends = "|".join(map(re.escape, special)) or "(?!)"
        self._end = re.compile(rf"\s*(?:{ends})")
        self._check_template(chat_template)

    def encode(self, conversation: Conversation) -> Example:
        """Ids and targets of the conversation: each assistant turn supervised, and nothing else.

        A supervised span decodes to the text of the turn and its end marker. Ids beyond
        `max_length` are cut off at the right.

        Raises:
            BadRow: For the reason "template" or "nothing_supervised".
        """
        text, turns = self._turns(conversation)
        ids, spans = self._tokens(text, turns)
        kept = ids[: self.max_length]
        targets = [IGNORE] * len(kept)
        for start, stop in spans:
            # The shift. Position t predicts id t + 1; the very first id has nobody to predict it.
            first, last = max(start, 1), min(stop, len(kept))
            targets[first - 1 : last - 1] = kept[first:last]
        if all(target == IGNORE for target in targets):
            raise BadRow(
                "nothing_supervised",
                f"the first answer begins at token {spans[0][0]} of {len(ids)}, and "
                f"data.max_length={self.max_length} leaves nothing of it",
            )
        return Example(kept, targets, truncated=len(ids) > self.max_length)

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """All ids before the last assistant turn's answer, as in training; never truncated.

        Without any assistant turn: the ids of the conversation and the generation prompt.
        """
        if not any(message["role"] == "assistant" for message in conversation):
            return self._tokens(self._render(conversation, add_generation_prompt=True), [])[0]
        ids, spans = self._tokens(*self._turns(conversation))
        return ids[: spans[-1][0]]

    def end_of_turn(self) -> int:
        """The id that ends an assistant's turn, which a student learns to stop with."""
        example = self.encode(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        )
        return next(target for target in reversed(example.targets) if target != IGNORE)

    def _render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                conversation,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                date_string=TEMPLATE_DATE,
            )
        except (TemplateError, TypeError, ValueError, AttributeError) as error:
            raise BadRow("template", f"the chat template says: {error}") from error
        return str(text)

    def _turns(self, conversation: Conversation) -> tuple[str, list[Turn]]:
        """The rendered text and where each assistant turn stands in it."""
        text = self._render(conversation)
        everything = "".join(message["content"] for message in conversation)
        salt = 0
        while f"qzmark{salt}x" in everything:
            salt += 1
        marked: Conversation = []
        marks: list[tuple[str, str, str]] = []
        for message in conversation:
            if message["role"] == "assistant":
                mark = f"qzmark{salt}x{len(marks)}xq"
                # Templates look for this tag and drop or rebuild what stands before it.
                thought = f"<think>\n{mark}thought\n</think>\n\n"
                content = f"{thought}{mark}" if "</think>" in message["content"] else mark
                marks.append((mark, content, message["content"]))
                message = {**message, "content": content}
            marked.append(message)
        skeleton = self._render(marked)

        position, offset = 0, 0  # in the skeleton, in the text
        holes = []
        for number, (mark, content, answer) in enumerate(marks):
            start = skeleton.find(content, position)
            whole = start >= 0
            stop = start + len(content)
            if not whole:
                start = skeleton.find(mark, position)
                stop = start + len(mark)
            if start < 0 or skeleton.count(mark, position) > 1 + (whole and content != mark):
                raise BadRow("template", f"the chat template drops or repeats answer {number}")
            holes.append((skeleton[position:start], _variants(answer, whole=whole)))
            position = stop
        turns: list[Turn] = []
        for number, (before, variants) in enumerate(holes):
            after = holes[number + 1][0] if number + 1 < len(holes) else skeleton[position:]
            offset += len(before)
            kept = _fitting(text, offset, variants, after)
            if kept is None or (number == 0 and not text.startswith(before)):
                raise BadRow("template", f"the chat template changes the text of answer {number}")
            stop = offset + len(kept)
            end = self._end.match(after)
            turns.append(Turn(offset, stop + (end.end() if end else 0), end is not None))
            offset = stop
        if turns and text[offset:] != skeleton[position:]:
            raise BadRow("template", "the chat template changes the text after the last answer")
        return text, turns

    def _tokens(self, text: str, turns: Sequence[Turn]) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of the text, and the half-open range of ids of each turn."""
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        ends = [end for _, end in offsets]
        spans = []
        for number, turn in enumerate(turns):
            first = last = bisect_right(ends, turn.start)
            while last < len(ids) and offsets[last][0] < turn.stop:
                last += 1
            wanted = text[turn.start : turn.stop]
            decoded = self.tokenizer.decode(
                ids[first:last], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            # A token that crosses the border may only bring white space with it.
            if decoded != wanted and decoded.strip() != wanted.strip():
                raise BadRow(
                    "template",
                    f"the ids of answer {number} decode to {_clip(decoded)}, not to "
                    f"{_clip(wanted)}: the tokenizer merges it with the prompt or cannot write it",
                )
            spans.append((first, last))
        return ids, spans

    def _check_template(self, chat_template: str | None) -> None:
        name = "the tokenizer's own" if chat_template is None else repr(chat_template)
        try:
            text, turns = self._turns(PROBE)
            self._tokens(text, turns)
        except BadRow as error:
            raise ValueError(
                f"data.chat_template: {name} template cannot encode a plain conversation of two "
                f"questions and answers: {error.detail}. Set data.chat_template to one of "
                f"{', '.join(template_names())} or to a .jinja file"
            ) from error
        if not all(turn.marked for turn in turns):
            raise ValueError(
                f"data.chat_template: {name} template ends assistant turns without a special token "
                f"of this tokenizer (it knows {sorted(self.tokenizer.all_special_tokens)}; the "
                f"text ends in {text[-30:]!r}), so the student could not learn to stop. Set "
                f"data.chat_template to one of {', '.join(template_names())} or to a .jinja file"
            )


def _variants(answer: str, whole: bool) -> list[str]:
    """What a template may leave of an answer, the untouched text first.

    Where the marker of a thought did not survive (`whole` is false), only what follows the thought
    can have.
    """
    texts = [answer]
    if "</think>" in answer:
        thought, _, rest = answer.rpartition("</think>")
        if whole:  # as Qwen3 writes it anew
            thought = thought.split("</think>")[0].rstrip("\n").split("<think>")[-1].strip("\n")
            texts.append(f"<think>\n{thought}\n</think>\n\n" + rest.lstrip("\n"))
        else:
            texts = [rest]
    edits = [
        edit
        for text in texts
        for edit in (
            text,
            text.strip(),
            text.lstrip(),
            text.rstrip(),
            text.strip("\n"),
            text.lstrip("\n"),
            text.rstrip("\n"),
        )
    ]
    return list(dict.fromkeys(edits))


def _fitting(text: str, offset: int, variants: Sequence[str], after: str) -> str | None:
    """The first variant that stands at the offset with the template's text right behind it."""
    for variant in variants:
        if text.startswith(variant, offset) and text.startswith(after, offset + len(variant)):
            return variant
    return None


def _clip(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
