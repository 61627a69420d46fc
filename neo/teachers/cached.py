"""A teacher that has run: a cache, in place of a model."""

from dataclasses import dataclass
from pathlib import Path

from neo.teachers.manifest import find_manifest
from neo.teachers.online import OnlineTeacher
from neo.teachers.store import CacheFolder


@dataclass(frozen=True, kw_only=True)
class CachedTeacher:
    """A cache that `python -m neo.cache` has written, or runs with `teacher=auto`.

    Args:
        path: Its folder.
        of: The teacher that it must be of, as its path; None takes the one that it says.
    """

    path: str
    of: str | None = None

    def open(self) -> CacheFolder:
        """The cache.

        Raises:
            CacheError: There is none, or it is damaged or not finished.
        """
        return CacheFolder.open(self.path)

    def identity(self) -> dict[str, str]:
        """The cache's name, and what the teacher was."""
        manifest = find_manifest(Path(self.path))
        known = {key: str(value) for key, value in manifest.identity["teacher"].items()}
        return {"cache": manifest.name, "teacher": known.pop("path"), **known}

    def teacher(self) -> OnlineTeacher:
        """The model that the cache was made with, by what its manifest says of it."""
        known = find_manifest(Path(self.path)).identity["teacher"]
        return OnlineTeacher(
            path=known["path"],
            revision=known.get("revision"),
            dtype=known["dtype"],
            quantization=known.get("quantization"),
            quantization_group_size=known.get("quantization_group_size"),
            random_init=known.get("random_init", False),
        )
