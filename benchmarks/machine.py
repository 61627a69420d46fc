"""What a benchmark ran on."""

import platform
from importlib.metadata import version
from pathlib import Path


def describe_machine(threads: int, *packages: str) -> str:
    """One line: processor, threads, Python and the versions of the packages that took part."""
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{cpu_model()}, {threads} threads, {versions}, Python {platform.python_version()}"


def cpu_model() -> str:
    """What Linux calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
