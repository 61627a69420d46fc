"""A sweep: checks all its jobs, has Hydra's launcher run them, shares them with other sweeps.

Whatever the launcher (one after another, joblib, submitit), what is kept of a job is its record. So
a sweep is started again to go on, and started twice to go faster.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from neo.config import ConfigError, open_groups
from neo.results.records import RunRecord, write_record
from neo.training.apart import BUSY, DONE, FAILED, Outcome, start_server
from neo.training.command_line import console
from neo.training.launch import in_process_group
from neo.training.run_folder import RunIsBusy, is_busy, lock_run, recorded_run
from neo.training.sweep_check import Job, check_jobs
from neo.training.sweep_summary import print_summary

POLL_S = 2.0


class SweepFailed(RuntimeError):
    """Some of the jobs have no numbers; their records say why."""


class Sweep(Sweeper):
    """Every combination of what is swept, once.

    Args:
        params: Key to the values it takes, in Hydra's grammar, as on the command line.

    Attributes:
        only_plans: Whether jobs are not to run: each is told what it would be, and is not checked.
    """

    only_plans = False

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = params or {}
        self.launcher: Launcher | None = None
        self._num_launched = self._num_not_rerun = 0
        self._only_looked = False

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra before `sweep`."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[RunRecord | None]:
        """Runs what `params` and the command line's arguments span, and returns the records.

        Raises:
            ConfigError: Some jobs cannot run; none was started.
            SweepFailed: Some jobs have failed.
        """
        assert self.hydra_context is not None
        # not before Hydra has looked for plugins, which makes the class anew
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        swept = open_groups([f"{key}={values}" for key, values in self.params.items()])
        overrides = parser.parse_overrides([*swept, *arguments])
        (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
        return self.finish(self.run_jobs(jobs))

    def finish(self, records: list[RunRecord | None]) -> list[RunRecord | None]:
        """The records of the whole sweep.

        Raises:
            SweepFailed: Some jobs have failed, or did not come to their end.
        """
        if self._only_looked:
            return records
        failed = sum(r is not None and r.status in FAILED for r in records) + self._num_not_rerun
        left = sum(r is None or r.status == "interrupted" for r in records)
        said = []
        if failed:
            said.append(
                f"{failed} of {len(records)} runs have failed; retry=failed runs them again"
            )
        if left:
            said.append(f"{left} of {len(records)} runs were stopped; the same command goes on")
        if said:
            raise SweepFailed("; ".join(said))
        return records

    def run_jobs(self, jobs: Sequence[Sequence[str]]) -> list[RunRecord | None]:
        """The record of each job, all of which are checked before the first starts.

        Args:
            jobs: The overrides of each.

        Raises:
            ConfigError: Some jobs cannot run; none was started.
        """
        return self.run_checked(self.check(jobs))

    def run_checked(self, checked: Sequence[Job]) -> list[RunRecord | None]:
        """The record of each job, which is run unless it is recorded; None for dry runs.

        A run that another sweep trains is waited for, and taken over should that one die.
        """
        if checked[0].config["dry_run"] or self.only_plans:
            self._only_looked = True
            self._launch(checked)
            return [None] * len(checked)
        start_server()
        runs = list({job.identity: job for job in checked}.values())
        before = {job.identity: _to_begin_with(job) for job in runs}
        known = sum(r is not None and r.status in DONE for r in before.values())
        console.print(
            f"sweep {runs[0].config['experiment_name']}: {len(runs)} runs"
            + f", of which {known} are recorded" * (known > 0)
            + f" ({len(checked) - len(runs)} jobs ask for a run once more)"
            * (len(runs) < len(checked))
        )
        waiting = [job for job in runs if job.config["rerun"] or not _done(before[job.identity])]
        while waiting:
            free = [job for job in waiting if not is_busy(job.folder)]
            if not free:
                time.sleep(POLL_S)
            try:
                outcomes = self._launch(free) if free else []
            except Exception as error:  # such as submitit's, of a task that is gone
                print_summary(console, runs, _records(runs), before)
                said = " ".join(f"{type(error).__name__}: {error}".split())
                raise SweepFailed(
                    f"the launcher gave up ({said[:300]}); the same command goes on"
                ) from error
            for job, outcome in zip(free, outcomes, strict=True):
                if outcome is not None and outcome.status in FAILED and job.config["rerun"]:
                    record = recorded_run(job.folder, job.identity)
                    if record is not None and record.status not in FAILED:
                        self._num_not_rerun += 1
                        console.print(f"{job.name}: not run again: {outcome.error}", markup=False)
            ended = {
                job for job, outcome in zip(free, outcomes, strict=True) if outcome != Outcome(BUSY)
            }
            waiting = [
                job
                for job in waiting
                if job not in ended and not _done(recorded_run(job.folder, job.identity))
            ]
        records = _records(runs)
        print_summary(console, runs, records, before)
        return [records[job.identity] for job in checked]

    def check(self, jobs: Sequence[Sequence[str]]) -> list[Job]:
        """The jobs, composed and checked.

        Raises:
            ConfigError: Some of them cannot run.
        """
        if in_process_group() and not self.only_plans:
            raise ConfigError(
                ["a sweep starts the processes of its runs: start it once, not by torchrun or srun"]
            )
        assert self.config is not None
        assert self.hydra_context is not None
        return check_jobs(self.hydra_context, self.config, jobs, only_compose=self.only_plans)

    def _launch(self, jobs: Sequence[Job]) -> list[Outcome | None]:
        """What became of each job, in order; nothing is to be said of a dry run."""
        assert self.launcher is not None
        returned = self.launcher.launch(
            [job.overrides for job in jobs], initial_job_idx=self._num_launched
        )
        self._num_launched += len(jobs)
        return [job_return.return_value for job_return in returned]


def _records(jobs: Sequence[Job]) -> dict[str, RunRecord | None]:
    return {job.identity: recorded_run(job.folder, job.identity) for job in jobs}


def _done(record: RunRecord | None) -> bool:
    return record is not None and record.status in DONE


def _to_begin_with(job: Job) -> RunRecord | None:
    """What is recorded of a job; a failed one that is to be retried counts as interrupted."""
    record = recorded_run(job.folder, job.identity)
    if job.config["retry"] is None or record is None or record.status not in FAILED:
        return record
    try:
        with lock_run(job.folder, wait_s=0.0):
            said = f"to be run again; it was {record.status}: {record.error}"
            record = replace(record, status="interrupted", error=said)
            write_record(record, job.folder)
    except RunIsBusy:
        return None  # another sweep runs it again already
    return record
