"""Where models and data meet: what only both together can tell, checked before a weight is read."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from neo.config import SPECS, ConfigError, build
from neo.data.datamodule import DataModule
from neo.data.files import MalformedFile
from neo.data.loader import TooManyBadRows
from neo.data.peek import peek
from neo.models.causal_lm import CausalLM
from neo.models.head import head_of
from neo.models.student import build_meta_student, inner, trained_parameters
from neo.models.tokenizers import num_token_ids, tokenizer_differences
from neo.models.variants import Variant
from neo.teachers.cached import CachedTeacher
from neo.teachers.online import OnlineTeacher
from neo.training.optim import AdamW


class CannotRun(ConfigError):
    """A config that is right, for which rows or memory are not; a sweep records it and goes on.

    Args:
        problems: Every one of them.
        status: That of the record.
    """

    def __init__(self, problems: list[str], status: str = "failed") -> None:
        super().__init__(problems)
        self.status = status


@dataclass(frozen=True)
class Meeting:
    """What is known of a run before a weight is read.

    Args:
        tokenizer: The student's; both models share its ids. None where it was not asked for.
        vocab: How many ids they share; what a head has beyond is padding.
        num_base_parameters: Of the student without its branch.
        num_parameters: Of the student.
        num_trainable_parameters: Of them, trained.
        num_teacher_parameters: 0 without a teacher.
        trained_tensors: Their names and shapes.
        notes: What a reader should know: padded heads, differences allowed.
    """

    tokenizer: Any
    vocab: int
    num_base_parameters: int
    num_parameters: int
    num_trainable_parameters: int
    num_teacher_parameters: int
    trained_tensors: dict[str, tuple[int, ...]]
    notes: list[str]


def build_specs(config: Mapping[str, Any]) -> dict[str, Any]:
    """What models, branch, loss, rows and optimizer are to be; no teacher is None."""
    specs = {key: build(config[key]) for key in SPECS}
    if specs["teacher"].path is None:
        specs["teacher"] = None
    return specs


def meet_all(
    config: dict[str, Any], specs: dict[str, Any], known: Meeting | None = None
) -> tuple[Meeting, DataModule]:
    """The models met and the rows opened, before a weight is read.

    Args:
        config: Of a run.
        specs: What it says.
        known: Of the same models, where they have met.

    Raises:
        ConfigError: With the problems of both; a `CannotRun` where only the rows are to blame.
    """
    problems: list[str] = []
    refused: type[ConfigError] = ConfigError
    student, max_length = specs["student"], specs["data"].max_length
    try:
        meeting = known or meet(student, specs["teacher"], specs["lora"], max_length)
        tokenizer = meeting.tokenizer
        problems += _problems_of_groups(specs["optim"], meeting)
    except ConfigError as error:
        problems += error.problems
        tokenizer = None
        with suppress(ValueError):
            tokenizer = student.tokenizer()
    try:
        data = _open_data(specs["data"], tokenizer, config)
    except (MalformedFile, TooManyBadRows) as error:
        refused = ConfigError if problems else CannotRun
        problems += str(error).splitlines()
    except ValueError as error:
        problems += error.problems if isinstance(error, ConfigError) else str(error).splitlines()
    else:
        if config["keep_best"] and data is not None and not data.num_val_rows:
            problems.append(
                f"keep_best={config['keep_best']}: the best checkpoints have the lowest val/loss, "
                "and there are no rows to validate on; use 0, or hold rows out (data.val_share)"
            )
    if problems:
        raise refused(problems)
    assert data is not None  # there is a tokenizer where the models have met
    return meeting, data


def meet_architectures(specs: Mapping[str, Any], known: Meeting | None = None) -> Meeting:
    """What can be told of a run without tokenizers and rows: the models and the branch met.

    Args:
        specs: What its config says.
        known: Of the same models, where they have met.

    Raises:
        ConfigError: With all problems.
    """
    student, teacher, lora = specs["student"], specs["teacher"], specs["lora"]
    meeting = known or meet(student, teacher, lora, specs["data"].max_length, tokenizers=False)
    if problems := _problems_of_groups(specs["optim"], meeting):
        raise ConfigError(problems)
    return meeting


def _problems_of_groups(optim: AdamW, meeting: Meeting) -> list[str]:
    """What is wrong with the optimizer's groups, over what will be trained."""
    try:
        optim.check(meeting.trained_tensors)
    except ValueError as error:
        return str(error).splitlines()
    return []


