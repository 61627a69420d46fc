"""What a cache costs a run: its loss and gradient against the online teacher's, on a few rows.

The rows are read back from the disk. neo.cache compares them where training begins, at the
student's base; a run that fills a cache, at the student it has trained.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from neo.data.packing import Batch, RowReport, collate
from neo.data.prompt import IGNORE, Example
from neo.data.segments import content_of
from neo.losses import divergences
from neo.losses.distillation import Distillation, Divergence
from neo.losses.fused import fused_sums
from neo.losses.given import Given, HiddenStates, Listed, of_tokens
from neo.losses.head import Head
from neo.losses.products import product_dtype, wide
from neo.teachers.durable import CacheError
from neo.teachers.head_file import read_head
from neo.teachers.shards import RECORD, RowKey
from neo.teachers.store import CacheFolder
from neo.teachers.unpack import given_of, unpacked
from neo.training.token_loss import Outputs

NUM_ROWS = 16
OF_STREAM = 512  # so many of a stream's first rows are read again at most
HIDDEN_TEMPERATURES = (1.0, 2.0)  # of a cache that serves all
LOGITS = ("student_logits", "teacher_logits")  # what makes a function a divergence
TOKENS = 1024  # that are compared at a time
LOGITS_AT_A_TIME = 128  # tokens
Certificate = dict[str, Any]


def certified_divergences() -> dict[str, Divergence]:
    """Every divergence of `neo.losses.divergences` by its name, its keywords as they are.

    Example:
        >>> list(certified_divergences())[:3]
        ['forward_kl', 'reverse_kl', 'jsd']
    """
    return {
        name: function
        for name, function in vars(divergences).items()
        if inspect.isfunction(function)
        and function.__module__ == divergences.__name__
        and tuple(inspect.signature(function).parameters)[:2] == LOGITS
    }


def certified_keys(
    cache: CacheFolder, num: int = NUM_ROWS, first: int | None = None
) -> list[RowKey]:
    """The rows that a certificate is taken of: spread evenly over those of part 0.

    Args:
        cache: An opened one.
        num: At most so many.
        first: Only of rows with ids below; of a stream, which is read again up to there.
    """
    every = cache.keys()
    keys = sorted(k for k in every if k.part == 0 and (first is None or k.row_id < first))
    places = np.unique(np.linspace(0, len(keys) - 1, min(num, len(keys))).astype(np.int64))
    return [keys[place] for place in places.tolist()]


def bytes_per_token(cache: CacheFolder) -> float:
    """What a supervised token takes on the disk, the records and the teacher's head included."""
    manifest = cache.manifest
    if manifest.finished:
        size = sum(one.num_bytes + one.rows * RECORD.itemsize for one in manifest.shards)
        size += sum(known["bytes"] for known in manifest.files.values())
        tokens = manifest.counts["tokens"]
    else:
        files = [file for pattern in ("*.bin", "*.index") for file in cache.path.glob(pattern)]
        size = sum(file.stat().st_size for file in files)
        tokens = sum(map(cache.num_tokens, cache.keys()))
    return float(f"{size / max(1, tokens):.6g}")


@dataclass(frozen=True)
class Online:
    """What both models give for all supervised tokens of some rows, row by row.

    Args:
        examples: The rows, of part 0.
        student: Without a branch of its head.
        teacher: As it is when it runs beside the student.
        targets: On the device of both.
    """

    examples: Sequence[Example]
    student: Outputs
    teacher: Outputs
    targets: Int64[Tensor, " tokens"]


def run_both(
    examples: Sequence[Example],
    student: Callable[[Batch], Outputs],
    teacher: Callable[[Batch], Outputs],
    pad_id: int,
) -> Online:
    """Runs both models, under the precision that a run trains in.

    Args:
        examples: Of rows of part 0; at least one.
        student: What it gives for the supervised tokens of a batch.
        teacher: What the teacher gives for them.
        pad_id: Fills sequences up.
    """
    hidden: tuple[list[Tensor], list[Tensor]] = ([], [])
    outputs: list[Outputs] = []
    targets = []
    for example in examples:  # one at a time takes no more room than training does
        batch = collate([[example]], pad_id, False, RowReport())
        with torch.no_grad():
            both = [model(batch) for model in (student, teacher)]
        for states, each in zip(hidden, both, strict=True):
            states.append(each.hidden)
        outputs = outputs or both  # a head that is gathered is there once, not once a row
        targets.append(batch.targets[batch.targets != IGNORE])
    of_student, of_teacher = (
        replace(one, hidden=torch.cat(states), branch=None)
        for one, states in zip(outputs, hidden, strict=True)
    )
    together = torch.cat(targets).to(of_student.hidden.device)
    return Online(examples, of_student, of_teacher, together)


