"""The strict reading of one YAML mapping: every key known, present and of its type."""

import difflib
from collections.abc import Mapping
from typing import Any


class Entries:
    """The keys of one YAML mapping, each to be taken once.

    Args:
        node: What the YAML holds at `place`.
        place: Path of the mapping in its file, such as `rows[0]`; empty for the whole file.

    Raises:
        ValueError: The node is no mapping.
    """

    def __init__(self, node: Any, place: str) -> None:
        if not isinstance(node, Mapping):
            raise ValueError(f"{place or 'the file'}: {node!r} is not a mapping of keys to values")
        self.left = dict(node)
        self.place = f"{place}." if place else ""
        self.taken: list[str] = []

    def take(self, key: str, kind: Any, **default: Any) -> Any:
        """Return the value of `key`, or the default where one is given.

        Raises:
            ValueError: The key is missing and has no default, or its value is of another type.
        """
        self.taken.append(key)
        if key not in self.left:
            if "default" in default:
                return default["default"]
            raise ValueError(f"key '{self.place}{key}' is missing")
        value = self.left.pop(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"key '{self.place}{key}' is {value!r}, not of type {_name(kind)}")
        return value

    def finish(self) -> None:
        """Raise ValueError where a key was not taken."""
        for key in self.left:
            near = difflib.get_close_matches(str(key), self.taken, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"legal: {', '.join(self.taken)}"
            raise ValueError(f"key '{self.place}{key}' is unknown; {hint}")


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))
