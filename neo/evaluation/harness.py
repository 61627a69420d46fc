"""lm-evaluation-harness as an optional part: whether it is here, its version, what it says."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec

NAME = "lm_eval"
# What the harness logs where it cuts a prompt off at its left.
_CUT = ("Left truncation applied", "exceeds model's maximum length")


def require_harness() -> str:
    """The version of the harness.

    Raises:
        ValueError: It is not installed.
    """
    if find_spec(NAME) is None:
        raise ValueError(
            "tasks are run by EleutherAI's lm-evaluation-harness, which is not installed: "
            "pip install 'llm-neo[eval]'"
        )
    return version(NAME)


class CutPrompts(logging.Handler):
    """Counts how often the harness said that it cut off prompts."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.num = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Counts, and prints nothing."""
        self.num += any(words in record.getMessage() for words in _CUT)


@contextmanager
def quiet_harness() -> Generator[CutPrompts, None, None]:
    """Within it the harness logs errors alone; what it says about cut prompts is counted."""
    logger = logging.getLogger(NAME)
    handler = CutPrompts()
    before = logger.level, logger.propagate, logger.handlers
    logger.setLevel(logging.WARNING)
    logger.propagate, logger.handlers = False, [handler]
    try:
        yield handler
    finally:
        logger.setLevel(before[0])
        logger.propagate, logger.handlers = before[1], before[2]
