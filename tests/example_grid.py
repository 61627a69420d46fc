"""Runs over lora x r x seed whose numbers are known, for the panels over config keys."""

from collections.abc import Mapping
from typing import Any

from example_runs import example_run

from neo.results.records import RunRecord

KD = "val/kd"


def run_at(
    lora: str, r: Any, seed: int = 0, number: float | None = None, **changes: Any
) -> RunRecord:
    """Return a run with the choice `lora`, the config value `lora.r`, and val/kd if given."""
    status = changes.get("status", "ok")
    fields = {
        "run_id": f"{lora}-{r}-{seed}-{status}",
        "choices": {"method": "neo", "lora": lora},
        "config": {"lora": {"r": r}, "optim": {"lr": 0.001}, "seed": seed},
        "metrics": {} if number is None else {KD: number},
    }
    return example_run("neo", seed, **(fields | changes))


def grid(numbers: Mapping[tuple[str, Any], list[float]]) -> list[RunRecord]:
    """Return a run per number, seeds counted from 0."""
    return [
        run_at(lora, r, seed, number)
        for (lora, r), found in numbers.items()
        for seed, number in enumerate(found)
    ]
