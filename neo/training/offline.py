"""Models that a plan knows by their architecture alone, where the hub cannot be reached."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neo.config import ConfigError, meant
from neo.models.architectures import ARCHITECTURES
from neo.models.causal_lm import CausalLM
from neo.teachers.online import OnlineTeacher


class _ByNumbers(CausalLM):
    """A model whose configuration is made of the numbers that its name stands for."""

    def config(self) -> Any:
        return ARCHITECTURES[str(self.path)].config()

    def tokenizer(self) -> Any:
        raise ValueError(f"path={self.path!r}: an architecture has no tokenizer")


@dataclass(frozen=True, kw_only=True)
class OfflineStudent(_ByNumbers, CausalLM):
    """A student that is a name of `ARCHITECTURES`; it can be planned and not loaded."""


@dataclass(frozen=True, kw_only=True)
class OfflineTeacher(_ByNumbers, OnlineTeacher):
    """A teacher that is a name of `ARCHITECTURES`; it can be planned and not loaded."""


def offline_specs(specs: Mapping[str, Any]) -> dict[str, Any]:
    """The specs, with models that lie on the hub replaced by their architectures.

    Folders and shipped models stay as they are: they are read without a network.

    Raises:
        ConfigError: The architecture of a name is not known here; names those that are.
    """
    problems, found = [], dict(specs)
    for role, kind in (("student", OfflineStudent), ("teacher", OfflineTeacher)):
        spec = specs[role]
        if spec is None or _lies_here(spec):
            continue
        if spec.path in ARCHITECTURES:
            found[role] = kind(**vars(spec))
        else:
            problems.append(
                f"{role}.path={spec.path!r}: there is no such folder, and without the hub its "
                f"architecture is not known{meant(spec.path, ARCHITECTURES)}; known are "
                f"{', '.join(ARCHITECTURES)}"
            )
    if problems:
        raise ConfigError(problems)
    return found


def _lies_here(spec: CausalLM) -> bool:
    path = str(spec.path)
    return path.startswith(("neo://", "~", "/", ".")) or Path(path).is_dir()
