"""The writing of one cache, from a checked config to a finished and certified folder."""

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console

from neo.config import ConfigError
from neo.data.loader import TooManyBadRows
from neo.data.packing import RowReport
from neo.teachers.durable import write_whole
from neo.teachers.head_file import HEAD, write_head
from neo.teachers.identity import name_of
from neo.teachers.manifest import MANIFEST, begin, finish
from neo.teachers.store import CacheFolder
from neo.training.cache_estimate import (
    Estimate,
    check_disk,
    count_rows,
    estimate,
    estimate_lines,
    spelt_bytes,
)
from neo.training.cache_heads import kept_of
from neo.training.cache_identity import cache_identity
from neo.training.cache_limits import refuse_unfit, told_out_of_memory
from neo.training.cache_models import CacheModels, Measurer
from neo.training.cache_progress import CacheProgress
from neo.training.cache_rows import CacheRows
from neo.training.cache_standing import (
    Layout,
    Standing,
    lock_cache,
    refuse_others,
    remove_cache,
    standing,
    wait_for_layout,
    written_bytes,
)
from neo.training.cache_writing import (
    counts_of,
    done,
    remove_traces,
    wait_for_all,
    write_shards,
)
from neo.training.certificate import (
    OF_STREAM,
    Certificate,
    bytes_per_token,
    certificate_lines,
    certified_keys,
    certify,
    run_both,
)
from neo.training.devices import num_processes
from neo.training.launch import LAUNCHED, is_first_process, place_in_group
from neo.training.meet import build_specs, meet_all
from neo.training.run_cache import student_head_identity

CACHES = "caches"  # where caches lie whose folder nobody names


