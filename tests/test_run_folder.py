import subprocess
import sys

import pytest
from example_runs import example_run
from omegaconf import OmegaConf

from neo.config import ConfigError, run_id
from neo.results.records import write_record
from neo.training.run_folder import LOCK, RunIsBusy, is_busy, lock_run, recorded_run

CONFIG = {"seed": 0, "trainer": {"max_steps": 3}, "optim": {"lr": 2e-05}}
RUN = run_id(CONFIG)


def test_a_folder_that_is_not_there_or_empty_is_free(tmp_path):
    assert recorded_run(tmp_path / "a" / "b", RUN) is None
    assert recorded_run(tmp_path, RUN) is None
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_came_to_its_end_is_found(tmp_path):
    record = example_run(run_id=RUN)
    write_record(record, tmp_path)
    assert recorded_run(tmp_path, RUN) == record


def test_a_run_has_one_process_at_a_time(tmp_path):
    assert not is_busy(tmp_path)
    with lock_run(tmp_path):
        assert is_busy(tmp_path)
        with pytest.raises(RunIsBusy, match="another process"), lock_run(tmp_path, wait_s=0.1):
            pass
    assert not is_busy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    code = (
        "import pathlib, time; from neo.training.run_folder import lock_run\n"
        f"with lock_run(pathlib.Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        assert is_busy(tmp_path)
        process.kill()
        process.wait()
    with lock_run(tmp_path, wait_s=0.0):
        pass


def test_a_run_that_was_killed_goes_on_and_no_other_takes_its_checkpoint(tmp_path):
    OmegaConf.save(OmegaConf.create(CONFIG), tmp_path / "config.yaml")
    assert recorded_run(tmp_path, RUN) is None
    with pytest.raises(ConfigError, match=f"holds run {RUN}, this config is run 01234567"):
        recorded_run(tmp_path, "01234567")


@pytest.mark.parametrize("name", ["record.json", "config.yaml"])
def test_a_folder_whose_files_are_damaged_is_refused(name, tmp_path):
    (tmp_path / name).write_text("{")
    with pytest.raises(ConfigError, match="what it holds cannot be read"):
        recorded_run(tmp_path, RUN)


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir=.*file is not a folder that can be written to"):
        recorded_run(tmp_path / "file" / "run", RUN)
