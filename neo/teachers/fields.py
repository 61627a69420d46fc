"""Which arrays a row's blob consists of, where each begins, and how it is read."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from neo.teachers.bits import num_bits, num_packed_bytes
from neo.teachers.stored import MAX_LIST, Stored

ALIGNMENT = 8  # bytes at whose multiples arrays begin
COUNT = "count"
# Of arrays in the file; bfloat16 and fixed16 are read as the integers they are kept in.
DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "fixed16": np.dtype("<u2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
}


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The numbers of the two models that decide how much is kept of a token.

    Args:
        vocab: Ids that both models share.
        d_student: Width of the student's head; of kind projected alone.
        d_teacher: Width of the teacher's head.
        teacher_rows: Rows of the teacher's head, of which those past `vocab` are padding.
        student_bias: The student's head has a bias.
    """

    vocab: int
    d_student: int | None = None
    d_teacher: int
    teacher_rows: int
    student_bias: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.vocab <= self.teacher_rows:
            raise ValueError(
                f"vocab={self.vocab}: must lie between 1 and the {self.teacher_rows} rows of the "
                "teacher's head"
            )

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Field:
    """One array of a blob.

    Args:
        name: Unique among the fields.
        dtype: One of `DTYPES`, or "bits17" for whole numbers of 17 bits without gaps.
        width: Numbers per token; "count" where the field of that name says how many.
        what: For who reads the manifest.
    """

    name: str
    dtype: str
    width: int | str = 1
    what: str

    @property
    def bits(self) -> int | None:
        """Of each number, where they are packed without gaps."""
        return int(self.dtype[4:]) if self.dtype.startswith("bits") else None

    def num_bytes(self, count: int) -> int:
        """That so many numbers take."""
        bits = self.bits
        return (
            count * DTYPES[self.dtype].itemsize if bits is None else num_packed_bytes(count, bits)
        )


def fields_of(stored: Stored, shapes: Shapes) -> list[Field]:
    """The arrays of a blob in their order.

    Raises:
        ValueError: What is to be kept is not decided yet, or these shapes cannot give it.
    """
    stored = stored.resolved()
    if stored.values is None:
        raise ValueError("values=None: say which dtype the teacher's hidden states have")
    if stored.kind == "hidden":
        what = "hidden states after the teacher's last norm"
        return [Field(name="hidden", dtype=stored.values, width=shapes.d_teacher, what=what)]
    if stored.k is not None and stored.k > shapes.vocab:
        raise ValueError(f"k={stored.k}: must be at most vocab={shapes.vocab}")
    exact = stored.values == "float32"
    nats = "float32" if exact else "fixed16"
    fields = [
        Field(name="target", dtype=nats, what="-log p of the target at temperature 1"),
        Field(name="top", dtype=_ids(shapes), what="the most likely id"),
    ]
    if shapes.teacher_rows > shapes.vocab:
        what = "the probability on rows of the head past vocab, at temperature 1"
        fields.append(Field(name="mass_out", dtype="float32" if exact else "float16", what=what))
    at = f"at temperature {stored.temperature}"
    entropy = f"of the teacher, in nats {at}"
    if stored.kind == "projected":
        return fields + _projected_fields(stored, shapes, at, entropy)
    if stored.kind == "top_k":
        assert stored.k is not None  # resolved
        width: int | str = stored.k
    else:
        longest = (stored.k or shapes.vocab) if stored.kind == "top_p" else MAX_LIST
        dtype = "uint16" if longest <= MAX_LIST else "uint32"
        fields.append(Field(name=COUNT, dtype=dtype, what="how many ids are listed"))
        width = COUNT
    if stored.kind == "sampled":
        fields.append(Field(name="entropy", dtype=nats, what=entropy))
    else:
        what = f"-log p of all ids that are not listed together, {at}"
        fields.append(Field(name="rest", dtype=nats, what=what))
    what = "-log of the weights" if stored.kind == "sampled" else "-log p"
    return [
        *fields,
        Field(name="ids", dtype=_ids(shapes), width=width, what="no id twice in a token's list"),
        Field(name="nats", dtype=nats, width=width, what=f"{what} of the ids, {at}"),
    ]


def _projected_fields(stored: Stored, shapes: Shapes, at: str, entropy: str) -> list[Field]:
    if shapes.d_student is None:
        raise ValueError("d_student=None: kind=projected needs the width of the student's head")
    assert stored.values is not None  # resolved
    fields = [Field(name="entropy", dtype="float32", what=entropy)]
    if shapes.student_bias:
        what = f"the mean bias of the student's head under the teacher {at}"
        fields.append(Field(name="mean_bias", dtype="float32", what=what))
    if stored.values == "int8":
        what = "what the integers of mean_row are multiplied with"
        fields.append(Field(name="scale", dtype="float32", what=what))
    what = f"the mean row of the student's head under the teacher {at}"
    return [
        *fields,
        Field(name="mean_row", dtype=stored.values, width=shapes.d_student, what=what),
    ]


def _ids(shapes: Shapes) -> str:
    return f"bits{num_bits(shapes.vocab)}"


def joined(fields: Sequence[Field], arrays: Mapping[str, bytes | memoryview]) -> bytes:
    """The blob of a row: the arrays of the fields in their order, each padded to 8 bytes."""
    parts: list[bytes | memoryview] = []
    for field in fields:
        array = arrays[field.name]
        size = array.nbytes if isinstance(array, memoryview) else len(array)
        parts += [array, bytes(-size % ALIGNMENT)]
    return b"".join(parts)


def split(
    fields: Sequence[Field], blob: bytes | memoryview, num_tokens: int
) -> dict[str, np.ndarray]:
    """The arrays of a blob as views of it; packed bits as the bytes they are.

    Raises:
        ValueError: The blob is not as long as these fields are for so many tokens.
    """
    arrays: dict[str, np.ndarray] = {}
    offset = 0
    for field in fields:
        if field.width == COUNT:
            counts = arrays.get(COUNT)
            count = 0 if counts is None else int(counts.sum())
        else:
            count = int(field.width) * num_tokens
        size = field.num_bytes(count)
        if offset + size > len(blob):
            break
        dtype = DTYPES["uint8"] if field.bits is not None else DTYPES[field.dtype]
        arrays[field.name] = np.frombuffer(
            blob, dtype=dtype, count=size // dtype.itemsize, offset=offset
        )
        offset += size + -size % ALIGNMENT
    if offset != len(blob) or len(arrays) < len(fields):
        raise ValueError(
            f"a blob of {len(blob)} bytes: {num_tokens} tokens of "
            f"{', '.join(field.name for field in fields)} take another number"
        )
    return arrays
