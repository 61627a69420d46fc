"""What a run that is a trial of a search tells its study while it trains."""

import math
import statistics

import optuna

from neo.results.metrics import metric_info
from neo.training.optuna_parts import build_pruner, open_storage


class Reports:
    """What a run tells the study of its trial while it trains, and whether it should go on."""

    def __init__(self, storage: str, study: str, trial: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage, self.number = open_storage(storage, there=True), trial
        self.study = optuna.load_study(study_name=study, storage=self.storage)
        settings = self.study.user_attrs["search"]
        self.metric: str = settings["metric"]
        self.name = settings["pruner"]["name"]
        self.study.pruner = build_pruner(settings["pruner"])
        self.study_id = self.storage.get_study_id_from_name(study)
        self.id = self.storage.get_trial_id_from_study_id_trial_number(self.study_id, trial)

    def verdict(self) -> str | None:
        """Why the run is not to go on, as it was decided before; None if it was not."""
        reason: str | None = self.storage.get_trial(self.id).user_attrs.get("pruned")
        return reason

    def report(self, step: int, value: float) -> str | None:
        """Notes a value, once a step, and returns why the run is to end, or None."""
        if step in self.storage.get_trial(self.id).intermediate_values:  # before it was stopped
            return None
        self.storage.set_trial_intermediate_value(self.id, step, value)
        if not self.study.pruner.prune(self.study, self.storage.get_trial(self.id)):
            return None
        others = [
            trial.intermediate_values[step]
            for trial in self.storage.get_all_trials(self.study_id, deepcopy=False)
            if trial.number != self.number and step in trial.intermediate_values
        ]
        seen = sorted(other for other in others if math.isfinite(other))
        against = (
            f"{len(seen)} other trials had a median of {statistics.median(seen):.4g} and a best of "
            f"{seen[-1 if metric_info(self.metric).better == 'higher' else 0]:.4g}"
            if seen
            else "there are no others to compare with"
        )
        reason = f"at step {step}: {self.metric} {value:.4g}, where {against} ({self.name})"
        self.storage.set_trial_user_attr(self.id, "pruned", reason)
        return reason
