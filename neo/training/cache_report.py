"""What a run's record says of its cache, and the certificate of one that the run has filled."""

import json
from collections.abc import Callable
from typing import Any

import lightning as L
from transformers import PreTrainedModel

from neo.data.datamodule import DataModule
from neo.data.packing import Batch
from neo.data.prompt import IGNORE
from neo.losses.distillation import Distillation
from neo.models.sharding import is_sharded, reshard
from neo.models.student import inner
from neo.teachers.durable import write_whole
from neo.teachers.store import CacheFolder
from neo.training.cache_rows import examples_of
from neo.training.cached_targets import CachedTargets
from neo.training.certificate import (
    OF_STREAM,
    Certificate,
    bytes_per_token,
    certificate_metrics,
    certified_keys,
    certify,
    run_both,
)
from neo.training.module import NeoModule
from neo.training.run_cache import CERTIFICATE
from neo.training.token_loss import Outputs, outputs_of


def cache_metrics(
    cached: CachedTargets, loss: Distillation, data: DataModule, seconds: float
) -> dict[str, float]:
    """What was read, computed and waited for, and the errors; all processes must call.

    Args:
        cached: Of this process.
        loss: Of the run.
        data: Its rows.
        seconds: Of training, in which batches were waited for.
    """
    each = data.ranks.gather(cached.counts())
    found = {f"cache/rows_{key}": float(sum(counts[key] for counts in each)) for key in each[0]}
    if (prepared := data.prepare.get("train")) is not None and seconds:
        found["cache/wait_share"] = prepared.waited_s / seconds
    return found | certificate_metrics(cached.cache.certificate(cached.folder), loss)


class CertifyCache(L.Callback):
    """Measures a cache that grows when the first run that has filled it has trained.

    Behind the last step both models are still on their devices, which they leave with it. Where
    one is split all processes run it. A run that cannot be measured is still a good run.

    Args:
        say: Says what went wrong.
    """

    def __init__(self, say: Callable[[str], Any]) -> None:
        self.say = say

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Writes the certificate, if there is none."""
        assert isinstance(module, NeoModule)
        cached, data = module.cached, trainer.datamodule
        if cached is None or module.teacher is None:
            return
        split = any(map(is_sharded, (inner(module.student), module.teacher.model)))
        row_ids = _uncertified_rows(cached, data) if data.rank == 0 else []
        if split:
            (row_ids, *_) = data.ranks.gather(row_ids)
        if row_ids:
            with module.memory.aside():
                self._certify(cached, module, data, row_ids)

    def _certify(
        self, cached: CachedTargets, module: NeoModule, data: DataModule, row_ids: list[int]
    ) -> None:
        """Runs both models over the rows; the first process compares and writes."""
        assert module.teacher is not None
        student, teacher = inner(module.student), module.teacher.model

        def of(model: PreTrainedModel, batch: Batch) -> Outputs:
            batch = batch.to(module.device)
            return outputs_of(model, batch, batch.targets != IGNORE)

        was_training = student.training
        student.eval()
        examples = examples_of(data.train_stream(alone=True), row_ids)
        with module.trainer.precision_plugin.forward_context():
            online = run_both(
                examples, lambda b: of(student, b), lambda b: of(teacher, b), cached.pad_id
            )
            if data.rank == 0:
                assert cached.folder is not None
                try:
                    _write(cached.folder, certify(cached.folder, online, vocab=module.vocab))
                except (RuntimeError, ValueError, OSError) as error:  # no room, on device or disk
                    self.say(f"{cached.folder.path}: could not be measured: {error}")
        for model in (student, teacher):  # a tied head is a part of what this frees
            reshard(model)
        student.train(was_training)


def _write(folder: CacheFolder, certificate: Certificate) -> None:
    certificate["bytes_per_token"] = bytes_per_token(folder)
    write_whole(folder.path / CERTIFICATE, json.dumps(certificate, indent=1).encode())


def _uncertified_rows(cached: CachedTargets, data: DataModule) -> list[int]:
    """Rows to take a certificate of, ascending; none where there is one."""
    folder = cached.folder
    if folder is None or cached.cache.certificate(folder) is not None:
        return []
    folder.refresh()
    indices = data.train_stream(alone=True).indices
    if indices is None:
        return [key.row_id for key in certified_keys(folder, first=OF_STREAM)]
    own = set(indices.tolist())
    return [key.row_id for key in certified_keys(folder) if key.row_id in own]
