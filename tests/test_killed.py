"""Runs that SIGKILL ends at random moments, again and again, end as if never stopped."""

import json
import multiprocessing
import os
import random
import time

import pytest
import torch
from devices import train_in_processes
from devices_worker import note_rows
from fits import checkpoint, power_cut, settings, trained
from lab import compose_raw, tiny_model, write_rows

from neo.train import train
from neo.training.module import NeoModule

NUM_KILLS = 5  # of each of the four cases
ROWS = [
    {"prompt": f"What is {i} + {i * 7 % 13}?", "completion": f"It is {i + i * 7 % 13}. " * (i % 9)}
    for i in range(90)
]  # every ninth has nothing to learn from, and is bad


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return tiny_model(folder / "student", seed=1), tiny_model(folder / "teacher", hidden=48, seed=2)


def overrides(models, rows, run, *more):
    return settings(
        *models, run, f"data.path={rows}", "data.max_length=64", "data.batch_size=1",
        "trainer.accumulate_grad_batches=3", "lora.lora_dropout=0.1", "checkpoint_every_n_steps=1",
        "keep_last=2", "optim.lr=1e-2", *more,
    )  # fmt: skip


def source(name, rows):
    """Where the rows come from: a table, or a stream, whose length is not known."""
    if name == "table":
        return ("trainer.max_epochs=2",)
    return (
        "data=infinity_instruct", f"data.path={rows.parent}", "data.name=null",
        "data.schema=prompt_completion", "data.max_rows=null", "data.val_share=0",
        "trainer.max_epochs=-1", "trainer.max_steps=24",
    )  # fmt: skip


def start(words):
    """The run in a process of its own, which need not import everything again."""

    def run():
        os.setsid()  # its data workers are killed with it
        train(compose_raw(*words))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def num_logged(run):
    file = run / "metrics.csv"
    return file.read_text().count("\n") if file.exists() else 0


def losses(run):
    import csv

    with (run / "metrics.csv").open() as file:
        return [(row["step"], row["train/loss"]) for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["table", "stream"])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_never_was(
    models, rows, tmp_path, kind, num_workers
):
    more = (*source(kind, rows), f"data.num_workers={num_workers}")
    whole, run = tmp_path / "whole", tmp_path / "run"
    process = start(overrides(models, rows, whole, *more))
    process.join()
    assert process.exitcode == 0
    chance = random.Random(f"{kind}{num_workers}")
    killed = []
    for _ in range(NUM_KILLS):
        before = num_logged(run)
        process = start(overrides(models, rows, run, *more))
        deadline = time.monotonic() + 120
        # somewhere within the next few steps, which here are a few milliseconds each
        wanted = before + chance.randint(1, 3)
        while num_logged(run) < wanted and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        os.killpg(process.pid, 9)
        process.join()
        killed.append(process.exitcode)
    assert killed == [-9] * NUM_KILLS  # none had come to its end
    process = start(overrides(models, rows, run, *more))
    process.join()
    assert process.exitcode == 0
    expected, actual = trained(whole), trained(run)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert losses(run) == losses(whole)
    of_whole, of_run = (json.loads((f / "record.json").read_text()) for f in (whole, run))
    for key in ("rows", "num_tokens"):
        assert of_run[key] == of_whole[key]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["table", "stream"])
def test_from_two_ranks_to_one_and_back_every_row_comes_once_and_weights_are_kept(
    models, rows, tmp_path, kind, monkeypatch
):
    run = tmp_path / "run"
    more = [*source(kind, rows), "trainer.accumulate_grad_batches=1"]
    more += ["trainer.max_epochs=1"] if kind == "table" else ["trainer.max_steps=60"]
    split = (*more, "trainer.devices=2", "trainer.strategy=fsdp")
    train_in_processes([[*overrides(models, rows, run, *split), "cut=4"]], tmp_path / "first")
    saved = checkpoint(run)["state_dict"]
    begun = []

    def on_train_start(module):
        begun.append({n: p.clone() for n, p in module.state_dict().items()})

    with monkeypatch.context() as patch:
        patch.setattr(NeoModule, "on_train_start", on_train_start, raising=False)
        note_rows(run / "rows-0.jsonl", patch.setattr)
        with power_cut(9):
            train(compose_raw(*overrides(models, rows, run, *more)))
    assert begun[0].keys() == saved.keys()
    assert all(torch.equal(begun[0][name], saved[name]) for name in saved)
    whole = (*more, "trainer.devices=2", "trainer.strategy=ddp")
    train_in_processes([overrides(models, rows, run, *whole)], tmp_path / "last")
    seen = [
        (line["epoch"], i)
        for file in run.glob("rows-*.jsonl")
        for line in map(json.loads, file.read_text().splitlines())
        for i in line["ids"]
    ]
    of_first = sorted(i for epoch, i in seen if epoch == 0)
    bad = [i for i in range(len(ROWS)) if i % 9 == 0]
    assert of_first == [i for i in range(len(ROWS)) if i not in bad]
    assert len(seen) == len(set(seen))
