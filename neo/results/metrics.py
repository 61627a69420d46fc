"""Name, unit and direction of every number a run can report."""

import difflib
import re
from dataclasses import dataclass

NATS = "nats per supervised token"
SHARE = "share"


@dataclass(frozen=True)
class Metric:
    """What one number means and how a table prints it.

    Attributes:
        name: As logged and recorded.
        unit: Of the recorded value. A share lies in [0, 1].
        description: What the number is, in one sentence.
        better: Which end is the good one: "higher", "lower", or None where neither is.
        decimals: How many a table prints, after scaling.
    """

    name: str
    unit: str
    description: str
    better: str | None = None
    decimals: int = 3

    @property
    def scale(self) -> float:
        """Factor between the recorded and the printed value: shares are printed as %."""
        return 100.0 if self.unit == SHARE else 1.0

    @property
    def printed_unit(self) -> str:
        """Unit of the printed value, short; empty where the number has none."""
        return {SHARE: "%", NATS: "nats/token", "1": ""}.get(self.unit, self.unit)


_TABLE = (
    Metric("train/loss", NATS, "the weighted sum of ce and kd that is optimized", "lower", 4),
    Metric("train/ce", NATS, "cross-entropy against the data", "lower", 4),
    Metric("train/kd", NATS, "divergence between teacher and student", "lower", 4),
    Metric("train/penalty", NATS, "what a variant adds to the loss, such as KaSA's", "lower", 4),
    Metric("train/student_entropy", NATS, "entropy of the student's distribution", None, 4),
    Metric("train/teacher_target", SHARE, "teacher probability of the next token", None, 1),
    Metric("val/loss", NATS, "train/loss on the validation rows", "lower", 4),
    Metric("val/ce", NATS, "cross-entropy on the validation rows", "lower", 4),
    Metric("val/kd", NATS, "divergence on the validation rows", "lower", 4),
    Metric("val/student_entropy", NATS, "train/student_entropy on the validation rows", None, 4),
    Metric("val/teacher_target", SHARE, "train/teacher_target on the validation rows", None, 1),
    Metric("val/agreement", SHARE, "tokens where both models' top-1 is the same", "higher", 1),
    Metric("val/teacher_mass_out", SHARE, "teacher probability outside the shared ids", "lower", 3),
    Metric("train/lr", "1", "learning rate of the first parameter group", None, 6),
    Metric("train/grad_norm", "1", "norm of the gradient before clipping", None, 3),
    Metric("train/tokens", "tokens", "supervised tokens seen so far, all ranks", None, 0),
    Metric("train/skipped_steps", "steps", "left out, the loss or gradient no number", "lower", 0),
    Metric("perf/failed_checkpoints", "files", "that could not be written", "lower", 0),
    Metric("perf/tokens_per_s", "tokens/s", "supervised tokens per second per device", "higher", 0),
    Metric("perf/peak_mem_gib", "GiB", "largest memory held by one device", "lower", 2),
    Metric(
        "perf/init_rows", "rows", "training rows that the branch's start is computed from", None, 0
    ),
    Metric("perf/init_s", "s", "time of the branch's initialisation", "lower", 2),
    Metric("perf/init_peak_mem_gib", "GiB", "largest memory of the initialisation", "lower", 3),
    Metric("perf/init_rows", "rows", "training rows the initialisation was computed from", None, 0),
    Metric("cache/rows_read", "rows", "whose teacher targets were read", None, 0),
    Metric("cache/rows_computed", "rows", "that the teacher ran over, to be kept", "lower", 0),
    Metric("cache/wait_share", SHARE, "of the training time waiting for the cache", "lower", 2),
    Metric("cache/bytes_per_token", "B", "that a supervised token takes on the disk", "lower", 0),
    Metric("cache/mass_left_out", SHARE, "teacher probability that is not kept", "lower", 2),
    Metric("cache/kd_error", NATS, "kd off the online teacher's, on rows of the cache", None, 6),
    Metric("cache/gradient_error", "1", "norm of the gradient's error over its own", "lower", 6),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _TABLE}

