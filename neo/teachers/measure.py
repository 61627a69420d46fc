"""From a teacher's hidden states to what is kept of each row, chunk by chunk."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from neo.losses.fused import CHUNK_GIB
from neo.losses.given import HiddenStates
from neo.losses.head import Head
from neo.losses.products import product_dtype, times
from neo.teachers.bits import pack
from neo.teachers.draws import Purpose, generator, sampled_lists
from neo.teachers.fields import COUNT, DTYPES, Field, Shapes, fields_of, joined
from neo.teachers.fixed_point import to_fixed16, to_fixed16_at_random, to_int8_at_random
from neo.teachers.lists import Lists, most_likely, nucleus
from neo.teachers.shards import PARTS, RowKey
from neo.teachers.stored import Stored

# Numbers of four bytes per token and id: logits, probabilities, and cumulated ones in float64.
_COPIES = 6


def measured(
    given: HiddenStates,
    targets: Int64[Tensor, " tokens"],
    stored: Stored,
    shapes: Shapes,
    rows: Sequence[tuple[RowKey, int]],
    student_head: Head | None = None,
    *,
    chunk_tokens: int | None = None,
) -> list[bytes]:
    """What is kept of rows whose supervised tokens these are: a blob each.

    Logits, probabilities and products have float32 or more; what is drawn or rounded at random
    depends on the seed and the row alone. The logits of all tokens never exist at once.

    Args:
        given: The teacher's.
        targets: The id each token must predict, in [0, vocab).
        stored: What to keep.
        shapes: Of the models.
        rows: With their numbers of tokens, in the order of the tokens.
        student_head: The frozen one; of kind projected alone.
        chunk_tokens: Tokens whose logits exist at a time; None: what suits the device.

    Raises:
        ValueError: Tokens, rows, heads and shapes do not go together, or the teacher gives no
            numbers.
    """
    stored = stored.resolved(str(given.hidden.dtype).removeprefix("torch."))
    fields = fields_of(stored, shapes)
    _check(given, targets, stored, shapes, rows, student_head)
    if stored.kind == "hidden":
        hidden = given.hidden.detach().to(getattr(torch, stored.values or "float32"))
        _check_numbers(hidden.isfinite().all(-1).cpu().numpy(), rows, stored)
        columns = {"hidden": _kept(hidden, fields[0])}
    else:
        columns = _columns(given, targets, stored, shapes, rows, student_head, chunk_tokens)
        # One logit that is no number makes the sum none, of which the target has its part.
        _check_numbers(~np.isnan(columns["target"]), rows, stored)
    blobs = []
    start = listed = 0
    for key, num_tokens in rows:
        tokens = slice(start, start + num_tokens)
        num_listed = int(columns[COUNT][tokens].sum()) if COUNT in columns else 0
        entries = slice(listed, listed + num_listed)
        arrays = {
            field.name: columns[field.name][entries if field.width == COUNT else tokens]
            for field in fields
            if field.name in columns
        }
        blobs.append(_blob(key, arrays, stored, fields))
        start, listed = tokens.stop, entries.stop
    return blobs


def mean_rows(
    p: Float[Tensor, "chunk vocab"], weight: Float[Tensor, "vocab d"]
) -> Float[Tensor, "chunk d"]:
    """`p @ weight`, in float32 or float64 and as exact as that, whatever the weight's dtype."""
    if p.is_cuda and weight.dtype == torch.bfloat16 and p.dtype == torch.float32:
        # A GPU multiplies halves far faster than floats, and three bfloat16 are one float32.
        total = None
        for _ in range(3):
            piece = p.to(torch.bfloat16)
            p = p - piece
            product = torch.mm(piece, weight, out_dtype=torch.float32)
            total = product if total is None else total.add_(product)
        assert total is not None
        return total
    if not p.is_cuda:
        return times(p, weight)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32, which has 11 bits
    try:
        return p @ weight.to(p.dtype)
    finally:
        torch.set_float32_matmul_precision(precision)


