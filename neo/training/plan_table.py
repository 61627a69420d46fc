"""The plan of a run in words: memory by part, FLOPs, traffic."""

from rich.table import Table

from neo.models.traffic import Traffic
from neo.training.device_plan import GIB, Plan
from neo.training.meet import Meeting

# In the order of a table.
ORDER = (
    "student", "adapter", "teacher", "gradients", "optimizer", "activations",
    "teacher activations", "loss chunk", "backward", "temporaries", "gathered units",
    "reduction buffers", "batch",
)  # fmt: skip
MEANING = {
    "student": "weights of the base, or all of them",
    "adapter": "weights of the branch",
    "teacher": "its weights",
    "gradients": "of what is trained",
    "optimizer": "two moments of what is trained",
    "activations": "of the student, kept for the backward pass",
    "teacher activations": "while its forward pass lasts",
    "loss chunk": "logits and what is made of them; the gradient of hidden states",
    "backward": "gradients on their way, and activations computed again",
    "temporaries": "of the optimizer's update",
    "gathered units": "of FSDP: the layer in use, the next one, what lies around them",
    "reduction buffers": "gradients laid out to be reduced",
    "batch": "token ids, positions, targets",
    "other": "",
}


def plan_table(plan: Plan, title: str) -> Table:
    """Memory of one device by part: at the fullest moment, and each part when it has most."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("part", style="bold")
    table.add_column("GiB", justify="right")
    table.add_column("at most", justify="right")
    table.add_column("what")
    for part in parts_of(plan):
        at_peak, most = plan.parts.get(part, 0), plan.most[part]
        table.add_row(part, f"{at_peak / GIB:.3f}", f"{most / GIB:.3f}", MEANING.get(part, ""))
    table.add_row("total", f"{plan.gib:.3f}", "", f"in the {plan.fullest}")
    return table


def short(number: float) -> str:
    """A number in three digits or all before the point.

    Example:
        >>> short(0.012345), short(12.345), short(12345.6)
        ('0.0123', '12.3', '12,346')
    """
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def parts_of(plan: Plan) -> list[str]:
    """The parts that a plan has, in the order of a table."""
    most = plan.most
    return [*(p for p in ORDER if p in most), *(p for p in most if p not in ORDER)]


def parameters_line(meeting: Meeting) -> str:
    """How many parameters student and teacher have, and how many are trained, in one line."""
    base, trained = meeting.num_base_parameters, meeting.num_trainable_parameters
    branch = meeting.num_parameters - base
    student = f"student {base:,}" + (f" and {branch:,} of its branch" if branch else "")
    teacher = f"{meeting.num_teacher_parameters:,}" if meeting.num_teacher_parameters else "none"
    share = 100 * trained / meeting.num_parameters
    return f"{student}; trained {trained:,} ({share:.3g} %); teacher {teacher}"


def memory_line(plan: Plan) -> str:
    """The memory of one device in one line."""
    largest = sorted(plan.parts.items(), key=lambda item: -item[1])
    shown = ", ".join(
        f"{part} {short(size / GIB)}" for part, size in largest if size >= plan.num_bytes / 50
    )
    which = "each" if plan.placement.num_processes > 1 else "the"
    where = f"{short(plan.gib)} GiB on {which} device"
    return f"{where}, most in the {plan.fullest}" + (f": {shown}" if shown else "")


def compute_line(plan: Plan) -> str:
    """The FLOPs of a step in one line."""
    return (
        f"{short(plan.flops_per_step / 1e12)} TFLOP a step and device, "
        f"{short(plan.model_flops_per_token / 1e9)} GFLOP a token"
    )


def traffic_line(plan: Plan) -> str | None:
    """The bytes that a device sends in a step, in one line; None where there is but one."""
    if plan.placement.num_processes == 1:
        return None
    step, micro = plan.traffic.step, plan.traffic.micro_batch
    text = f"{short(step.moved / GIB)} GiB sent a step and device: {_kinds(step)}"
    if plan.traffic.num_micro_batches > 1:
        text += f"; of each micro-batch {short(micro.moved / GIB)}"
    return text


def _kinds(traffic: Traffic) -> str:
    kinds = {
        "all-gather": traffic.all_gather,
        "reduce-scatter": traffic.reduce_scatter,
        "all-reduce": traffic.all_reduce,
    }
    return ", ".join(f"{kind} of {short(size / GIB)}" for kind, size in kinds.items() if size)