def meet(
    student: CausalLM,
    teacher: OnlineTeacher | CachedTeacher | None,
    lora: Variant,
    max_length: int,
    *,
    tokenizers: bool = True,
) -> Meeting:
    """Checks the student, the teacher and the branch against each other.

    Args:
        student: The base.
        teacher: None where there is none; a cache is looked at by `find_teaching`.
        lora: The branch.
        max_length: Of a sequence, in tokens.
        tokenizers: Ask them which ids are shared. Without, the shorter head says how many.

    Raises:
        ConfigError: With all problems.
    """
    problems: list[str] = []
    notes: list[str] = []
    models: dict[str, CausalLM] = {"student": student}
    if isinstance(teacher, CachedTeacher):
        teacher = None
    if teacher is not None:
        models["teacher"] = teacher
    asked, metas = {}, {}
    for role, model in models.items():
        try:
            if tokenizers:
                asked[role] = model.tokenizer()
            metas[role] = model.meta()
        except ValueError as error:
            problems.append(f"{role}.{error}")
    for role, meta in metas.items():
        longest = getattr(meta.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and max_length > longest:
            problems.append(
                f"data.max_length={max_length}: the {role} takes at most {longest} tokens"
            )
    if len(metas) == len(models):
        if tokenizers and teacher is not None:
            differences = tokenizer_differences(asked["student"], asked["teacher"])
            said = [f"the tokenizers of student and teacher differ: {d}" for d in differences]
            if teacher.allow_tokenizer_differences:
                notes += said
            else:
                problems += [f"teacher.path={teacher.path!r}: {line}" for line in said]
        heads, unknown = _rows_of_heads(models, metas)
        problems += unknown
        vocab = num_token_ids(asked["student"]) if tokenizers else min(heads.values(), default=0)
        for role, rows in heads.items():
            if rows < vocab:
                problems.append(
                    f"{role}.path={models[role].path!r}: its head has {rows} rows, "
                    f"the student's tokenizer {vocab} ids"
                )
            elif rows > vocab:
                notes.append(
                    f"the {role}'s head has {rows} rows, of which the first {vocab} are used"
                )
    trained: dict[str, nn.Parameter] = {}
    if "student" in metas:
        try:
            whole = build_meta_student(student, lora)
            trained = trained_parameters(whole)
            head_of(inner(whole))
        except ValueError as error:
            text = str(error)
            problems.append(text if text.startswith("lora.") else f"lora: {text}")
    if problems:
        raise ConfigError(problems)
    return Meeting(
        tokenizer=asked.get("student"),
        vocab=vocab,
        num_base_parameters=_count(metas["student"]),
        num_parameters=_count(whole),
        num_trainable_parameters=sum(p.numel() for p in trained.values()),
        num_teacher_parameters=_count(metas["teacher"]) if teacher is not None else 0,
        trained_tensors={name: tuple(p.shape) for name, p in trained.items()},
        notes=notes,
    )


def _rows_of_heads(
    models: Mapping[str, CausalLM], metas: Mapping[str, PreTrainedModel]
) -> tuple[dict[str, int], list[str]]:
    """How many ids each model has logits of, by role; and which models have no head we know."""
    rows, problems = {}, []
    for role, meta in metas.items():
        try:
            rows[role] = head_of(meta).weight.shape[0]
        except ValueError as error:
            problems.append(f"{role}.path={models[role].path!r}: {error}")
    return rows, problems


def _count(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def _open_data(spec: Any, tokenizer: Any, config: dict[str, Any]) -> DataModule | None:
    """The rows, opened: a missing or malformed file is found before a weight is read.

    Without a tokenizer (there was no student to take it from) only the files are looked at.

    Raises:
        ValueError: They cannot be read, or none of them can be trained on.
    """
    if tokenizer is None:
        spec.rows()
        return None
    data = DataModule(spec, tokenizer, seed=config["seed"])
    data.setup("fit")
    peek(data, 1)
    if data.num_rows is None and config["trainer"]["max_steps"] <= 0:
        raise ConfigError(
            ["trainer.max_steps=-1: must be set, the length of this data is not known"]
        )
    return data
