import pytest
import torch
from lab import compose

from neo.config import ConfigError, run_id, validate
from neo.teachers.device import device_problems
from neo.teachers.online import OnlineTeacher
from neo.training.devices import num_processes


@pytest.fixture
def two_gpus(monkeypatch):
    """As on a machine with two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def problems(device, trainer=None, **keys):
    config = compose("trainer=cpu", f"teacher.device={device}")
    validate(config)
    config["trainer"] |= trainer or {}
    return list(device_problems(config | keys, num_processes(config["trainer"])))


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "", "cpu:cpu"])
def test_a_device_that_holds_no_weights_is_refused_with_the_spec(name):
    with pytest.raises(ValueError, match=r"device=.*: must be null, or a device such as cpu or cu"):
        OnlineTeacher(path=None, device=name)
    with pytest.raises(ConfigError, match=r"teacher\.device='gpu': must be null, or a device"):
        problems("gpu")


@pytest.mark.parametrize("name", ["null", "cpu", "cuda", "cuda:0", "cuda:1"])
def test_a_device_of_this_machine_is_legal(name, two_gpus):
    assert problems(name, {"accelerator": "gpu", "devices": 1}) == []


def test_a_device_that_is_not_there_is_refused_with_those_that_are(two_gpus, monkeypatch):
    (problem,) = problems("cuda:2")
    assert problem == ("teacher.device='cuda:2': this machine has none; it has cpu, cuda:0, cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (problem,) = problems("cuda")
    assert problem == "teacher.device='cuda': this machine has none; it has cpu"


def test_without_a_teacher_its_device_is_no_problem():
    config = compose("method=lora", "teacher=none", "teacher.device=cuda:7")
    assert list(device_problems(config, 1)) == []


def test_a_teacher_with_a_device_of_its_own_is_not_sharded(two_gpus):
    (problem,) = problems("cpu", {"strategy": "fsdp"})
    assert problem.startswith("teacher.device='cpu': trainer.strategy=fsdp shards the teacher")
    (problem,) = problems("cpu", sharding="teacher")
    assert problem.startswith("teacher.device='cpu': sharding=teacher shards it")
    assert problems("cpu", {"strategy": "ddp", "devices": 2}, sharding=None) == []


@pytest.mark.parametrize(
    ("trainer", "processes"),
    [
        ({"devices": 2}, 2),
        ({"devices": "3"}, 3),
        ({"devices": [0, 1]}, 2),
        ({"devices": "0,1,"}, 2),
        ({"devices": "auto", "accelerator": "gpu"}, 2),
        ({"devices": -1, "accelerator": "auto"}, 2),
        ({"devices": 1, "num_nodes": 4}, 4),
        ({"devices": 2, "num_nodes": 4}, 8),
        ({"devices": "auto", "accelerator": "cpu"}, 1),
        ({"devices": "0,", "accelerator": "gpu"}, 1),
        ({"devices": 1}, 1),
    ],
)
def test_processes_do_not_share_a_gpu_for_their_teachers(trainer, processes, two_gpus):
    found = problems("cuda:1", trainer)
    assert problems("cpu", trainer) == []
    if processes == 1:
        assert found == []
    else:
        assert found == [
            f"teacher.device='cuda:1': would hold the teachers of all {processes} processes "
            "(trainer.devices x trainer.num_nodes); use cpu, null, or one process"
        ]


def test_a_run_with_its_teacher_elsewhere_is_the_same_run():
    assert run_id(compose("teacher.device=cpu")) == run_id(compose())
