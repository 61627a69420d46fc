"""Data-driven starts in the life of a run: which rows, which loss, once, and for every process."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fits import checkpoint, fit, power_cut, trained
from lab import ROWS, compose, tokenizer, write_rows

from neo.config import build
from neo.data.datamodule import DataModule
from neo.data.peek import first_batches
from neo.data.prompt import IGNORE
from neo.losses.distillation import Distillation
from neo.losses.divergences import forward_kl, reverse_kl
from neo.models.causal_lm import CausalLM
from neo.results.records import read_record
from neo.training.attaching import _calibration
from neo.training.calibrate import calibration_of
from neo.training.peak_memory import PeakMemory

CPU = torch.device("cpu")
INITS = {"eva": "initialize_lora_eva_weights", "corda": "preprocess_corda",
         "loraga": "preprocess_loraga"}  # fmt: skip


def opened(folder, num_rows=40, **keys):
    rows = [
        {"prompt": f"{row['prompt']} {i}", "completion": f"{row['completion']} and {i} times more"}
        for i in range(num_rows // len(ROWS))
        for row in ROWS
    ]
    overrides = [
        f"data.{key}={value}" for key, value in {"val_share": 0, "max_length": 128, **keys}.items()
    ]
    spec = build(
        compose("data=jsonl", f"data.path={write_rows(folder / 'rows.jsonl', rows)}", *overrides)[
            "data"
        ]
    )
    return DataModule(spec, tokenizer(), seed=0)


@pytest.mark.parametrize("packing", [True, False])
def test_whole_batches_are_taken_until_they_hold_the_rows_asked_for(tmp_path, packing):
    data = opened(tmp_path, packing=packing, batch_size=4)
    some = first_batches(data, 17)
    assert sum(b.num_rows for b in some) >= 17
    assert sum(b.num_rows for b in some[:-1]) < 17
    everything = first_batches(data, 10_000)
    assert sum(b.num_rows for b in everything) == 40
    for one, other in zip(some, data.train_dataloader(), strict=False):
        assert torch.equal(one.input_ids, other.input_ids)
    assert data.position == (0, 0)


def test_they_are_the_same_however_many_processes_train(tmp_path, monkeypatch):
    data = opened(tmp_path, batch_size=4)
    alone = first_batches(data, 10)
    monkeypatch.setattr(DataModule, "rank", 1)
    monkeypatch.setattr(DataModule, "world_size", 2)
    for one, other in zip(alone, first_batches(data, 10), strict=True):
        assert torch.equal(one.input_ids, other.input_ids)


def test_they_are_read_on_the_cpu_whatever_the_default_device(tmp_path):
    data = opened(tmp_path, batch_size=4)
    with torch.device("meta"):
        batches = first_batches(data, 10)
    assert all(batch.input_ids.device.type == "cpu" for batch in batches)
    assert all(batch.num_supervised > 0 for batch in batches)


@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("positions", ["aligned", "release"])
def test_the_gradient_is_that_of_the_whole_loss_over_all_rows(
    student_dir, teacher_dir, tmp_path, with_teacher, positions
):
    batches = first_batches(opened(tmp_path, packing=False, batch_size=7), 20)
    assert len({int((b.targets != IGNORE).sum()) for b in batches}) > 1
    model = CausalLM(path=str(student_dir)).load(CPU, trained=True)
    teacher = CausalLM(path=str(teacher_dir)).load(CPU, trained=False)
    vocab = len(tokenizer())
    spec = Distillation(
        divergence=reverse_kl, kd_ratio=0.7, temperature=2.0, kd_positions=positions
    )
    calibration = calibration_of(batches, teacher if with_teacher else None, spec, vocab)
    calibration.backward(model)
    ours = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for batch in batches:
        keep = batch.targets != IGNORE
        later = F.pad(keep[:, :-1], (1, 0)) if positions == "release" else keep
        logits = [
            m(input_ids=batch.input_ids, position_ids=batch.position_ids).logits[..., :vocab]
            for m in (model, teacher)
        ]
        ce = F.cross_entropy(logits[0][keep], batch.targets[keep], reduction="sum")
        kd = reverse_kl(logits[0][later], logits[1][later].detach(), temperature=2.0).sum()
        total = total + (0.3 * ce + 0.7 * kd if with_teacher else ce)
    total.backward()
    assert ours.keys() >= {name for name, p in model.named_parameters() if p.grad is not None}
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-3)


def test_another_divergence_gives_another_start(student_dir, teacher_dir, tmp_path):
    batches = first_batches(opened(tmp_path, packing=False), 20)
    teacher = CausalLM(path=str(teacher_dir)).load(CPU, trained=False)
    spec = Distillation(divergence=forward_kl, kd_ratio=1.0)
    found = []
    for each in (spec, replace(spec, divergence=reverse_kl), replace(spec, kd_ratio=0.0)):
        model = CausalLM(path=str(student_dir)).load(CPU, trained=True)
        calibration_of(batches, teacher, each, len(tokenizer())).backward(model)
        found.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        cosine = F.cosine_similarity(found[one].flatten(), found[other].flatten(), dim=0)
        assert cosine < 0.99


@pytest.mark.parametrize("name", INITS)
def test_a_run_computes_it_once_records_what_it_took_and_goes_on_without_it(
    student_dir, teacher_dir, tmp_path, name, monkeypatch
):
    settings = [
        f"lora={name}", "trainer.max_steps=4", "trainer.max_epochs=-1", "data.batch_size=4",
        "data.packing=false", f"data.path={write_rows(tmp_path / 'rows.jsonl', ROWS * 3)}",
        "checkpoint_every_n_steps=2", "optim.lr=0.01", "lora.calibration_rows=10",
    ]  # fmt: skip
    whole = fit(student_dir, teacher_dir, tmp_path / "whole", *settings)
    with power_cut(3):
        fit(student_dir, teacher_dir, tmp_path / "cut", *settings)
    cut = json.loads((tmp_path / "cut" / "record.json").read_text())
    assert cut["metrics"]["perf/init_rows"] == 12
    # what would compute it again is not there any more
    monkeypatch.setattr(f"neo.models.calibration.{INITS[name]}", None)
    monkeypatch.setattr("neo.training.attaching.first_batches", None)
    resumed = fit(student_dir, teacher_dir, tmp_path / "cut", *settings)
    for parameter, value in trained(tmp_path / "whole").items():
        assert torch.equal(trained(tmp_path / "cut")[parameter], value)
    for record in (whole, resumed):
        assert record.metrics["perf/init_rows"] == 12
        assert record.metrics["perf/init_s"] > 0
        assert record.metrics["perf/init_peak_mem_gib"] >= 0
    for metric in ("perf/init_s", "perf/init_peak_mem_gib"):
        assert resumed.metrics[metric] == cut["metrics"][metric]
    assert read_record(tmp_path / "whole" / "record.json").metrics == whole.metrics


def test_the_start_of_a_run_depends_on_its_teacher_and_divergence(
    student_dir, teacher_dir, tmp_path
):
    starts = []
    for loss in ("forward_kl", "reverse_kl"):
        fit(student_dir, teacher_dir, tmp_path / loss, "lora=loraga", f"loss={loss}",
            "loss.kd_ratio=1.0", "trainer.max_steps=1", "trainer.max_epochs=-1")  # fmt: skip
        held = checkpoint(tmp_path / loss)
        starts.append(held["neo"]["start"]["tensors"])
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    cosine = F.cosine_similarity(*(start[name].flatten() for start in starts), dim=0)
    assert cosine.abs() < 0.999


def test_ranks_that_eva_moved_are_counted_in_the_record(student_dir, tmp_path):
    settings = [
        "method=lora", "lora=eva", "lora.eva_config.rho=3", "trainer.max_steps=1",
        "lora.target_modules=[v_proj,o_proj,down_proj]", "lora.r=2",
        "trainer.max_epochs=-1", "data.batch_size=8", "data.packing=false",
        f"data.path={write_rows(tmp_path / 'rows.jsonl', ROWS * 3)}",
    ]  # fmt: skip
    record = fit(student_dir, None, tmp_path / "run", *settings)
    state = trained(tmp_path / "run")
    assert record.num_trainable_parameters == sum(value.numel() for value in state.values())
    assert record.num_trainable_parameters != 2 * 2 * (48 + 64 + 96)  # as planned


TWO = """
import os, sys
from pathlib import Path
import lightning as L
import torch
sys.path.insert(0, os.environ["TESTS"])
from lab import compose, tokenizer
from neo.config import build
from neo.data.datamodule import DataModule
from neo.models import start
from neo.training.module import NeoModule
student, teacher, rows, out, name = sys.argv[1:]
rank = int(os.environ["RANK"])
config = compose(f"lora={name}", "lora.r=4", f"student.path={student}", f"teacher.path={teacher}",
                 "data=jsonl", f"data.path={rows}", "data.val_share=0", "data.batch_size=4",
                 "data.packing=false", "data.max_length=128")
