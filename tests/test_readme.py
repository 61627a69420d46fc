import itertools
import os
import re
import shlex
import subprocess
import sys

import pytest
from fits import ROWS, fit
from lab import compose, tiny_model
from readme_blocks import ROOT, Reader, blocks_of, marked, shortened

from neo.config import GROUPS, conf_dir
from neo.training.consistency import check_config

TEXT = (ROOT / "README.md").read_text()
BLOCKS = blocks_of(TEXT)
SECTIONS = marked(BLOCKS)
SHELL = [block for block in BLOCKS if block.language == "bash"]
# `python -m pytest` stands under "Adding your own", and is run by test_adding.py.
COMMANDS = [c for block in SHELL for c in block.commands() if " -m pytest " not in c]
UNMARKED = [c for block in SHELL if not block.runs for c in block.commands()]


def test_every_command_of_the_readme_is_one_of_ours():
    assert COMMANDS
    for command in COMMANDS:
        python, m, module = shlex.split(command)[:3]
        assert (python, m) == ("python", "-m")
        assert module.startswith("neo.")
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), command


@pytest.mark.parametrize("command", [c for c in UNMARKED if "neo.train" in c])
def test_every_training_command_that_is_not_run_is_a_config_that_can_run(command, monkeypatch):
    from neo.training import trainer

    # The hub's models and a GPU are not here; everything else is checked.
    monkeypatch.setattr(trainer, "trainer_problems", lambda node, **_: [])
    monkeypatch.setattr("neo.training.consistency.trainer_problems", lambda node, **_: [])
    # sweepers and launchers have tests of their own
    words = shlex.split(command)[3:]
    kept = [w for w in words if w != "-m" and "interval(" not in w and not w.startswith("hydra")]
    check_config(compose(*(word.split(",")[0] for word in kept)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that takes rows as long as any default asks for."""
    folder = tmp_path_factory.mktemp("model")
    return tiny_model(folder, hidden=32, seed=1, max_position_embeddings=2048)


@pytest.fixture
def reader(model, tmp_path):
    def make_run(folder):
        fit(model, model, folder, "trainer.max_steps=1")

    return Reader(tmp_path, ROWS / "sharegpt.jsonl", model, make_run)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_marked_blocks_of_a_section_run_when_they_are_made_short(section, reader):
    for block in SECTIONS[section]:
        reader.do(block)


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_the_marked_blocks_of_a_section_run_as_they_are_written(section, reader):
    reader.as_written = True
    for block in SECTIONS[section]:
        reader.do(block)


def page(*fences):
    """A page of one section with these blocks, each a first line and the rest."""
    return "# Page\n\n## Section\n\n" + "".join(f"```{a}\n{b}\n```\n" for a, b in fences)


@pytest.mark.parametrize(
    ("language", "text", "message"),
    [
        ("bash", "python -m neo.plan lora.rank=3", "lora.rank=3: ended with status 2"),
        ("bash", "python -m neo.export run=NOWHERE out=OUT", "ended with status 2"),
        ("bash", "true\nfalse", "false: ended with status 1"),
        ("python", "assert 1 == 2, 'it differs'", "it differs"),
    ],
)
def test_a_marked_block_that_does_not_end_well_fails_and_an_unmarked_one_is_not_run(
    language, text, message, reader
):
    assert marked(blocks_of(page((language, text)))) == {}
    (block,) = marked(blocks_of(page((f"{language} run", text))))["Section"]
    with pytest.raises(AssertionError, match=message):
        reader.do(block)


def test_the_blocks_of_a_section_share_a_folder_and_what_python_has_named(reader):
    text = page(
        ("bash run", "mkdir OUT # a comment\n# another\ntouch \\\n  OUT/it"),
        ("python run", "from pathlib import Path\nfound = [p.name for p in Path('OUT').iterdir()]"),
        ("python run", "assert found == ['it']"),
    )
    for block in marked(blocks_of(text))["Section"]:
        reader.do(block)


def test_words_in_capitals_stand_for_what_there_is_and_run_for_the_newest(reader):
    for number, name in enumerate(("old/a", "new/b")):
        record = reader.folder / "runs" / name / "record.json"
        record.parent.mkdir(parents=True)
        record.touch()
        os.utime(record, (number, number))
    run = reader.folder / "runs/new/b"
    assert reader.filled("run=RUN out=OUT NAME") == f"run={run} out=OUT new"
    assert reader.filled("data.path=ROWS DIR") == f"data.path={reader.rows} {reader.model}"
    assert reader.filled("RUNS my-DIR a.ROWS") == "RUNS my-DIR a.ROWS"


def test_a_command_that_starts_processes_is_checked_and_others_train_a_little():
    assert shortened(["--help"]) == ["--help"]
    assert "dry_run=true" not in shortened(["lora.r=8", "trainer.devices=1"])
    for arguments in (["-m", "seed=0,1"], ["experiment=mini"], ["trainer.devices=2"]):
        assert "dry_run=true" in shortened(arguments)
    assert shortened(["-m", "seed=0,1", "a.b=[1,2]"])[:3] == ["-m", "seed=0", "a.b=[1,2]"]
    assert "data.num_rows=64" in shortened(["method=kd"])
    assert "data.num_rows=64" not in shortened(["data=jsonl"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (page(("yaml run", "a: 1")), "Section: a block of 'yaml' cannot be run"),
        ("## Section\n```bash\ntrue\n", "Section: a block is not closed"),
    ],
)
def test_a_page_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        blocks_of(text)


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


def test_the_tables_of_the_readme_are_those_that_were_rendered():
    found = re.findall(r"<!-- the table of (\S+) -->\n(.*?)<!-- end -->", TEXT, re.DOTALL)
    assert found
    for file, shown in found:
        table = itertools.takewhile(
            lambda line: line.startswith("|"), (ROOT / file).read_text().splitlines()[2:]
        )
        assert shown.splitlines() == list(table), f"copy the first table of {file} again"