def _check(
    given: HiddenStates,
    targets: Tensor,
    stored: Stored,
    shapes: Shapes,
    rows: Sequence[tuple[RowKey, int]],
    student_head: Head | None,
) -> None:
    """Raise where the parts of a measurement do not go together."""
    weight = given.head.weight
    if tuple(weight.shape) != (shapes.teacher_rows, shapes.d_teacher):
        raise ValueError(
            f"given.head.weight: is of shape {tuple(weight.shape)}; must be "
            f"({shapes.teacher_rows}, {shapes.d_teacher}), as shapes has it"
        )
    num_tokens = sum(num for _, num in rows)
    if not len(given.hidden) == len(targets) == num_tokens:
        raise ValueError(
            f"rows: have {num_tokens} tokens, and there are {len(given.hidden)} hidden states and "
            f"{len(targets)} targets"
        )
    if stored.kind != "projected":
        return
    if student_head is None:
        raise ValueError("student_head=None: kind=projected is made with the student's head")
    if student_head.branch is not None or student_head.softcap is not None:
        raise ValueError("student_head: must be linear and without a branch for kind=projected")
    if len(student_head.weight) < shapes.vocab or student_head.weight.shape[1] != shapes.d_student:
        raise ValueError(
            f"student_head.weight: is of shape {tuple(student_head.weight.shape)}; must have at "
            f"least {shapes.vocab} rows of {shapes.d_student}"
        )
    if (student_head.bias is not None) != shapes.student_bias:
        raise ValueError(f"student_bias={shapes.student_bias}: the student's head says otherwise")


def _check_numbers(good: np.ndarray, rows: Sequence[tuple[RowKey, int]], stored: Stored) -> None:
    """Raise where a token's numbers are none, and name its row."""
    if good.all():
        return
    token = int(np.argmin(good))
    ends = np.cumsum([num for _, num in rows])
    key, num = rows[number := int(np.searchsorted(ends, token, side="right"))]
    raise ValueError(
        f"row {key.row_id} of {PARTS[key.part]}: the teacher gives no finite numbers for its "
        f"supervised token {token - int(ends[number]) + num}, and nothing of it is kept as "
        f"{stored.kind} in {stored.values}; a teacher that overflows needs another dtype "
        "(teacher.dtype)"
    )


