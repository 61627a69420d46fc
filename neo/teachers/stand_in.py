"""What a cache would give for some tokens, without its numbers: for plans."""

import torch

from neo.losses.given import Given
from neo.losses.head import Head
from neo.teachers.fields import COUNT, Shapes, fields_of
from neo.teachers.stored import Stored
from neo.teachers.unpack import TORCH_DTYPES, given_of

# Ids that a list of open length is taken to have.
LISTED = 64


def stand_in(stored: Stored, shapes: Shapes, num_tokens: int) -> Given:
    """Tensors of the shapes and dtypes of what is read, of any content.

    Args:
        stored: What is kept, resolved; its `values` are decided.
        shapes: Of the models.
        num_tokens: Supervised ones.
    """
    longest = min(shapes.vocab, (stored.k or 0) + (stored.samples or 0) or LISTED)
    tensors: dict[str, torch.Tensor] = {}
    for field in fields_of(stored, shapes):
        if field.name == COUNT:
            continue
        if field.name == "ids":
            tensors["ids"] = torch.zeros(num_tokens, longest, dtype=torch.int64)
        elif field.name == "nats":
            tensors["log_p"] = torch.zeros(num_tokens, longest)
        elif field.name in ("mean_row", "hidden"):
            shape = (num_tokens, int(field.width))
            tensors[field.name] = torch.zeros(shape, dtype=TORCH_DTYPES[field.dtype])
        else:
            dtype = torch.int64 if field.bits is not None else torch.float32
            tensors[field.name] = torch.zeros(num_tokens, dtype=dtype)
    head = None
    if stored.kind == "hidden":
        dtype = tensors["hidden"].dtype
        head = Head(weight=torch.zeros(shapes.teacher_rows, shapes.d_teacher, dtype=dtype))
    return given_of(tensors, stored, head=head)
