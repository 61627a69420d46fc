import lightning as L
import pytest
from lab import compose

from neo.training.trainer import OURS, build_trainer, trainer_problems


@pytest.fixture(scope="module")
def node():
    return compose("trainer=cpu")["trainer"]


def test_a_trainer_takes_the_keys_of_its_node_and_those_the_run_relies_on(node):
    callback = L.Callback()
    trainer = build_trainer(node | {"max_steps": 7, "accumulate_grad_batches": 3}, [callback], [])
    assert (trainer.max_steps, trainer.accumulate_grad_batches) == (7, 3)
    assert trainer.gradient_clip_val == 1.0
    assert callback in trainer.callbacks
    assert trainer.check_val_every_n_epoch is None
    assert not trainer.loggers


def test_what_is_shipped_has_no_problems(node):
    assert trainer_problems(node) == []
    assert trainer_problems(node | {"max_steps": 5, "max_epochs": -1}) == []
    assert trainer_problems(node | {"gradient_clip_val": None}) == []
    assert trainer_problems(node | {"precision": "bf16-mixed"}) == []


@pytest.mark.parametrize("key", [*OURS, "callbacks", "logger", "default_root_dir"])
def test_what_the_run_relies_on_is_not_the_users_to_set(key, node):
    assert trainer_problems(node | {key: True}) == [
        f"trainer.{key}: is set by the run itself; leave it out"
    ]


def test_looking_for_problems_says_and_writes_nothing(node, tmp_path, monkeypatch, capfd, recwarn):
    monkeypatch.chdir(tmp_path)
    assert trainer_problems(node | {"precision": "16-mixed"})
    assert not recwarn.list
    assert list(tmp_path.iterdir()) == []