def certify(
    cache: CacheFolder, run: Online, *, vocab: int, head_changes: bool = False
) -> Certificate:
    """Compares loss and gradient from the cache with those of the online teacher, at kd_ratio 1.

    Called under the precision that a run trains in. In half precision the errors hold what another
    packing of the rows changes as well, for which every online run has the same.

    Args:
        cache: An opened one, which has the rows.
        run: What both models give for them.
        vocab: Ids that both models share.
        head_changes: The student's head will train or have a branch.

    Raises:
        CacheError: A row is damaged, or is of other tokens than the example.
    """
    examples, targets = run.examples, run.targets
    hidden, head = run.student.hidden.detach(), run.student.head
    hidden = hidden.to(wide(hidden.dtype))
    online = HiddenStates(hidden=run.teacher.hidden, head=run.teacher.head)
    cached = _from_cache(cache, examples, hidden.device, online.head)
    stored = cache.manifest.stored
    temperatures = HIDDEN_TEMPERATURES if stored.kind == "hidden" else (stored.temperature,)
    measured = []
    for name, divergence in certified_divergences().items():
        for temperature in temperatures:
            spec = Distillation(divergence=divergence, kd_ratio=1.0, temperature=temperature)
            if stored.given_refusals(spec, head_changes=head_changes, softcap=head.softcap):
                continue
            compared: dict[str, Any] = {"divergence": name, "temperature": temperature}
            kinds = (online, cached)
            measured.append(compared | _compared(hidden, head, kinds, targets, spec, vocab))
    found: Certificate = {"rows": len(examples), "tokens": len(targets), "measured": measured}
    if isinstance(cached, Listed):
        listed = _mass_listed(online, cached, vocab)
        # of a sample every id stands for those that were not drawn: in expectation nothing is out
        left_out = 0.0 if stored.kind == "sampled" else 1 - listed
        found |= {"mass_listed": _short(listed), "mass_left_out": _short(left_out)}
    return found


def _from_cache(
    cache: CacheFolder, examples: Sequence[Example], device: torch.device, teacher_head: Head
) -> Given:
    """What the cache gives for the tokens of the rows; one that grows has no head of its own."""
    rows = []
    for example in examples:
        assert example.row_id is not None
        row = cache.read(RowKey(0, example.row_id))
        if row.content != content_of(example.input_ids, example.targets):
            raise CacheError(
                f"{cache.path}: row {example.row_id} is of other tokens than this run's row "
                f"{example.row_id}; write the cache anew"
            )
        rows.append(row)
    manifest = cache.manifest
    tensors = unpacked(rows, manifest.stored, manifest.shapes)
    head = None
    if manifest.stored.kind == "hidden":
        head = read_head(cache, device) if manifest.finished else teacher_head
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    return given_of(on_device, manifest.stored, head=head)


def _kd(
    hidden: Float[Tensor, "tokens d"],
    head: Head,
    given: Given,
    targets: Int64[Tensor, " tokens"],
    spec: Distillation,
    vocab: int,
) -> tuple[float, Float[Tensor, "tokens d"]]:
    """The divergence, summed over tokens, and the gradient of the hidden states."""
    leaf = hidden.clone().requires_grad_()
    frozen = replace(head, weight=head.weight.detach(), branch=None)
    with torch.enable_grad():
        sums = fused_sums(leaf, frozen, given, targets, spec, vocab)
    sums.loss.backward()
    assert leaf.grad is not None
    assert sums.kd is not None
    return sums.kd.item(), leaf.grad.double()


