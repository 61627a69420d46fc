import copy
from dataclasses import replace

import pytest
import torch
from lab import tokenizer

from neo.data import prompt
from neo.data.mini_data import MiniData
from neo.data.stream import HubData
from neo.losses.head import Head
from neo.teachers import identity
from neo.teachers.identity import differences, head_identity, identity_of, name_of
from neo.teachers.online import OnlineTeacher
from neo.teachers.stored import Stored

VOCAB = 40


def head(**change):
    weight = torch.randn(VOCAB + 3, 8, generator=torch.Generator().manual_seed(0))
    return replace(Head(weight=weight.to(torch.bfloat16)), **change)


def teacher(**change):
    return OnlineTeacher(path="neo://mini-teacher", **change)


def used_tokenizer():
    used = copy.deepcopy(tokenizer())
    used(["a", "a b c d e f"], padding=True, truncation=True, max_length=3)
    assert used.backend_tokenizer.to_str() != tokenizer().backend_tokenizer.to_str()
    return used


PARTS = dict(
    teacher=teacher(),
    autocast=None,
    teacher_dtype="float32",
    tokenizer=tokenizer(),
    chat_template="{{ messages }}",
    data=MiniData(num_rows=20, num_val_rows=3),
    schema="messages",
    stored=Stored(kind="projected"),
    vocab=VOCAB,
    student_head=head(),
)
BASE = identity_of(**PARTS)


def changed(**change):
    return differences(BASE, identity_of(**(PARTS | change)))


def other_tokenizer():
    other = copy.deepcopy(tokenizer())
    other.add_tokens(["<more>"])
    return other


def other_special():
    other = copy.deepcopy(tokenizer())
    other.pad_token = other.eos_token
    return other


WEIGHT = head().weight.clone()
WEIGHT[5, 3] += 1
OTHERS = {
    "teacher.hash": dict(teacher=OnlineTeacher(path="neo://mini-student")),
    "teacher.dtype": dict(teacher_dtype="bfloat16"),
    "teacher.quantization": dict(teacher=teacher(quantization="int8")),
    "tokenizer.hash": dict(tokenizer=other_tokenizer()),
    "tokenizer.special": dict(tokenizer=other_special()),
    "chat_template": dict(chat_template="{{ messages }} "),
    "data.hash": dict(data=MiniData(num_rows=21, num_val_rows=3)),
    "data.schema": dict(schema="sharegpt"),
    "rules.max_length": dict(data=MiniData(num_rows=20, num_val_rows=3, max_length=100)),
    "stored.temperature": dict(stored=Stored(kind="projected", temperature=2)),
    "stored.values": dict(stored=Stored(kind="projected", values="int8")),
    "student_head.sha256": dict(student_head=head(weight=WEIGHT)),
    "student_head.logit_scale": dict(student_head=head(logit_scale=0.5)),
}  # fmt: skip


@pytest.mark.parametrize("key", OTHERS)
def test_whatever_targets_depend_on_is_part_of_the_identity(key):
    (line,) = changed(**OTHERS[key])
    assert line.startswith(f"{key}: the cache has ")
    assert ", the run has " in line
    assert name_of(identity_of(**(PARTS | OTHERS[key]))) != name_of(BASE)


def test_everything_that_differs_is_told():
    found = changed(chat_template="x", teacher_dtype="bfloat16", vocab=39)
    assert [line.split(":")[0] for line in found] == [
        "teacher.dtype", "chat_template", "vocab", "student_head.sha256", "student_head.shape",
    ]  # fmt: skip
    assert found[0] == 'teacher.dtype: the cache has "float32", the run has "bfloat16"'


def test_rules_and_the_date_of_templates_are_part_of_it(monkeypatch):
    assert BASE["rules"]["supervision"] == prompt.SUPERVISION
    monkeypatch.setattr(identity, "SUPERVISION", 99)
    monkeypatch.setattr(identity, "TEMPLATE_DATE", "1 Jan 2030")
    assert [line.split(":")[0] for line in changed()] == [
        "rules.template_date", "rules.supervision",
    ]  # fmt: skip


SAME = [
    dict(data=MiniData(num_rows=20, num_val_rows=3, batch_size=3, packing=False, shuffle=False)),
    dict(stored=Stored(kind="projected", values="float32", temperature=1, seed=4)),
    dict(student_head=head(weight=head().weight.float())),
    dict(student_head=head(weight=torch.cat([head().weight[:VOCAB], torch.ones(9, 8)]))),
    dict(teacher=teacher(activation_checkpointing=True)),
    dict(tokenizer=used_tokenizer()),
]


@pytest.mark.parametrize("change", SAME, ids=str)
def test_what_changes_no_target_changes_no_identity(change):
    assert changed(**change) == []
    assert name_of(identity_of(**(PARTS | change))) == name_of(BASE)


def test_where_the_teacher_lies_is_said_and_counts_for_nothing():
    elsewhere = {**BASE, "teacher": {**BASE["teacher"], "path": "/elsewhere"}}
    assert BASE["teacher"]["path"] == "neo://mini-teacher"
    assert differences(BASE, elsewhere) == []
    assert name_of(elsewhere) == name_of(BASE)


def test_a_name_is_twelve_hex_digits():
    assert len(name_of(BASE)) == 12
    int(name_of(BASE), 16)


def test_a_bias_is_part_of_a_head():
    plain, zero, one = (
        head_identity(head(bias=bias), VOCAB)
        for bias in (None, torch.zeros(VOCAB + 3), torch.ones(VOCAB + 3))
    )
    assert differences({"head": plain}, {"head": zero}) != []
    assert plain["sha256"] == zero["sha256"] or plain["bias"] != zero["bias"]
    assert [line.split(":")[0] for line in differences(zero, one)] == ["sha256"]


def test_only_a_projection_depends_on_the_students_head():
    for kind in ("hidden", "top_k", "sampled"):
        parts = PARTS | {"stored": Stored(kind=kind)}
        assert "student_head" not in identity_of(**parts)
        assert identity_of(**parts) == identity_of(**(parts | {"student_head": None}))
    with pytest.raises(ValueError, match="student_head=None: kind=projected is made with"):
        identity_of(**(PARTS | {"student_head": None}))


def test_a_data_set_of_the_hub_is_its_name_split_and_commit(monkeypatch):
    monkeypatch.setattr(HubData, "identity", lambda self: {"revision": "abc"})
    data = HubData(path="some/rows", name="7M", split="train")
    found = identity_of(**(PARTS | {"data": data}))["data"]
    assert found == {
        "path": "some/rows", "name": "7M", "split": "train", "revision": "abc", "val_share": 0.02,
        "schema": "messages",
    }  # fmt: skip


def test_the_group_size_counts_where_weights_are_quantised_in_groups():
    teachers = [
        teacher(quantization="int4", quantization_group_size=size) for size in (None, 32, 64)
    ]
    default, same, other = (identity_of(**(PARTS | {"teacher": each})) for each in teachers)
    assert differences(default, same) == []
    assert differences(default, other) == [
        "teacher.quantization_group_size: the cache has 32, the run has 64"
    ]
