"""Names of tasks: what the harness knows by them, and which are evaluated by themselves."""

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from neo.evaluation.harness import quiet_harness

TASKS = Path(__file__).parent / "tasks"
SETS = {
    "mini_lab": "the mini-lab's test rows, answered and chosen; no network",
    "paper_general": "the paper's general tasks: ARC, C-Eval, CMMLU, MMLU, HellaSwag, WinoGrande",
    "paper_math": "the paper's maths tasks: GSM8K, ASDiv, SVAMP, MAWPS, MathQA",
}


class TaskNames:
    """The tasks that can be named.

    Args:
        include_paths: Folders of the user's own task files, which come before the harness's.

    Raises:
        ValueError: One of the folders is not there, or holds no task.
    """

    def __init__(self, include_paths: Sequence[Path] = ()) -> None:
        for folder in include_paths:
            if not folder.is_dir():
                raise ValueError(f"include_path={str(folder)!r}: there is no such folder")
            if not _manager([folder], with_defaults=False).all_tasks:
                raise ValueError(f"include_path={str(folder)!r}: holds no task file (*.yaml)")
        self.folders = [TASKS, *include_paths]
        self._small = _manager(self.folders, with_defaults=False)
        self._whole: TaskManager | None = None

    def units(self, names: Sequence[str]) -> list[str]:
        """The names that are evaluated one by one: tasks, and groups with numbers of their own.

        A set or tag that only lists others stands for them, so that what fails in one loses nothing
        of another, and numbers do not depend on what was evaluated beside them.

        Raises:
            ValueError: With every unknown name, and what may have been meant.
        """
        problems, found = [], []
        for name in names:
            matched = self._matching(name)
            if not matched:
                problems.append(self._unknown(name))
            for match in matched:
                found += list(self._parts(match))
        if problems:
            raise ValueError("\n".join(problems))
        return list(dict.fromkeys(found))

    def manager(self, units: Sequence[str], metadata: Mapping[str, Any]) -> TaskManager:
        """What loads these units; the harness's own files are read only where they are needed."""
        small = all(self._is_small(unit) for unit in units)
        known = self._small if small else self._all()
        return _reused(known, metadata)

    def folder_of(self, unit: str) -> Path | None:
        """The folder besides the harness's own that the unit's file lies in."""
        entry = self._entry(unit)
        path = None if entry is None else entry.yaml_path
        return next((f for f in self.folders if path and path.is_relative_to(f)), None)

    def source_hash(self, unit: str) -> str | None:
        """A hash of the files beside the unit's; None for the harness's, named by its version."""
        folder = self.folder_of(unit)
        if folder is None:
            return None
        digest = hashlib.sha256()
        for file in sorted(folder.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
        return digest.hexdigest()[:16]

    def _is_small(self, unit: str) -> bool:
        entry = self._small.task_index.get(unit)
        if entry is None:
            return False
        members = (entry.cfg or {}).get("task")
        if not isinstance(members, list):
            return True
        return all(isinstance(member, str) and self._is_small(member) for member in members)

    def _all(self) -> TaskManager:
        if self._whole is None:
            self._whole = _manager(self.folders, with_defaults=True)
        return self._whole

    def _entry(self, name: str) -> Any:
        small = self._small.task_index.get(name)
        return small if small is not None else self._all().task_index.get(name)

    def _matching(self, name: str) -> list[str]:
        if not any(sign in name for sign in "*?["):
            return [name] if self._entry(name) is not None else []
        return [known for known in self._all().all_tasks if fnmatchcase(known, name)]

    def _parts(self, name: str) -> Iterator[str]:
        entry = self._entry(name)
        cfg = entry.cfg or {}
        members = cfg.get("task")
        if entry.kind.name == "TAG":
            for member in sorted(entry.tags):
                yield from self._parts(member)
        elif (
            entry.kind.name == "GROUP"
            and not cfg.get("aggregate_metric_list")
            and isinstance(members, list)
            and all(isinstance(member, str) for member in members)
        ):
            for member in members:
                if self._entry(member) is None:
                    raise ValueError(f"tasks: {name!r} names {member!r}, which is not known")
                yield from self._parts(member)
        else:
            yield name

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._all().all_tasks, n=3, cutoff=0.6)
        meant = f" (did you mean {', '.join(near)}?)" if near else ""
        return (
            f"tasks: {name!r} is no task, group or tag that is known{meant}; tasks=list shows the "
            "sets, `lm_eval ls tasks` all, and include_path=DIR adds your own"
        )


def listing() -> str:
    """What sets there are, and where their files lie."""
    lines = [f"  {name:15}{said}" for name, said in SETS.items()]
    return "\n".join(
        [
            "sets:",
            *lines,
            f"their files: {TASKS}",
            f"by the harness's own command: lm_eval run --tasks mini_lab --include_path {TASKS}",
            "every other task, group and tag: lm_eval ls tasks",
        ]
    )


def _manager(folders: Sequence[Path], *, with_defaults: bool) -> TaskManager:
    with quiet_harness():
        return TaskManager(include_path=list(folders), include_defaults=with_defaults)


def _reused(known: TaskManager, metadata: Mapping[str, Any]) -> TaskManager:
    """The same index with other metadata: to read all files of the harness takes seconds."""
    manager = TaskManager(include_defaults=False, metadata=dict(metadata))
    for name, value in vars(known).items():
        if name not in ("metadata", "_factory"):
            setattr(manager, name, value)
    return manager
