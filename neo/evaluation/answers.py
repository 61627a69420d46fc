"""What a model answered, a line of JSON for each row, to be read."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neo.results.records import write_atomically

FOLDER = "evaluation"  # in the folder of the record


def write_lines(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
    write_atomically(file, text.encode())


def lines_of(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line for each row of a task: prompt, answer as given and as filtered, target, metrics.

    Of a choice the answer is each continuation with its log-likelihood in nats.

    Args:
        samples: The harness's, one for each row and filter.
    """
    lines: dict[Any, dict[str, Any]] = {}
    for sample in samples:
        asked, given = sample["arguments"], sample["resps"]
        line = lines.setdefault(
            sample["doc_id"],
            {
                "row": sample["doc_id"],
                "prompt": asked[0][0],
                "answer": _answer(asked, given),
                "filtered": {},
                "target": sample["target"],
                "metrics": {},
            },
        )
        name = sample["filter"]
        if not _is_scored(given):
            line["filtered"][name] = sample["filtered_resps"][0]
        for metric in sample["metrics"]:
            key = metric if name == "none" else f"{metric}/{name}"
            line["metrics"][key] = sample[metric]
    for line in lines.values():
        if not line["filtered"]:
            del line["filtered"]
    return [lines[row] for row in sorted(lines)]


def _is_scored(given: Sequence[Any]) -> bool:
    return not isinstance(given[0][0], str)


def _answer(asked: Sequence[Any], given: Sequence[Any]) -> Any:
    """A text, texts where the task asks several times, or likelihoods of what was offered."""
    if not _is_scored(given):
        texts = list(given[0])
        return texts[0] if len(texts) == 1 else texts
    found = []
    for arguments, responses in zip(asked, given, strict=True):
        scored: dict[str, Any] = {"text": arguments[1]} if len(arguments) > 1 else {}
        response = responses[0]
        if isinstance(response, Sequence):
            scored |= {"loglikelihood": response[0], "greedy": bool(response[1])}
        else:  # of a whole text
            scored["loglikelihood"] = response
        if len({a[0] for a in asked}) > 1:  # such as WinoGrande's, which fill in the prompt
            scored["prompt"] = arguments[0]
        found.append(scored)
    return found
