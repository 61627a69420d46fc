import ast
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[1] / "notebooks"
COMPARISON, KNOWLEDGE = (
    FOLDER / f"{n}.ipynb" for n in ("compare_variants", "what_the_teacher_knows")
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def in_kernel(path: Path, folder: Path) -> dict[str, list[str]]:
    """What the cells of a notebook give out, by kind, run as they lie from the folder."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    found: dict[str, list[str]] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for kind, content in output.get("data", {}).items():
                found.setdefault(kind, []).append(content)
    return found


def in_process(path: Path, parameters: dict[str, Any]) -> list[Any]:
    """The last values of the cells, run here, with other parameters than those that lie there."""
    names: dict[str, Any] = {}
    values = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        body = ast.parse(cell.source).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), path.name, "exec"), names)
        if last is not None:
            values.append(eval(compile(ast.Expression(last.value), path.name, "eval"), names))
        if "parameters" in cell.metadata.get("tags", []):
            assert parameters.keys() <= names.keys()
            names |= parameters
    return values


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_short_and_keeps_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 10
    assert all(not cell.get("outputs") for cell in notebook.cells)  # they are made, not kept


def test_the_comparison_of_variants_runs_as_it_lies():
    found = in_kernel(COMPARISON, FOLDER)
    assert found["image/png"]
    committed = (FOLDER.parent / "experiments/variants/table.md").read_text().splitlines()
    (table,) = [text for text in found["text/markdown"] if "Mean ±" in text]
    assert next(line for line in committed if line.startswith("| LoRA |")) in table


def numbers_of(table: str) -> dict[str, dict[str, float]]:
    """The means in a table of positions, in which the teacher is as the notebook says."""
    head, _, *body = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()]
    numbers = {row[0]: dict(zip(head[2:], map(float, row[2:]), strict=True)) for row in body}
    right, wrong, behind = (numbers[label] for label in ("right", "wrong", "behind"))
    assert right["p(target), teacher"] > 0.98
    assert wrong["missed by the label"] > 0.98
    assert behind["entropy, teacher (nats)"] > 5 * right["entropy, teacher (nats)"]
    return numbers


def test_the_cells_of_what_the_teacher_knows_run(tmp_path):
    few = {"runs": str(tmp_path), "num_training_rows": 32, "steps": 1, "num_rows": 40}
    _, rows, table, labels = in_process(KNOWLEDGE, few)
    numbers_of(table.data)
    assert all(image.data.startswith(b"\x89PNG") for image in (rows, labels))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["labels-1", "neo-1"]


@pytest.mark.slow
def test_what_the_teacher_knows_runs_as_it_lies_and_tells_what_its_words_say(tmp_path):
    (tmp_path / "notebooks").mkdir()
    found = in_kernel(KNOWLEDGE, tmp_path / "notebooks")
    assert len(found["image/png"]) == 2
    (table,) = found["text/markdown"]
    numbers = numbers_of(table)
    right, behind = numbers["right"], numbers["behind"]
    names = ("base", "labels only", "distilled")
    base, labels_only, distilled = (right[f"p(target), {name}"] for name in names)
    assert labels_only < base - 0.03
    assert abs(distilled - base) < 0.03
    base, labels_only, distilled = (behind[f"kd, {name} (nats)"] for name in names)
    assert distilled < base - 0.05
    assert distilled < labels_only