@torch.no_grad()
def _columns(
    given: HiddenStates,
    targets: Tensor,
    stored: Stored,
    shapes: Shapes,
    rows: Sequence[tuple[RowKey, int]],
    student_head: Head | None,
    chunk_tokens: int | None,
) -> dict[str, np.ndarray]:
    """The numbers of all tokens before they are rounded, as float32, ids and counts."""
    device = given.hidden.device
    dtype = product_dtype(given.hidden)  # as the loss multiplies
    if chunk_tokens is None:
        gib, least = CHUNK_GIB.get(device.type, CHUNK_GIB["cuda"])
        chunk_tokens = max(least, int(gib * 2**30 / (_COPIES * 4 * shapes.vocab)))
    uniform = None
    if stored.kind == "sampled":
        assert stored.samples is not None  # resolved
        shape = stored.samples
        drawn = [generator(stored, key, Purpose.DRAW).random((num, shape)) for key, num in rows]
        uniform = np.concatenate([np.zeros((0, shape)), *drawn])
    parts: list[dict[str, Tensor]] = []
    with torch.autocast(device.type, enabled=False):
        head = given.head.to(dtype)
        student = None if student_head is None else student_head.to(student_head.weight.dtype)
        # One chunk at least, so that there are columns where there are no tokens.
        for start in range(0, max(1, len(targets)), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            draws = None if uniform is None else torch.from_numpy(uniform[chunk]).to(device)
            hidden = given.hidden[chunk].to(dtype)
            columns = _chunk(hidden, head, targets[chunk], stored, shapes, student, draws)
            parts.append({name: column.cpu() for name, column in columns.items()})
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def _chunk(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    stored: Stored,
    shapes: Shapes,
    student: Head | None,
    uniform: Tensor | None,
) -> dict[str, Tensor]:
    """The numbers of one chunk's tokens; lists one behind the other."""
    logits = head.logits(hidden, stop=shapes.vocab)
    log_z = logits.logsumexp(-1)
    at_target = logits.gather(-1, targets[:, None]).squeeze(-1)
    columns = {"target": log_z - at_target, "top": logits.argmax(-1)}
    if shapes.teacher_rows > shapes.vocab:
        outside = head.logits(hidden, shapes.vocab).logsumexp(-1)
        columns["mass_out"] = torch.sigmoid(outside - log_z)
    # From here on minus the most likely id's, so that no digits are lost on their size.
    x = logits.sub_(logits.amax(-1, keepdim=True))
    if stored.temperature != 1:
        x.div_(stored.temperature)
    p = x.exp()
    z = p.sum(-1, keepdim=True)
    p.div_(z)
    log_p = x.sub_(z.log())
    if stored.kind in ("projected", "sampled"):
        columns["entropy"] = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    if stored.kind == "projected":
        assert student is not None  # checked
        # They add up to 1 but for some 5e-8, which times a mean logit of 20 is seen in the loss.
        total = p.sum(-1, keepdim=True, dtype=_precise(p))
        columns["mean_row"] = mean_rows(p, student.weight[: shapes.vocab]) / total
        if student.bias is not None:
            mean_bias = p @ student.bias[: shapes.vocab].to(p.dtype)
            columns["mean_bias"] = mean_bias / total.squeeze(-1)
        return {name: _at_most_float32(column) for name, column in columns.items()}
    if stored.kind == "top_k":
        assert stored.k is not None  # resolved
        lists = most_likely(log_p, p, stored.k)
    elif stored.kind == "top_p":
        assert stored.p is not None  # resolved
        lists = nucleus(log_p, p, float(stored.p), stored.k)
    else:
        assert uniform is not None
        assert stored.proposal is not None  # resolved
        lists = sampled_lists(log_p, p, stored.k or 0, float(stored.proposal), uniform)
    return {
        name: _at_most_float32(column)
        for name, column in (columns | _listed(lists, stored)).items()
    }


def _listed(lists: Lists, stored: Stored) -> dict[str, Tensor]:
    """The columns of lists."""
    if stored.kind == "top_k":
        columns = {"ids": lists.ids, "nats": -lists.log_p}
    else:
        used = torch.arange(lists.ids.shape[1], device=lists.ids.device) < lists.counts[:, None]
        columns = {COUNT: lists.counts, "ids": lists.ids[used], "nats": -lists.log_p[used]}
    if lists.log_rest is not None:
        columns["rest"] = -lists.log_rest
    return columns


def _precise(p: Tensor) -> torch.dtype:
    return p.dtype if p.device.type == "mps" else torch.float64


def _at_most_float32(column: Tensor) -> Tensor:
    return column.float() if column.dtype == torch.float64 else column


def _blob(
    key: RowKey, arrays: dict[str, np.ndarray], stored: Stored, fields: Sequence[Field]
) -> bytes:
    """The blob of one row, of the numbers of its tokens."""
    if stored.values == "int8":
        random = generator(stored, key, Purpose.ROUND)
        row = arrays["mean_row"]
        uniform32 = random.random(row.shape, dtype=np.float32)
        arrays["mean_row"], arrays["scale"] = to_int8_at_random(row, uniform32)
    if stored.kind == "sampled" and stored.values == "fixed16":
        uniform = generator(stored, key, Purpose.ROUND).random(len(arrays["nats"]))
        arrays["nats"] = to_fixed16_at_random(arrays["nats"], uniform)
    return joined(fields, {field.name: _bytes(arrays[field.name], field) for field in fields})


def _bytes(numbers: np.ndarray, field: Field) -> bytes:
    """Numbers of a field in its dtype; those rounded at random have it already."""
    if field.bits is not None:
        return pack(numbers, field.bits)
    if field.dtype == "fixed16" and numbers.dtype != np.uint16:
        return to_fixed16(numbers).astype("<u2").tobytes()
    if field.dtype == "bfloat16" and numbers.dtype == np.float32:
        return _kept(torch.from_numpy(np.ascontiguousarray(numbers)), field).tobytes()
    return np.ascontiguousarray(numbers.astype(DTYPES[field.dtype], copy=False)).tobytes()


def _kept(values: Tensor, field: Field) -> np.ndarray:
    """Values in the dtype of a field, as numpy has it."""
    values = values.detach().to(getattr(torch, field.dtype)).cpu()
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16)
    return values.numpy()
