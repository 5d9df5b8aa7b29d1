"""The notebooks run from start to end, on a tiny model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gguf_models import byte_level
from tiny import save_tiny
from trained import source_text

from secateur.models.skeleton import quiet_transformers

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def test_there_are_notebooks_without_outputs() -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat")
    assert len(NOTEBOOKS) == 3
    for notebook in NOTEBOOKS:
        document = nbformat.read(notebook, as_version=4)
        nbformat.validate(document)
        assert all(not cell.get("outputs") for cell in document.cells), notebook.name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's packages, while the kernel runs
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat")
    tokenizer = byte_level()
    model = save_tiny(tmp_path / "model", tokenizer=False, vocab_size=len(tokenizer))
    with quiet_transformers():
        tokenizer.save_pretrained(model)
    (tmp_path / "text.txt").write_text(source_text()[:40_000], encoding="utf-8")
    (tmp_path / "other.txt").write_text(source_text(held_out=True)[:20_000], encoding="utf-8")
    values = {
        "MODEL": model,
        "TEXT": tmp_path / "text.txt",
        "HELD_OUT": tmp_path / "other.txt",
        "LENGTH": 32,
    }
    for name, value in values.items():
        monkeypatch.setenv(f"SECATEUR_EXAMPLE_{name}", str(value))
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent / "src"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    document = nbformat.read(notebook, as_version=4)
    nbclient.NotebookClient(
        document, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert all(cell.get("execution_count") for cell in document.cells if cell.cell_type == "code")
