"""What a cache was made of: the name it is found by, and what differs from what a run has."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from neo.data.datamodule import Data
from neo.data.prompt import SUPERVISION, TEMPLATE_DATE
from neo.data.stream import HubData
from neo.losses.head import Head
from neo.teachers.online import OnlineTeacher
from neo.teachers.stored import Stored

NAME_DIGITS = 12
# Said for a reader; where the weights lie changes nothing.
INFORMATION = ("teacher.path",)
_HASHED_ROWS = 4096


def identity_of(
    *,
    teacher: OnlineTeacher | None,
    teacher_dtype: str,
    autocast: str | None,
    tokenizer: Any,
    chat_template: str,
    data: Data,
    schema: str | None,
    stored: Stored,
    vocab: int,
    student_head: Head | Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All that a teacher's targets depend on, as plain data.

    Args:
        teacher: Where the weights lie, and how they are quantised; None leaves it out.
        teacher_dtype: Of its weights, such as "bfloat16"; never "auto".
        autocast: The dtype that products are made in under the trainer's precision; None for that
            of the weights.
        tokenizer: The student's, a fast one.
        chat_template: The Jinja text.
        data: The rows.
        schema: Of the rows, found out.
        stored: What is kept.
        vocab: Ids that both models share.
        student_head: The frozen one, or what `head_identity` has said of it; of kind projected
            alone.

    Raises:
        ValueError: The kind is projected and there is no head.
    """
    if stored.kind == "projected" and student_head is None:
        raise ValueError("student_head=None: kind=projected is made with the student's head")
    of_teacher = {} if teacher is None else {"teacher": _teacher(teacher, teacher_dtype, autocast)}
    identity: dict[str, Any] = {
        **of_teacher,
        "tokenizer": _tokenizer(tokenizer),
        "chat_template": _hash(chat_template.encode()),
        "data": {**_rows(data), "schema": schema},
        "rules": {
            "max_length": data.max_length,
            "template_date": TEMPLATE_DATE,
            "supervision": SUPERVISION,
        },
        "stored": stored.resolved().as_dict(),
        "vocab": vocab,
    }
    if stored.kind == "projected" and student_head is not None:
        if isinstance(student_head, Head):
            student_head = head_identity(student_head, vocab)
        identity["student_head"] = dict(student_head)
    return identity


def head_identity(head: Head, vocab: int) -> dict[str, Any]:
    """What a frozen head is, whichever dtype its values are held in.

    Args:
        head: Of the student.
        vocab: Rows that count; those past them are padding.
    """
    digest = hashlib.sha256()
    weight = head.weight.detach()[:vocab]
    for start in range(0, len(weight), _HASHED_ROWS):
        digest.update(_float32(weight[start : start + _HASHED_ROWS]))
    if head.bias is not None:
        digest.update(_float32(head.bias.detach()[:vocab]))
    return {
        "sha256": digest.hexdigest(),
        "shape": list(weight.shape),
        "bias": head.bias is not None,
        "logit_scale": float(head.logit_scale),
    }


def differences(of_cache: Mapping[str, Any], of_run: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, a line each; empty where a cache serves a run.

    Example:
        >>> differences({"vocab": 5, "rules": {"max_length": 9}}, {"vocab": 5, "rules": {}})
        ['rules.max_length: the cache has 9, the run has nothing']
    """
    cache, run = _leaves(of_cache), _leaves(of_run)
    return [
        f"{key}: the cache has {_shown(cache, key)}, the run has {_shown(run, key)}"
        for key in dict.fromkeys((*run, *cache))
        if key not in INFORMATION and _shown(cache, key) != _shown(run, key)
    ]


def name_of(identity: Mapping[str, Any]) -> str:
    """Twelve hex digits, the same for identities without differences.

    Example:
        >>> name_of({"vocab": 5, "teacher": {"path": "a"}})
        '7e0e2dc7812b'
    """
    leaves = {key: value for key, value in _leaves(identity).items() if key not in INFORMATION}
    return _hash(json.dumps(leaves, sort_keys=True).encode())[:NAME_DIGITS]


def _leaves(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            found.update(_leaves(value, f"{prefix}{key}."))
        elif value is not None:
            found[prefix + key] = value
    return found


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    # as JSON has it, so that a list is a tuple's equal
    return json.dumps(leaves[key]) if key in leaves else "nothing"


def _teacher(teacher: OnlineTeacher, dtype: str, autocast: str | None) -> dict[str, Any]:
    known: dict[str, Any] = {"path": teacher.path, **teacher.identity(), "dtype": dtype}
    known |= {"slices": teacher.slices(), "autocast": autocast}
    known["quantization"] = teacher.quantization
    if teacher.quantization == "int4":
        known["quantization_group_size"] = teacher.group_size
    if teacher.random_init:
        known["random_init"] = True
    return known


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    special = dict(tokenizer.special_tokens_map)
    text = json.dumps([special, sorted(map(int, tokenizer.all_special_ids))], sort_keys=True)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # of the last call, not of the tokenizer
        backend.pop(state, None)
    return {
        "hash": _hash(json.dumps(backend).encode())[:16],
        "special": _hash(text.encode())[:16],
    }


def _rows(data: Data) -> dict[str, Any]:
    if isinstance(data, HubData):
        # validation rows of a stream are numbered among those that this share holds out
        own = {"path": data.path, "name": data.name, "split": data.split}
        return {**own, "val_share": data.val_share, **data.identity()}
    return dict(data.identity())


def _float32(values: torch.Tensor) -> bytes:
    return values.float().cpu().contiguous().numpy().astype("<f4", copy=False).tobytes()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
