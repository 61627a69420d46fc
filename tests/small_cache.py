"""A teacher and a student of a few numbers, and caches of what the teacher gives."""

from functools import cache

import torch

from neo.losses.given import HiddenStates
from neo.losses.head import Head
from neo.teachers.fields import Shapes
from neo.teachers.manifest import begin, finish
from neo.teachers.measure import measured
from neo.teachers.shard_writers import ShardWriter
from neo.teachers.shards import RowKey
from neo.teachers.stored import DEFAULTS, VALUES, Stored

VOCAB, ROWS, D_TEACHER, D_STUDENT = 50, 53, 12, 8
SHAPES = Shapes(
    vocab=VOCAB, d_student=D_STUDENT, d_teacher=D_TEACHER, teacher_rows=ROWS, student_bias=True
)
KEYS = [(RowKey(0, 5), 3), (RowKey(1, 5), 1), (RowKey(0, 2), 7), (RowKey(0, 900), 2)]
NUM_TOKENS = sum(num for _, num in KEYS)
IDENTITY = {"teacher": {"path": "somewhere", "hash": "ab"}, "vocab": VOCAB}


def stored(kind, values=None, **more):
    """Of a kind, with a temperature where it has one and lists that fit this vocabulary."""
    if kind != "hidden":
        more = {"temperature": 2.0, **more}
    if kind == "top_k":
        more = {"k": 7, **more}
    if kind == "sampled":
        more = {"samples": 9, **more}
    return Stored(kind=kind, values=values, **more).resolved("float32")


EACH = [
    *(stored(kind, values) for kind in DEFAULTS for values in VALUES[kind]),
    stored("sampled", k=4, proposal=0.8),
    stored("top_k", missing="renormalise"),
    stored("top_p", p=1.0),
]
NAMES = [f"{each.kind}-{each.values}-{number}" for number, each in enumerate(EACH)]


@cache
def models(dtype=torch.float32, num_tokens=NUM_TOKENS):
    """What the teacher gives for some tokens, their targets, and the student's head."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    teacher = Head(weight=randn(ROWS, D_TEACHER), bias=randn(ROWS), logit_scale=0.7)
    student = Head(weight=randn(VOCAB + 2, D_STUDENT), bias=randn(VOCAB + 2))
    given = HiddenStates(hidden=randn(num_tokens, D_TEACHER), head=teacher)
    return given, torch.randint(0, VOCAB, (num_tokens,), generator=generator), student


def blobs(kept, **more):
    given, targets, student = models()
    return measured(given, targets, kept, SHAPES, KEYS, student, **more)


def write(folder, kept, num_shards=2):
    """A finished cache in the folder."""
    begin(folder, kept, SHAPES, IDENTITY, growing=False)
    rows = [(*key, blob) for key, blob in zip(KEYS, blobs(kept), strict=True)]
    entries = []
    for number in range(num_shards):
        with ShardWriter(folder, f"rows-{number:05d}") as writer:
            for key, num, blob in rows[number::num_shards]:
                writer.add(key, num, 1000 + key.row_id, blob)
        entries.append(writer.entry)
    (folder / "teacher_head.safetensors").write_bytes(b"weights" * 20)
    counts = {"rows": len(KEYS), "tokens": NUM_TOKENS, "bad_rows": {"empty": 1}}
    return finish(folder, entries, counts, {"kl": 1e-7}, ["teacher_head.safetensors"])
