"""From stored rows back to what a teacher gives."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from neo.losses.given import Facts, Given, HiddenStates, Listed, Projected
from neo.losses.head import Head
from neo.teachers.bits import unpack
from neo.teachers.durable import CacheError
from neo.teachers.fields import COUNT, Field, Shapes, fields_of, split
from neo.teachers.fixed_point import from_fixed16
from neo.teachers.shards import StoredRow
from neo.teachers.stored import Stored

# numpy has no bfloat16: its bits travel as whole numbers.
TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
MATRICES = ("hidden", "mean_row")  # a row for each token, even of one number


def unpacked(rows: Sequence[StoredRow], stored: Stored, shapes: Shapes) -> dict[str, Tensor]:
    """The numbers of all tokens of some rows, in their order, on the CPU.

    Values stay in the dtype they are kept in where that is smaller than float32: `hidden`,
    `mean_row`. Lists are as wide as the longest: `ids` is int64 of shape (tokens, k), 0 where
    unused, and `log_p` float32, minus infinity where unused.

    Args:
        rows: As they were read.
        stored: What is kept, resolved; its `values` are decided.
        shapes: Of the models.

    Raises:
        CacheError: A row is not what these fields are.
    """
    fields = fields_of(stored, shapes)
    try:
        arrays = [split(fields, row.blob, row.num_tokens) for row in rows]
    except ValueError as error:
        raise CacheError(f"a row of this cache cannot be read: {error}") from error
    nums = [row.num_tokens for row in rows]
    tensors: dict[str, Tensor] = {}
    counts = None
    for field in fields:
        columns = [each[field.name] for each in arrays]
        if field.name == COUNT:
            counts = np.concatenate([np.zeros(0, dtype=np.int64), *columns]).astype(np.int64)
        elif field.name == "ids":
            sizes = _sizes(field, nums, counts, arrays)
            tensors["ids"] = _padded(_numbers(columns, sizes, field), field, counts, 0)
        elif field.name == "nats":
            log_p = -_nats(columns, field)
            tensors["log_p"] = _padded(torch.from_numpy(log_p), field, counts, -np.inf)
        elif field.bits is not None:
            tensors[field.name] = _numbers(columns, nums, field)
        elif field.name in ("target", "rest", "entropy"):
            tensors[field.name] = torch.from_numpy(_nats(columns, field))
        else:
            tensors[field.name] = _values(columns, field, sum(nums))
    return tensors


def given_of(tensors: Mapping[str, Tensor], stored: Stored, *, head: Head | None = None) -> Given:
    """What a teacher gives for the tokens whose numbers these are, wherever they lie.

    Args:
        tensors: Of `unpacked`.
        stored: What is kept.
        head: The teacher's, of kind hidden alone.

    Raises:
        ValueError: The kind is hidden and there is no head.
    """
    stored = stored.resolved()
    if stored.kind == "hidden":
        if head is None:
            raise ValueError("head=None: hidden states need the teacher's head")
        return HiddenStates(hidden=tensors["hidden"], head=head)
    mass_out = tensors.get("mass_out")
    facts = Facts(
        target=torch.exp(-tensors["target"]),
        top=tensors["top"],
        mass_out=None if mass_out is None else mass_out.float(),
    )
    temperature = float(stored.temperature)
    if stored.kind == "projected":
        mean_row = tensors["mean_row"].float()
        if stored.values == "int8":
            mean_row = mean_row * tensors["scale"][:, None]
        return Projected(
            mean_row=mean_row,
            mean_bias=tensors.get("mean_bias"),
            entropy=tensors["entropy"],
            temperature=temperature,
            facts=facts,
        )
    log_p = tensors["log_p"]
    log_rest = entropy = None
    if stored.kind == "sampled":
        entropy = tensors["entropy"]
    else:
        log_rest = -tensors["rest"]
        if stored.missing == "renormalise":
            log_rest = torch.full_like(log_rest, -torch.inf)
        if stored.missing == "renormalise" or stored.values == "fixed16":
            # Rounded probabilities add up to 1 only nearly, and divergences take that they do.
            log_z = torch.logaddexp(log_p.logsumexp(-1), log_rest)
            log_p, log_rest = log_p - log_z[:, None], log_rest - log_z
    return Listed(
        ids=tensors["ids"],
        log_p=log_p,
        log_rest=log_rest,
        entropy=entropy,
        temperature=temperature,
        facts=facts,
    )


def _sizes(
    field: Field,
    nums: Sequence[int],
    counts: np.ndarray | None,
    arrays: Sequence[Mapping[str, np.ndarray]],
) -> list[int]:
    """How many numbers of a field each row has."""
    if counts is None:
        return [num * int(field.width) for num in nums]
    return [int(each[COUNT].sum()) for each in arrays]


def _numbers(columns: Sequence[np.ndarray], sizes: Sequence[int], field: Field) -> Tensor:
    """Whole numbers that are packed row by row, one behind the other."""
    assert field.bits is not None
    numbers = np.empty(sum(sizes), dtype=np.int64)
    start = 0
    for column, size in zip(columns, sizes, strict=True):
        unpack(column, size, field.bits, numbers[start : start + size])
        start += size
    return torch.from_numpy(numbers)


def _nats(columns: Sequence[np.ndarray], field: Field) -> np.ndarray:
    """Numbers in nats, as float32."""
    empty = np.zeros(0, dtype=columns[0].dtype if columns else np.float32)
    joined = np.concatenate([empty, *columns])
    return from_fixed16(joined) if field.dtype == "fixed16" else joined.astype(np.float32)


def _values(columns: Sequence[np.ndarray], field: Field, num_tokens: int) -> Tensor:
    """Values in the dtype they are kept in, copied once."""
    dtype = TORCH_DTYPES[field.dtype]
    width = int(field.width)
    values = torch.empty(num_tokens * width, dtype=dtype)
    bits = values.view(torch.int16) if dtype == torch.bfloat16 else values
    into = bits.numpy()
    start = 0
    for column in columns:
        into[start : start + len(column)] = column.view(into.dtype)
        start += len(column)
    return values.view(num_tokens, width) if field.name in MATRICES else values


def _padded(flat: Tensor, field: Field, counts: np.ndarray | None, fill: float | int) -> Tensor:
    """Lists one behind the other, as rows of one width."""
    if counts is None:
        return flat.view(-1, int(field.width))
    lengths = torch.from_numpy(counts)
    longest = int(counts.max(initial=0))
    rows = torch.full((len(counts), longest), fill, dtype=flat.dtype)
    return rows.masked_scatter_(torch.arange(longest) < lengths[:, None], flat)
