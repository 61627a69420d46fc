from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[1] / "notebooks"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_as_it_lies_and_is_short(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 10
    assert all(not cell.get("outputs") for cell in notebook.cells)  # they are made, not kept
    client = nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/png", "text/markdown"} <= kinds
    committed = (FOLDER.parent / "experiments/variants/table.md").read_text().splitlines()
    (table,) = [
        output["data"]["text/markdown"]
        for output in outputs
        if "Mean ±" in output.get("data", {}).get("text/markdown", "")
    ]
    assert next(line for line in committed if line.startswith("| LoRA |")) in table
