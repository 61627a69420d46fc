"""The import layers of the design, read from the source without importing it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "neo"

# A unit is a folder of neo, or a file that lies directly in it. It may import units of a lower
# layer only; every file that is not named here is a command.
LAYERS = {
    "config": 1,
    "data": 1,
    "models": 1,
    "losses": 1,
    "results": 1,
    "teachers": 2,
    "training": 3,
    "evaluation": 3,
}
COMMAND = 4
FORBIDDEN_NAMES = {"utils", "common", "helpers", "base", "constants", "registry"}
FORBIDDEN_IMPORTS = {"results": {"torch", "lightning", "transformers", "peft"}}
MAX_LINES = 350


def imported_modules(tree: ast.Module) -> list[str]:
    """Return the dotted name of everything that is imported, in functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def violations(package: Path) -> list[str]:
    """Return one sentence for each place where the package breaks a rule."""
    found = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        unit = place.parts[0].removesuffix(".py")
        layer = LAYERS.get(unit, COMMAND)
        if path.stem in FORBIDDEN_NAMES or unit in FORBIDDEN_NAMES:
            found.append(f"{place}: a file of that name collects what has no home")
        elif len(place.parts) > 1 and unit not in LAYERS:
            found.append(f"{place}: {unit} is no folder of the design")
        if len(text.splitlines()) > MAX_LINES:
            found.append(f"{place}: {len(text.splitlines())} lines, more than {MAX_LINES}")
        if path.name == "__init__.py" and any(
            not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            for node in tree.body
        ):
            found.append(f"{place}: holds more than a docstring")
        if any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree)):
            found.append(f"{place}: relative import")
        for name in imported_modules(tree):
            top, *rest = name.split(".")
            if top in FORBIDDEN_IMPORTS.get(unit, ()):
                found.append(f"{place}: {unit} imports {top}")
            if top != package.name or not rest or rest[0] == unit:
                continue
            if LAYERS.get(rest[0], COMMAND) >= layer:
                found.append(f"{place}: {unit} (layer {layer}) imports {rest[0]}, not below it")
    return found


def test_the_package_keeps_to_its_layers():
    assert violations(PACKAGE) == []


def test_every_folder_of_the_design_is_there():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(LAYERS) - {"config"}


BROKEN = [
    ("losses/kl.py", "from neo.data.rows import Row", "losses (layer 1) imports data"),
    ("losses/kl.py", "import neo.models", "losses (layer 1) imports models"),
    ("losses/kl.py", "from neo import config", "losses (layer 1) imports config"),
    ("config.py", "from neo.results import records", "config (layer 1) imports results"),
    ("data/rows.py", "def f():\n    from neo.config import build", "data (layer 1) imports config"),
    ("teachers/online.py", "import neo.training.module", "teachers (layer 2) imports training"),
    ("training/module.py", "from neo.train import main", "training (layer 3) imports train"),
    ("evaluation/x.py", "import neo.training.run", "evaluation (layer 3) imports training"),
    ("export.py", "from neo.train import main", "export (layer 4) imports train"),
    ("models/lora.py", "from . import student", "relative import"),
    ("models/lora.py", "from ..data import rows", "relative import"),
    ("data/__init__.py", "from neo.data.rows import Row", "holds more than a docstring"),
    ("data/__init__.py", "__all__ = []", "holds more than a docstring"),
    ("data/utils.py", "", "collects what has no home"),
    ("helpers/x.py", "", "collects what has no home"),
    ("plots/x.py", "", "plots is no folder of the design"),
    ("results/page.py", "import torch.nn", "results imports torch"),
    ("results/page.py", "def f():\n    from lightning import Trainer", "results imports lightning"),
    ("losses/kl.py", "x = 1\n" * (MAX_LINES + 1), f"more than {MAX_LINES}"),
]


@pytest.mark.parametrize(("path", "source", "message"), BROKEN)
def test_the_checker_sees_a_broken_rule(tmp_path, path, source, message):
    file = tmp_path / "neo" / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    (found,) = violations(tmp_path / "neo")
    assert message in found


ALLOWED = [
    ("train.py", "from neo.training.module import NeoModule\nimport neo.config"),
    ("training/module.py", "from neo.teachers.online import Online\nfrom neo.losses import fused"),
    ("teachers/online.py", "import neo.models.causal_lm\nimport torch"),
    ("data/packing.py", "from neo.data.prompt import Example"),
    ("losses/kl.py", "x = 1\n" * MAX_LINES),
    ("data/__init__.py", '"""Rows."""'),
]


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_the_checker_lets_pass_what_the_design_allows(tmp_path, path, source):
    file = tmp_path / "neo" / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert violations(tmp_path / "neo") == []
