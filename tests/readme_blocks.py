"""The code blocks of a page of Markdown, and what it takes to do what they say.

A block is run where the word `run` follows its language: three backticks and `bash run`, or
`python run`. All marked blocks of a section are run in order in one folder, so that an export finds
the run that was made before it. Words in capitals stand for what the reader has:

    ROWS   a file of rows
    DIR    the folder of a model
    RUN    the folder of the newest run; one is made where the section has made none
    NAME   the experiment of that run

Other words in capitals (OUT, MERGED) are folders that are made, and are taken as they are written.
"""

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
LANGUAGES = ("bash", "python")
PLACEHOLDERS = ("ROWS", "DIR", "RUN", "NAME")

# What makes a command of ours short, where rows or steps take time; one that starts processes of
# its own is checked and planned instead, and trains where the block is run as it is written.
SHORTENED = ("neo.train", "neo.plan")  # both take the config of a run
SMALL = ("trainer.max_steps=2", "trainer.enable_progress_bar=false")
SMALL_MINI = ("data.num_rows=64", "data.num_val_rows=16", "data.max_length=128")
ALSO_CHECKED = ("dry_run=true",)


@dataclass(frozen=True)
class Block:
    """A fenced block: the heading it stands under, its language, what follows that, its text."""

    section: str
    language: str
    marks: tuple[str, ...]
    text: str

    @property
    def runs(self) -> bool:
        return "run" in self.marks

    def commands(self) -> list[str]:
        """The lines of a shell block, continued ones joined, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def blocks_of(text: str) -> list[Block]:
    """Every fenced block of a page, in order.

    Raises:
        ValueError: A block is not closed, or is marked and in a language that cannot be run.
    """
    found: list[Block] = []
    section, opened, lines = "", None, []
    for line in text.splitlines():
        if opened is None and line.startswith("## "):
            section = line[3:].strip()
        elif opened is None and line.startswith("```"):
            opened, lines = line[3:].split(), []
        elif opened is not None and line.rstrip() == "```":
            language, *marks = opened or [""]
            block = Block(section, language, tuple(marks), "".join(f"{x}\n" for x in lines))
            if block.runs and language not in LANGUAGES:
                raise ValueError(f"{section}: a block of {language!r} cannot be run")
            found.append(block)
            opened = None
        elif opened is not None:
            lines.append(line)
    if opened is not None:
        raise ValueError(f"{section}: a block is not closed")
    return found


def marked(blocks: list[Block]) -> dict[str, list[Block]]:
    """The blocks that are run, by their section."""
    sections: dict[str, list[Block]] = {}
    for block in blocks:
        if block.runs:
            sections.setdefault(block.section, []).append(block)
    return sections


def shortened(arguments: list[str]) -> list[str]:
    """The arguments of a run, with what makes it short."""
    groups = {a.split("=")[0] for a in arguments}
    if {"--help", "-h", "--cfg"} & groups:
        return arguments
    own_data = bool(groups & {"data", "experiment", "scale", "pair"})
    many = any(re.match(r"trainer\.devices=(?!1$)", a) for a in arguments)
    # one job of a sweep: the first values of what is swept
    arguments = [re.sub(r"^([\w./]+=[^,\[({'\"]*),.*", r"\1", a) for a in arguments]
    starts_processes = many or bool(groups & {"-m", "--multirun", "experiment"})
    return [
        *arguments,
        *SMALL,
        *(() if own_data else SMALL_MINI),
        *(ALSO_CHECKED if starts_processes else ()),
    ]


@dataclass
class Reader:
    """Does what a section says, in a folder of its own.

    Args:
        folder: Where it is done.
        rows: What ROWS stands for.
        model: What DIR stands for.
        make_run: Makes a run in a folder, for a RUN that no command has made before.
        as_written: Whether commands run as they are, in processes of their own; else they are
            shortened and run in this one, where they are ours.
    """

    folder: Path
    rows: Path
    model: Path
    make_run: Callable[[Path], Any]
    as_written: bool = False
    names: dict[str, Any] = field(default_factory=dict)

    def do(self, block: Block) -> None:
        """Raises an AssertionError that names the command which did not end well."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            if block.language == "python":
                code = compile(self.filled(block.text), f"README.md, {block.section}", "exec")
                self.names.setdefault("__name__", "readme")
                exec(code, self.names)
                return
            for command in block.commands():
                self.run(self.filled(command))

    def run(self, command: str) -> None:
        words = shlex.split(command, comments=True)
        ours = words[:2] == ["python", "-m"] and words[2].startswith("neo.")
        if self.as_written or not ours:
            status = self.in_a_shell(command)
        else:
            arguments = shortened(words[3:]) if words[2] in SHORTENED else words[3:]
            status = in_this_process(words[2], arguments)
        assert status == 0, f"{command}: ended with status {status}"

    def in_a_shell(self, command: str) -> int:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=self.folder, env=environment
        ).returncode

    def filled(self, text: str) -> str:
        """The text with what the words in capitals stand for."""
        for word in PLACEHOLDERS:
            pattern = rf"(?<![\w.-]){word}(?![\w.-])"
            if re.search(pattern, text):
                text = re.sub(pattern, str(self.value(word)), text)
        return text

    def value(self, word: str) -> Path | str:
        if word == "ROWS":
            return self.rows
        if word == "DIR":
            return self.model
        run = self.newest_run()
        return run if word == "RUN" else run.parent.name

    def newest_run(self) -> Path:
        def found() -> list[Path]:
            records = self.folder.glob("runs/*/*/record.json")
            return sorted(records, key=lambda path: path.stat().st_mtime_ns)

        if not found():
            self.make_run(self.folder / "runs" / "made" / "first")
        return found()[-1].parent


def in_this_process(module: str, arguments: list[str]) -> int:
    """The exit status of `python -m module ...`."""
    with pytest.MonkeyPatch.context() as patch:
        command = importlib.import_module(module)
        patch.setattr(sys, "argv", [str(command.__file__), *arguments])
        try:
            status = command.main()
        except SystemExit as end:
            status = end.code
    if status is None:
        return 0
    return status if isinstance(status, int) else 1  # a message
