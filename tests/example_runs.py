from typing import Any

from neo.results.records import RunRecord


def example_run(method: str = "neo", seed: int = 0, **changes: Any) -> RunRecord:
    fields: dict[str, Any] = {
        "run_id": f"{method}{seed}",
        "experiment_name": "mini",
        "status": "ok",
        "choices": {"method": method, "data": "mini"},
        "overrides": [f"method={method}"],
        "config": {"loss": {"kd_ratio": 0.5}, "data": {"packing": True}},
        "seed": seed,
        "started_at": f"2026-01-0{seed + 1}T00:00:00Z",
    }
    return RunRecord(**(fields | changes))
