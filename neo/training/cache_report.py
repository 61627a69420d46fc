"""What a run's record says of its cache, and the certificate of one that the run has begun."""

import json
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from neo.data.datamodule import DataModule
from neo.data.packing import Batch
from neo.data.prompt import IGNORE
from neo.models.sharding import is_sharded
from neo.models.student import inner
from neo.teachers.durable import write_whole
from neo.training.cached_targets import CachedTargets
from neo.training.certificate import (
    bytes_per_token,
    certificate_metrics,
    certified_keys,
    certify,
)
from neo.training.run_cache import CERTIFICATE
from neo.training.token_loss import Outputs, outputs_of

if TYPE_CHECKING:
    from neo.training.module import NeoModule


def cache_metrics(
    cached: CachedTargets, module: "NeoModule", data: DataModule, seconds: float
) -> dict[str, float]:
    """What was read, computed and waited for, and the errors; all processes must call.

    Args:
        cached: Of this process.
        module: That has been trained.
        data: Its rows.
        seconds: Of training, in which batches were waited for.
    """
    each = data.ranks.gather(cached.counts())
    found = {f"cache/rows_{key}": float(sum(counts[key] for counts in each)) for key in each[0]}
    if (prepared := data.prepare.get("train")) is not None and seconds:
        found["cache/wait_share"] = prepared.waited_s / seconds
    if data.rank == 0 and _uncertified(cached, module):
        _certify(cached, module, data)
    return found | certificate_metrics(cached.cache.certificate(cached.folder), module.loss)


def _uncertified(cached: CachedTargets, module: "NeoModule") -> bool:
    """Whether this process can and should measure the cache that it has filled."""
    teacher = module.teacher
    if teacher is None or cached.folder is None or is_sharded(teacher.model):
        return False
    return cached.cache.certificate(cached.folder) is None


def _certify(cached: CachedTargets, module: "NeoModule", data: DataModule) -> None:
    """Measures a cache that grows, at the student that its first run has trained."""
    assert cached.folder is not None
    assert module.teacher is not None
    cached.folder.refresh()
    stream = data.train_stream(alone=True)
    if stream.indices is None:  # its rows would have to be read again
        return
    own = set(stream.indices.tolist())
    keys = [key for key in certified_keys(cached.folder) if key.row_id in own]
    table: Any = stream.rows
    rows = [stream.encoded.encode(key.row_id, table[key.row_id]) for key in keys]
    if not rows:
        return
    student, teacher = inner(module.student), module.teacher.model
    was_training = student.training
    student.eval()

    def of(model: PreTrainedModel, batch: Batch) -> Outputs:
        batch = batch.to(module.device)
        return outputs_of(model, batch, batch.targets != IGNORE)

    with module.trainer.precision_plugin.forward_context():
        certificate = certify(
            cached.folder, rows, lambda b: of(student, b), lambda b: of(teacher, b),
            vocab=module.vocab, pad_id=cached.pad_id,
        ) | {"bytes_per_token": bytes_per_token(cached.folder)}  # fmt: skip
    student.train(was_training)
    write_whole(cached.folder.path / CERTIFICATE, json.dumps(certificate, indent=1).encode())