def _compared(
    hidden: Float[Tensor, "tokens d"],
    head: Head,
    given: tuple[Given, Given],
    targets: Int64[Tensor, " tokens"],
    spec: Distillation,
    vocab: int,
) -> dict[str, float | None]:
    """Errors of the cached loss; those of the gradient relative to the root mean square token's.

    Args:
        hidden: Of the student.
        head: Of the student.
        given: By the teacher online, and from the cache.
        targets: Of the tokens.
        spec: The loss.
        vocab: Ids that both models share.
    """
    kd, other = 0.0, 0.0
    sizes, distances = [], []
    for start in range(0, len(targets), TOKENS):
        part = slice(start, start + TOKENS)
        (own_kd, gradient), (own_other, other_gradient) = (
            _kd(hidden[part], head, of_tokens(each, part), targets[part], spec, vocab)
            for each in given
        )
        kd, other = kd + own_kd / len(targets), other + own_other / len(targets)
        sizes.append(gradient.norm(dim=-1))
        distances.append((other_gradient - gradient).norm(dim=-1))
    off = torch.cat(distances) / torch.cat(sizes).norm()
    return {
        "kd": _short(kd),
        "kd_error": _short(other - kd),
        "gradient_error": _short(off.norm().item()),
        "largest_gradient_error": _short(off.max().item() * math.sqrt(len(off))),
    }


def _mass_listed(teacher: HiddenStates, cached: Listed, vocab: int) -> float:
    """How much of the online teacher's probability the listed ids have, mean over tokens."""
    total, dtype = 0.0, product_dtype(teacher.hidden)
    head = teacher.head.to(dtype)
    with torch.autocast(teacher.hidden.device.type, enabled=False):  # logits are float32
        for start in range(0, len(cached.ids), LOGITS_AT_A_TIME):
            part = slice(start, start + LOGITS_AT_A_TIME)
            logits = head.logits(teacher.hidden[part].to(dtype), stop=vocab) / cached.temperature
            p = logits.softmax(-1).gather(-1, cached.ids[part].long())
            total += p.masked_fill(cached.log_p[part] == -math.inf, 0.0).sum().item()
    return total / len(cached.ids)


def _short(number: float) -> float | None:
    """Six digits, which JSON keeps; None for what is no number."""
    return float(f"{number:.6g}") if math.isfinite(number) else None


def certificate_lines(certificate: Mapping[str, Any]) -> list[str]:
    """What a certificate says, in a few lines for a terminal."""
    head = f"certificate, from {certificate['rows']} rows of {certificate['tokens']:,} tokens"
    if (per_token := certificate.get("bytes_per_token")) is not None:
        head += f": {per_token:,.1f} bytes a token"
    if "mass_left_out" in certificate:
        head += (
            f", {100 * certificate['mass_listed']:.3g} % of the teacher's mass listed, "
            f"{100 * certificate['mass_left_out']:.3g} % left out"
        )
    lines = [head]
    for one in certificate["measured"]:
        kd, off, gradient, largest = (
            "infinite" if one[key] is None else f"{one[key]:.3g}"
            for key in ("kd", "kd_error", "gradient_error", "largest_gradient_error")
        )
        lines.append(
            f"  {one['divergence']} at T={one['temperature']:g}: kd {kd}, off by {off}; gradient "
            f"off by {gradient} of itself ({largest} at one token)"
        )
    return lines


def certificate_metrics(
    certificate: Mapping[str, Any] | None, loss: Distillation
) -> dict[str, float]:
    """The numbers of a certificate that a run's record has: those of its own divergence.

    Nothing is said of a divergence, keywords or temperature that was not certified.
    """
    if not certificate:
        return {}
    own: Mapping[str, Any] = next(_own(certificate, loss), {})
    numbers = {
        "cache/bytes_per_token": certificate.get("bytes_per_token"),
        "cache/mass_left_out": certificate.get("mass_left_out"),
        "cache/kd_error": own.get("kd_error"),
        "cache/gradient_error": own.get("gradient_error"),
    }
    return {name: number for name, number in numbers.items() if number is not None}


def _own(certificate: Mapping[str, Any], loss: Distillation) -> Iterator[Mapping[str, Any]]:
    function, keywords = loss.divergence, {}
    if isinstance(function, functools.partial):
        keywords, function = function.keywords, function.func
    name = getattr(function, "__name__", "")
    if certified_divergences().get(name) is not function:
        return
    defaults = {key: p.default for key, p in inspect.signature(function).parameters.items()}
    if all(defaults[key] == value for key, value in keywords.items()):
        for one in certificate["measured"]:
            if (one["divergence"], one["temperature"]) == (name, loss.temperature):
                yield one
