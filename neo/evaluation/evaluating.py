"""An evaluation: everything is checked and every row at hand before a model is loaded."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from neo.config import ConfigError
from neo.data.prompt import PromptEncoder, read_template
from neo.evaluation.answers import FOLDER, lines_of, write_lines
from neo.evaluation.candidates import Candidate, untrained_record
from neo.evaluation.harness_command import harness_command
from neo.evaluation.loading import Loaded, length_of, load, model_arguments
from neo.evaluation.measuring import (
    Measured,
    Unit,
    UnitFailed,
    load_unit,
    measure,
    room_problems,
)
from neo.evaluation.prompts import Question, answer, read_questions
from neo.evaluation.recorded import read_if_there, record_evaluation, recorded_numbers
from neo.evaluation.settings import Settings
from neo.evaluation.task_names import TASKS, TaskNames
from neo.results.records import command_line, provenance

Say = Callable[[str], None]
Show = Callable[[str, dict[str, float | int]], None]


@dataclass(kw_only=True)
class Evaluation:
    """What one command evaluates.

    Attributes:
        settings: Of every model.
        harness: Its version.
        include_paths: Folders of the user's task files.
        rerun: Whether what is recorded is evaluated again.
        say: Takes a line for the user.
        show: Takes the numbers of a unit for the user.
        failures: A sentence for each unit that has no numbers.
    """

    settings: Settings
    harness: str
    include_paths: Sequence[Path] = ()
    rerun: bool = False
    say: Say = print
    show: Show = lambda label, numbers: None
    failures: list[str] = field(default_factory=list)

    @cached_property
    def names(self) -> TaskNames:
        """The tasks that can be named."""
        return TaskNames(self.include_paths)

    def check(
        self,
        found: Sequence[Candidate],
        tasks: Sequence[str],
        prompts: str | None,
        problems: Sequence[str] = (),
    ) -> None:
        """Finds out what is to be done, and loads the rows of it.

        Raises:
            ConfigError: With everything that is wrong.
        """
        problems = list(problems)
        self.units: list[str] = []
        self.questions: list[Question] = []
        self.prompts = prompts
        try:
            self.units = self.names.units(tasks)
        except ValueError as error:
            problems += str(error).splitlines()
        try:
            self.questions = [] if prompts is None else read_questions(prompts)
        except ValueError as error:
            problems.append(str(error))
        for candidate in found:
            problems += self._template_problems(candidate)
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))
        self._loaded: dict[tuple[str, str], Unit | None] = {}
        for candidate in found:
            todo = [name for name in self.units if self._known(candidate, name) is None]
            units = [unit for name in todo if (unit := self._unit(candidate, name)) is not None]
            for unit in units:
                problems += room_problems(unit, self.settings, length_of(candidate))
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))

    def evaluate(self, candidate: Candidate) -> None:
        """Takes the numbers that the candidate's record lacks, unit by unit, each recorded at once.

        A unit that fails leaves the others alone.
        """
        todo = []
        for name in self.units:
            known = self._known(candidate, name)
            if known is not None:
                self.show(f"{candidate.label}, {name}: is recorded (rerun=true repeats it)", known)
            elif (unit := self._unit(candidate, name)) is not None:
                todo.append(unit)
        if not todo and not self.questions:
            return
        tokenizer = self._own_tokenizer(candidate)
        loaded = load(candidate, self.settings, tokenizer)
        for unit in todo:
            try:
                measured = measure(loaded, unit, self.settings, self.say)
            except UnitFailed as error:
                self.failures.append(f"{candidate.label}: {error}")
                continue
            self._keep(candidate, loaded, unit, measured)
            self.show(f"{candidate.label}, {unit.name}", dict(measured.numbers))
            self.say(self._command(candidate, unit, measured.batch_size, tokenizer))
        if self.questions:
            self._answer(candidate, loaded)

    def _known(self, candidate: Candidate, name: str) -> dict[str, float | int] | None:
        if self.rerun:
            return None
        record = read_if_there(candidate.folder)
        return recorded_numbers(record, name, self._deciding(candidate, name))

    def _deciding(self, candidate: Candidate, name: str) -> dict[str, Any]:
        """What the numbers of a unit depend on."""
        found = {"harness": self.harness, **self.settings.deciding()}
        if source := self.names.source_hash(name):
            found["source"] = source
        if metadata := self._metadata(candidate, name):
            found["metadata"] = metadata
        return found

    def _metadata(self, candidate: Candidate, name: str) -> dict[str, int]:
        return candidate.mini_rows if self.names.folder_of(name) == TASKS else {}

    def _unit(self, candidate: Candidate, name: str) -> Unit | None:
        """The unit with its rows, loaded once; None where that failed, which is told once."""
        metadata = self._metadata(candidate, name)
        key = (name, json.dumps(metadata))
        if key not in self._loaded:
            try:
                self._loaded[key] = load_unit(name, self.names.manager([name], metadata))
            except UnitFailed as error:
                self.failures.append(str(error))
                self._loaded[key] = None
        return self._loaded[key]

    def _keep(self, candidate: Candidate, loaded: Loaded, unit: Unit, measured: Measured) -> None:
        """Writes numbers and answers down."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        gpu = loaded.lm.device.type == "cuda"
        origin = provenance(torch.cuda.get_device_name(loaded.lm.device) if gpu else None)
        entry: dict[str, Any] = {
            "name": unit.name,
            "tasks": measured.tasks,
            "num_tasks": len(measured.tasks),
            "settings": self._deciding(candidate, unit.name),
            "batch_size": measured.batch_size,
            "dtype": str(loaded.lm.model.dtype).removeprefix("torch."),
            "cut_prompts": measured.num_cut,
            "seconds": measured.seconds,
            "evaluated_at": now,
            **{key: origin[key] for key in ("commit", "dirty", "device")},
        }
        entry = {key: value for key, value in entry.items() if value is not None}
        fresh = None
        if candidate.role != "student":
            fresh = untrained_record(
                candidate,
                {
                    "started_at": now,
                    "argv": command_line(sys.argv),
                    "num_parameters": loaded.lm.model.num_parameters(),
                    **origin,
                },
            )
        for task, samples in measured.samples.items():
            self._write(candidate, task, lines_of(samples))
        record_evaluation(candidate.folder, fresh, entry, measured.numbers)
        if measured.num_cut:
            self.say(f"{unit.name}: {measured.num_cut} prompts were too long and cut at their left")

    def _write(self, candidate: Candidate, name: str, lines: Sequence[Mapping[str, Any]]) -> Path:
        file = candidate.folder / FOLDER / candidate.role / f"{name}.jsonl"
        write_lines(file, lines)
        return file

    def _command(
        self, candidate: Candidate, unit: Unit, batch_size: int, tokenizer: Path | None
    ) -> str:
        if candidate.loads_as_run:
            return (
                f"{candidate.spec.quantization} weights are loaded as the run did, which the "
                "harness's own command cannot"
            )
        return "the same by the harness's own command:\n  " + harness_command(
            model_arguments(candidate, self.settings, tokenizer),
            unit.name,
            self.settings,
            batch_size=batch_size,
            metadata=self._metadata(candidate, unit.name),
            folder=self.names.folder_of(unit.name),
        )

    def _answer(self, candidate: Candidate, loaded: Loaded) -> None:
        """Answers the prompts, as they would be asked in training."""
        data = candidate.config["data"]
        try:
            encoder = PromptEncoder(
                loaded.lm.tokenizer, loaded.lm.max_length, data.get("chat_template")
            )
            lines = answer(loaded, encoder, self.questions, self.settings, self.say)
        except (ValueError, RuntimeError) as error:
            self.failures.append(f"{candidate.label}: prompts: {error}")
            return
        file = self._write(candidate, f"prompts-{Path(str(self.prompts)).stem}", lines)
        unanswered = sum("error" in line for line in lines)
        said = f", {unanswered} of them too long to be answered" if unanswered else ""
        self.say(f"{candidate.label}: {len(lines)} prompts{said}: {file}")

    def _template_problems(self, candidate: Candidate) -> list[str]:
        if not self.settings.chat and not self.questions:
            return []
        try:
            read_template(candidate.spec.tokenizer(), candidate.config["data"].get("chat_template"))
        except ValueError as error:
            return [
                f"{candidate.label}: {'chat=true' if self.settings.chat else 'prompts'}: {error}"
            ]
        return []

    def _own_tokenizer(self, candidate: Candidate) -> Path | None:
        """A folder with the tokenizer and the run's own template, where it needs to have that."""
        template = candidate.config["data"].get("chat_template")
        if not self.settings.chat or template is None:
            return None
        folder = candidate.folder / FOLDER / "tokenizer"
        tokenizer = candidate.spec.tokenizer()
        tokenizer.chat_template = read_template(tokenizer, template)
        tokenizer.save_pretrained(folder)
        return folder
