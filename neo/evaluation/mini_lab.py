"""The mini-lab's test rows as tasks of lm-evaluation-harness, without a network.

`tasks/mini_lab/*.yaml` name what is here. The rows are those that training answers with
`eval_split=test`: `--metadata num_test_rows=600,rows_seed=0` says which, as `data.num_test_rows`
and `data.rows_seed` of a run do.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from neo.data.mini import mini_rows, wrong_answers
from neo.data.mini_data import MiniData
from neo.data.mini_tokenizer import END, START

Messages = Sequence[Mapping[str, str]]


class MiniTask(ConfigurableTask):
    """A task whose prompt is a conversation up to the answer that is asked for.

    Without a chat template it is written in the mini models' own format, so that they are asked as
    in training; with one, its messages are what the template gets.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def fewshot_context(
        self,
        doc: Mapping[str, Any],
        num_fewshot: int = 0,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        chat_template: Callable[..., str] | None = None,
        gen_prefix: str | None = None,
    ) -> str:
        """The prompt; there are no examples before it, as there are none in training."""
        asked = list(doc["messages"])[:-1]
        if system_instruction:
            asked.insert(0, {"role": "system", "content": system_instruction})
        if apply_chat_template and chat_template is not None:
            return chat_template(asked, add_generation_prompt=True)
        return written_out(asked)


def written_out(messages: Messages) -> str:
    """The messages in the mini models' format, up to where the assistant begins to answer."""
    turns = [f"{START}{message['role']}\n{message['content']}{END}\n" for message in messages]
    return "".join(turns) + f"{START}assistant\n"


def rows_of_kind(
    kind: str, num_test_rows: int | None = None, rows_seed: int | None = None, **_: Any
) -> dict[str, Dataset]:
    """The test rows of one kind, in their order, as the split `test`.

    Args:
        kind: One of the ten.
        num_test_rows: Of all kinds together; the default is `data=mini`'s own.
        rows_seed: Chooses the rows; the default is `data=mini`'s own.
        _: What else the harness hands to every task: versions, paths, the model's arguments.
    """
    num = MiniData.num_test_rows if num_test_rows is None else int(num_test_rows)
    seed = MiniData.rows_seed if rows_seed is None else int(rows_seed)
    found = [doc for doc in _docs(num, seed) if doc["kind"] == kind]
    if not found:
        raise ValueError(f"num_test_rows={num}: leaves no row of kind {kind!r}; give at least 10")
    return {"test": Dataset.from_list(found)}


def exactly_right(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 for an answer that is right to the last letter, as training counts them."""
    return {"exact_match": float(results[0].strip() == doc["answer"].strip())}


@lru_cache(maxsize=4)
def _docs(num_rows: int, seed: int) -> tuple[dict[str, Any], ...]:
    docs = []
    rows = mini_rows("test", num_rows, seed=seed)
    for i, (row, wrong) in enumerate(
        zip(rows, wrong_answers("test", num_rows, seed=seed), strict=True)
    ):
        answer = row["messages"][-1]["content"]
        label = i % 2  # neither place is right more often, so that a tie is no advantage
        docs.append(
            {
                "kind": row["kind"],
                "messages": row["messages"],
                "prompt": written_out(row["messages"][:-1]),
                "answer": answer,
                "choices": [wrong, answer] if label else [answer, wrong],
                "label": label,
            }
        )
    return tuple(docs)
