"""What the README says of adding one's own, done in a copy of the project, right and wrong."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from readme_blocks import ROOT, blocks_of

BLOCKS = [b for b in blocks_of((ROOT / "README.md").read_text()) if b.section == "Adding your own"]
# Pairs: a block that names the file it belongs into, and the command that holds it to the laws.
ADDED = {block.marks[0]: block for block in BLOCKS if block.marks and "/" in block.marks[0]}
COMMANDS = [command for block in BLOCKS if block.language == "bash" for command in block.commands()]
PAIRS = dict(zip(ADDED, COMMANDS, strict=True))
# What makes each wrong: text of the block, and what is put in its place.
BROKEN = {
    "conf/lora/unscaled.yaml": ("lora_alpha:", "init_lora_weights: false\nlora_alpha:"),
    "neo/losses/divergences_hellinger.py": ("return temp", "return -temp"),
    "neo/data/rows.py": ('user="question"', 'user="answer"'),
}


def add(project: Path, path: str, text: str) -> None:
    """Puts the block where it belongs: into a file of its own, or as an entry into the table."""
    file = project / path
    if file.exists():
        whole = file.read_text()
        assert whole.count("SCHEMAS = {\n") == 1
        text = whole.replace("SCHEMAS = {\n", f"SCHEMAS = {{\n{text}")
    file.write_text(text)


def test_each_block_of_the_readme_has_its_command_and_is_in_no_file_yet():
    assert set(PAIRS) == set(BROKEN)
    for path, command in PAIRS.items():
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "pytest"]
        assert words[-2] == "-k"
        assert words[3:-2]
        assert all((ROOT / file).is_file() for file in words[3:-2])
        assert words[-1] in path + ADDED[path].text
        assert ADDED[path].text.count(BROKEN[path][0]) == 1
        file = ROOT / path
        assert not file.exists() or ADDED[path].text not in file.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
@pytest.mark.parametrize("path", PAIRS)
def test_what_is_added_is_found_and_passes_where_it_is_right_only(path, right, tmp_path):
    for folder in ("neo", "conf", "tests", "hydra_plugins"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    text = ADDED[path].text
    add(tmp_path, path, text if right else text.replace(*BROKEN[path]))
    _, *words = shlex.split(PAIRS[path])
    done = subprocess.run(
        [sys.executable, *words, "-p", "no:cacheprovider"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    # 1 is tests that failed; that none were found is another status
    assert done.returncode == (0 if right else 1), done.stdout