# Numbers that are fields of a record and not entries of its metrics.
FIELDS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("num_parameters", "1", "parameters of the student", None, 0),
        Metric("num_trainable_parameters", "1", "parameters that are trained", None, 0),
        Metric("num_tokens", "tokens", "supervised tokens trained on", None, 0),
        Metric("seconds", "s", "wall-clock time of the run", "lower", 0),
        Metric("peak_memory_gib", "GiB", "largest memory held by one device", "lower", 2),
    )
}

_EVAL = re.compile(r"eval/(?P<task>[\w.+-]+)/(?P<metric>[\w.+-]+)(?:/(?P<kind>[\w.+-]+))?")
STDERR = "_stderr"  # behind a metric's name: its standard error, over the rows of the task
_EVAL_SHARES = (
    "exact_match", "acc", "acc_norm", "acc_bytes", "acc_mutual_info", "em", "f1", "mc1", "mc2",
    "pass_at_1", "pass_1",
)  # fmt: skip
_EVAL_HIGHER = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "mcc")
_EVAL_LOWER = (
    "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter",
    "wer",
)  # fmt: skip


def metric_info(name: str) -> Metric:
    """Return what the metric called `name` means.

    Evaluations are open-ended: `eval/<task>/<metric>` and `eval/<task>/<metric>/<kind>` are legal
    for every task; the third part is a kind of rows, or a filter of answers. `<metric>_stderr` is
    the standard error, in the metric's own unit. Metrics of the evaluation harness that are known
    shares have a direction; others are printed as they come.

    Raises:
        ValueError: `name` is neither listed nor an evaluation.

    Example:
        >>> metric_info("val/agreement").printed_unit
        '%'
        >>> metric_info("eval/mini/exact_match/dates").better
        'higher'
    """
    if name in METRICS:
        return METRICS[name]
    if match := _EVAL.fullmatch(name):
        return _eval_metric(name, **match.groupdict())
    near = difflib.get_close_matches(name, METRICS, n=3, cutoff=0.5)
    legal = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(METRICS)}"
    raise ValueError(f"unknown metric {name!r}: {legal} Legal too: eval/<task>/<metric>[/<kind>]")


def field_info(name: str) -> Metric:
    """Return what the number in the record's field `name` means.

    Raises:
        ValueError: A record has no number of that name.
    """
    if name not in FIELDS:
        raise ValueError(f"unknown record field {name!r}; legal: {', '.join(FIELDS)}")
    return FIELDS[name]


def quantity(name: str) -> tuple[Metric, bool]:
    """Return what `name` means, and whether it is a field of the record instead of a metric."""
    try:
        return field_info(name), True
    except ValueError as no_field:
        try:
            return metric_info(name), False
        except ValueError as no_metric:
            raise ValueError(f"{no_metric}; {no_field}") from None


def _eval_metric(name: str, task: str, metric: str, kind: str | None) -> Metric:
    plain = metric.removesuffix(STDERR)
    what = f"{plain} of {task}" + (f", of kind or behind filter {kind}" if kind else "")
    unit, decimals = (SHARE, 1) if plain in _EVAL_SHARES else ("1", 3)
    if plain != metric:
        return Metric(name, unit, f"standard error of {what}, over its rows", None, decimals)
    higher = plain in _EVAL_SHARES or plain in _EVAL_HIGHER
    better = "higher" if higher else "lower" if plain in _EVAL_LOWER else None
    return Metric(name, unit, what, better, decimals)


def stderr_name(name: str) -> str:
    """Return what the standard error of an evaluation's metric is called.

    Example:
        >>> stderr_name("eval/gsm8k/exact_match/strict-match")
        'eval/gsm8k/exact_match_stderr/strict-match'
    """
    start, task, metric, *kind = name.split("/")
    return "/".join([start, task, metric + STDERR, *kind])