class CacheJob:
    """One cache that is to be written.

    Args:
        config: Of a run, checked.
        out: Where to; None is where runs look for it.
        console: That speaks for all processes.

    Raises:
        ConfigError: It cannot be written, with all reasons.
    """

    def __init__(self, config: dict[str, Any], out: Path | None, console: Console) -> None:
        refuse_unfit(config)
        self.config, self.console = config, console
        L.seed_everything(config["seed"], workers=True, verbose=False)
        self.specs = build_specs(config)
        self.meeting, self.data = meet_all(config, self.specs)
        kept = kept_of(config, self.specs, self.meeting.vocab)
        self.stored, self.shapes, self.head_changes = kept.stored, kept.shapes, kept.head_changes
        try:
            self.rows = CacheRows(self.data)
        except ValueError as error:
            raise ConfigError(str(error).splitlines()) from error
        teacher, vocab = self.specs["teacher"], self.meeting.vocab
        projected = self.stored.kind == "projected"
        head = student_head_identity(config, self.specs, vocab) if projected else None
        self.identity = cache_identity(config, teacher, self.data, self.stored, vocab, head)
        self.name = name_of(self.identity)
        self.folder = out or Path(teacher.cache or CACHES) / self.name
        self.standing = Standing()

    @cached_property
    def models(self) -> CacheModels:
        """On their device, which a process that starts others has no business on."""
        return CacheModels(self.config, self.specs, self.meeting.vocab)

    @cached_property
    def measurer(self) -> Measurer:
        """Loads the teacher when it is first asked for."""
        head = self.models.student_head() if self.stored.kind == "projected" else None
        return Measurer(self.models, self.stored, self.shapes, head)

    def is_finished(self) -> bool:
        """Looks at what stands in the folder, and says so where it is this cache, finished.

        Raises:
            ConfigError: It is another one.
        """
        if self.config["rerun"]:
            refuse_others(self.folder)
            return False
        self.standing = standing(self.folder, self.identity, self.rows)
        cache = self.standing.finished
        if cache is None or not cache.manifest.certificate:
            return False
        self.console.print(f"cache {self.name} is finished in {self.folder}; rerun=true anew")
        self._say_certificate(cache.manifest.certificate)
        return True

    def tidy(self) -> None:
        """Removes what stands there and is not to: a cache that is written anew, or traces."""
        if self.config["rerun"]:
            remove_cache(self.folder)
        elif self.standing.finished is not None:
            remove_traces(self.folder)

    def tell(self) -> Estimate:
        """Says what the cache will take.

        Raises:
            TooManyBadRows: More rows than `data.max_bad_rows` cannot be used.
        """
        self.console.print(f"cache {self.name} of {self.specs['teacher'].path}, in {self.folder}")
        counts, sample = count_rows(self.rows, self.data.data.max_bad_rows)
        with told_out_of_memory(self.config):
            found = estimate(self.rows, self.measurer, counts, sample)
        layout = self.standing.layout
        if layout is not None:
            found = replace(found, rows_per_shard=layout.rows_per_shard)
        written = 0 if self.config["rerun"] else written_bytes(self.folder)
        share = 1.0
        if layout is not None:
            spans = self.rows.spans(layout.rows_per_shard)
            left = [span.stop - span.start for span in spans if not done(self.folder, span)]
            share = sum(left) / max(1, self.rows.num_rows_in_all)
        num = num_processes(self.config["trainer"])
        for line in estimate_lines(found, self.stored, self.folder, num, written, share):
            self.console.print(f"  {line}", markup=False)
        return found

    def write(self, rank: int = 0, world_size: int = 1) -> None:
        """Writes the shards of the first process, waits for the others', finishes and certifies.

        Raises:
            ConfigError: The disk has no room for it.
            CacheError: There was none any more; what was finished is kept.
            TooManyBadRows: More rows than `data.max_bad_rows` cannot be used.
        """
        if self.standing.finished is None:
            found = self.tell()
            check_disk(self.folder, found.num_bytes - written_bytes(self.folder))
            begin(self.folder, self.stored, self.shapes, self.identity, growing=False)
            layout = self.standing.layout or Layout(found.rows_per_shard, self.rows.digest())
            layout.write(self.folder)
            self._write_spans(layout, rank, world_size)
            self._finish(layout, world_size)
        self._certify()

    def write_share(self) -> None:
        """Writes this process's part, as one of several that were started together."""
        rank, world_size = place_in_group()
        if is_first_process():
            with nullcontext() if LAUNCHED in os.environ else lock_cache(self.folder):
                finished = self.is_finished()
                self.tidy()
                if not finished:
                    self.write(rank, world_size)
            return
        layout = wait_for_layout(self.folder, self.console.print)
        if layout is not None:
            self._write_spans(layout, rank, world_size)

    def _write_spans(self, layout: Layout, rank: int, world_size: int) -> None:
        spans = self.rows.spans(layout.rows_per_shard)[rank::world_size]
        shown = self.config["trainer"]["enable_progress_bar"] and is_first_process()
        with (
            told_out_of_memory(self.config),
            CacheProgress(sum(span.stop - span.start for span in spans), shown=shown) as progress,
        ):
            write_shards(
                self.folder, self.rows, spans, self.measurer,
                max_bad_rows=self.data.data.max_bad_rows, progress=progress,
            )  # fmt: skip

    def _finish(self, layout: Layout, world_size: int) -> None:
        """Writes the manifest, from which on it is a cache."""
        spans = self.rows.spans(layout.rows_per_shard)
        found = wait_for_all(self.folder, spans, world_size, self.console.print)
        report = sum((one.report for _, one in found), RowReport())
        if report.num_bad == report.rows:
            raise TooManyBadRows(report, None)
        files = []
        if self.stored.kind == "hidden":
            head = self.measurer.teacher_head
            assert head is not None  # the estimate has measured
            write_head(self.folder, head)
            files.append(HEAD)
        shards = [one.entry for _, one in found if one.entry is not None]
        limit = self.rows.num_rows(0) if self.rows.is_stream else None
        manifest = finish(self.folder, shards, counts_of(found, limit), {}, files)
        counts = manifest.counts
        self.console.print(
            f"cache {self.name}: {counts['rows']:,} rows, {counts['tokens']:,} supervised tokens, "
            f"{spelt_bytes(written_bytes(self.folder))} in {self.folder}"
        )
        if report.num_bad:
            told = ", ".join(f"{reason} {num:,}" for reason, num in counts["bad_rows"].items())
            self.console.print(f"  {report.num_bad:,} rows could not be used: {told}")
        if report.truncated:
            self.console.print(f"  {report.truncated:,} rows were cut off at data.max_length")

    def _certify(self) -> None:
        """Adds the certificate, the last of all: a manifest without one is written to once more."""
        cache = CacheFolder.open(self.folder)
        with told_out_of_memory(self.config):
            certificate = self._certificate(cache)
        manifest = replace(cache.manifest, certificate=certificate)
        write_whole(self.folder / MANIFEST, manifest.content())
        remove_traces(self.folder)
        self._say_certificate(certificate)

    def _certificate(self, cache: CacheFolder) -> Certificate:
        keys = certified_keys(cache, first=OF_STREAM if self.rows.is_stream else None)
        examples = self.rows.examples([key.row_id for key in keys])
        student, models = self.models.base_student(), self.models
        with models.precision.forward_context():
            online = run_both(
                examples,
                lambda batch: models.outputs(student, batch),
                lambda batch: models.outputs(models.teacher, batch),
                self.rows.pad_id,
            )
            found = certify(cache, online, vocab=self.meeting.vocab, head_changes=self.head_changes)
        return found | {"bytes_per_token": bytes_per_token(cache)}

    def _say_certificate(self, certificate: Mapping[str, Any]) -> None:
        for line in certificate_lines(certificate):
            self.console.print(f"  {line}", markup=False)
