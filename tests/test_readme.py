import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fits import ROWS, fit
from lab import compose, compose_raw

from neo.config import GROUPS, conf_dir
from neo.export import export
from neo.train import train
from neo.training.consistency import check_config

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
]


def arguments(command: str, **values: object) -> list[str]:
    words = shlex.split(command)[3:]
    for name, value in values.items():
        words = [re.sub(rf"={name}$", f"={value}", word) for word in words]
    return words


def test_every_command_of_the_readme_is_one_of_ours():
    assert COMMANDS
    for command in COMMANDS:
        assert shlex.split(command)[:2] == ["python", "-m"]
        assert shlex.split(command)[2] in ("neo.train", "neo.plan", "neo.export", "neo.report")


@pytest.mark.parametrize("command", [c for c in COMMANDS if "neo.train" in c and "--help" not in c])
def test_every_training_command_of_the_readme_is_a_config_that_can_run(
    command, student_dir, monkeypatch
):
    from neo.training import trainer

    # The hub's models and a GPU are not here; everything else is checked.
    monkeypatch.setattr(trainer, "trainer_problems", lambda node, **_: [])
    monkeypatch.setattr("neo.training.consistency.trainer_problems", lambda node, **_: [])
    words = arguments(command, ROWS=ROWS / "alpaca.json", DIR=student_dir)
    # sweepers and launchers have tests of their own
    kept = [w for w in words if w != "-m" and "interval(" not in w and not w.startswith("hydra")]
    check_config(compose(*(word.split(",")[0] for word in kept)))


def test_the_first_command_of_the_readme_trains(student_dir, tmp_path):
    (command,) = [c for c in COMMANDS if "data=jsonl" in c]
    words = arguments(command, ROWS=ROWS / "sharegpt.jsonl", DIR=student_dir)
    record = train(compose_raw(*words, "data.max_length=128", f"run_dir={tmp_path}"))
    assert record is not None
    assert record.status == "ok"


def test_the_export_commands_of_the_readme_export(student_dir, teacher_dir, tmp_path):
    fit(student_dir, teacher_dir, tmp_path / "run", "trainer.max_steps=1")
    for number, command in enumerate(c for c in COMMANDS if "neo.export" in c):
        given = dict(word.split("=") for word in shlex.split(command)[3:])
        export(tmp_path / "run", tmp_path / str(number), merge=given.get("merge") == "true")
        assert (tmp_path / str(number)).is_dir()


def test_the_readme_names_every_group_and_every_choice_of_the_main_ones():
    for group in (*GROUPS, "experiment"):
        assert f"`{group}`" in TEXT
    for group in ("method", "loss", "data", "trainer", "logger"):
        for file in (conf_dir() / group).glob("*.yaml"):
            assert f"`{file.stem}`" in TEXT, f"{group}={file.stem}"


def test_what_the_readme_links_to_is_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_the_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z][a-z-]+)", TEXT):
        assert re.search(rf"^{target}\b.*:", makefile, re.MULTILINE), target


@pytest.mark.slow
def test_a_wheel_carries_configs_and_models_and_trains_in_an_empty_folder(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, ROOT],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("llm_neo-*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, site], check=True)
    code = (
        "import pathlib, sys; "
        "sys.path = [p for p in sys.path if not pathlib.Path(p, 'neo', 'train.py').exists()]; "
        f"sys.path.insert(0, {str(site)!r}); import neo.train; "
        f"assert neo.train.__file__.startswith({str(site)!r}); neo.train.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "experiment=smoke", "trainer.enable_progress_bar=false"],
        cwd=empty, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(empty.glob("runs/smoke/*/adapter/adapter_model.safetensors"))