if rank:  # only the first may compute; whatever the others draw is not the first's
    def no(*_): raise RuntimeError("computed again")
    start.FROM_ROWS = dict.fromkeys(start.FROM_ROWS, no)
    torch.linalg.svd = torch.linalg.qr = torch.svd_lowrank = no
specs = {key: build(config[key]) for key in ("student", "teacher", "lora", "loss", "optim")}
module = NeoModule(**specs, vocab=len(tokenizer()), seed=0)
data = DataModule(build(config["data"]), tokenizer(), seed=0)
trainer = L.Trainer(strategy="ddp", accelerator="cpu", devices=2, max_steps=1, logger=False,
                    enable_checkpointing=False, enable_model_summary=False,
                    enable_progress_bar=False, use_distributed_sampler=False)
configure = NeoModule.configure_model
def before_anything_is_synchronised(self):
    configure(self)
    torch.save(dict(self.student.named_parameters()), f"{out}/{rank}.pt")
NeoModule.configure_model = before_anything_is_synchronised
trainer.fit(module, data)
"""


@pytest.mark.parametrize("name", ["eva", pytest.param("pissa", marks=pytest.mark.slow)])
def test_of_two_processes_one_computes_and_both_begin_alike(
    student_dir, teacher_dir, tmp_path, name
):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS * 3)
    (tmp_path / "two.py").write_text(TWO)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
         str(tmp_path / "two.py"), str(student_dir), str(teacher_dir), str(rows), str(tmp_path),
         name],
        capture_output=True, text=True,
        env={**os.environ, "TESTS": str(Path(__file__).parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first.keys() == second.keys()
    for parameter, value in first.items():
        assert torch.equal(value, second[parameter]), parameter


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_part_of_a_run_has_its_own_peak_and_loses_none_of_the_runs():
    memory = PeakMemory()
    torch.ones(3 * 2**24)  # 192 MiB before the part
    with memory.part() as measured:
        torch.ones(2**24)  # 64 MiB
    assert measured["gib"] == pytest.approx(1 / 16, abs=0.02)
    assert memory.gib() == pytest.approx(3 / 16, abs=0.02)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_happens_aside_is_no_part_of_a_runs_peak():
    memory = PeakMemory()
    torch.ones(2**24)  # 64 MiB
    with memory.aside():
        torch.ones(3 * 2**24)
    assert memory.gib() == pytest.approx(1 / 16, abs=0.02)


def test_a_cache_is_read_on_the_cpu_and_in_the_precision_of_training_while_models_are_built(
    student_dir, tmp_path
):
    asked, autocast = [], []

    class Found(Exception):
        pass

    def given(batch, teacher, student):
        asked.append(torch.get_default_device().type)
        autocast.append(torch.is_autocast_enabled("cpu"))
        raise Found

    data = opened(tmp_path, packing=False)
    context = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    trainer = SimpleNamespace(
        datamodule=data, precision_plugin=SimpleNamespace(forward_context=context)
    )
    loss = Distillation(divergence=forward_kl)
    module = SimpleNamespace(
        trainer=trainer, _trainer=trainer, init_metrics={}, teacher=None, loss=loss, vocab=9,
        cached=SimpleNamespace(given=given),
    )  # fmt: skip
    base = CausalLM(path=str(student_dir)).load(CPU, trained=False)
    calibration = _calibration(module, base, build(compose("lora=loraga")["lora"]), CPU)
    with torch.device("meta"), pytest.raises(Found):  # Lightning's is the GPU
        calibration.backward(base)
    assert (asked, autocast) == (["cpu"], [True])
