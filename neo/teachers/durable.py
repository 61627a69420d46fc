"""Files of a cache, written so that what is there under its name is whole."""

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What the names of files end with that are being written, or that a killed process left.
PARTIAL = ".partial"
# No room on the disk, in a quota, or under a limit on the size of files.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CacheError(ValueError):
    """A cache that cannot be read or written: which file, what is wrong, and what to do."""


@contextmanager
def told(file: Path, wanted: int) -> Iterator[None]:
    """Within it a disk that is full, or fails, is told as a `CacheError`.

    Args:
        file: That is written.
        wanted: How many bytes.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise CacheError(f"{file}: could not be written: {error.strerror or error}") from error
        free = "?"
        with suppress(OSError):
            free = f"{shutil.disk_usage(file.parent).free:,}"
        raise CacheError(
            f"{file}: could not be written: {error.strerror}; {wanted:,} bytes were wanted and "
            f"{free} are free there. Make room and start again: what was finished before is kept"
        ) from error


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Writes all of it; the system may take less at a time."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def write_whole(file: Path, content: bytes) -> None:
    """Puts a file of this content in place; a crash leaves what was there before, or this.

    Raises:
        CacheError: There is no room; the file is as it was.
    """
    partial = partial_file(file)
    with told(file, len(content)):
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                write_all(descriptor, content)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(partial, file)
            sync_folder(file.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def partial_file(file: Path) -> Path:
    """Under which name a process writes a file, until it is whole."""
    return file.with_name(f".{file.name}.{socket.gethostname()}-{os.getpid()}{PARTIAL}")


def sync_folder(folder: Path) -> None:
    """Makes the names of a folder last, where the system can."""
    with suppress(OSError):  # some network file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
