import subprocess
import sys
import threading
import time

import pytest
from lab import compose

from neo.training import device_locks
from neo.training.device_locks import devices_of_its_own, hand_out, visible_devices

NAMES = ["0", "1", "GPU-3f/2"]


def held(folder, num):
    return hand_out(NAMES, num, folder, lambda said: None)


def test_no_device_is_held_twice(tmp_path):
    with held(tmp_path, 1) as first, held(tmp_path, 2) as second:
        assert sorted(first + second) == sorted(NAMES)


def test_a_job_waits_until_all_it_asks_for_is_free_and_holds_none_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(device_locks, "POLL_S", 0.02)
    said, got = [], []

    def wait():
        with hand_out(NAMES, 3, tmp_path, said.append) as own:
            got.append(own)

    with held(tmp_path, 1):
        thread = threading.Thread(target=wait)
        thread.start()
        while not said:
            time.sleep(0.01)
        with held(tmp_path, 2):  # what it cannot use yet is there for others
            assert not got
    thread.join(10)
    assert got == [NAMES]
    assert said == ["waits for 3 free GPUs of 0, 1, GPU-3f/2"]


def test_a_killed_process_gives_its_devices_back(tmp_path):
    code = (
        "import pathlib, time; from neo.training.device_locks import hand_out\n"
        f"with hand_out({NAMES!r}, 3, pathlib.Path({str(tmp_path)!r}), print):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        process.kill()
    with held(tmp_path, 3) as own:
        assert own == NAMES


def test_more_than_there_are_is_refused(tmp_path):
    with pytest.raises(ValueError, match="4 GPUs are asked for, and there are 3"):
        held(tmp_path, 4).__enter__()


def test_the_devices_of_a_process_are_those_it_may_see(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-ab")
    assert visible_devices() == ["3", "GPU-ab"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert visible_devices() == ["0", "1"]


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (["trainer.devices=2"], "4,6"),
        (["trainer.devices=1"], "4"),
        (["trainer.devices=1", "teacher.device=cuda:1"], "4,6"),  # a GPU of the teacher's own
        (["trainer.devices=auto"], "4,6,7"),
        (["trainer.devices=[0]"], None),  # named, so shared with whoever names it, too
        (["trainer.devices='0,1'"], None),
        (["trainer.accelerator=cpu"], None),
    ],
)
def test_a_run_is_given_what_it_asks_for(given, seen, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    config = compose("trainer.accelerator=gpu", *given)
    with devices_of_its_own(config, print) as environment:
        assert environment.get("CUDA_VISIBLE_DEVICES") == seen
