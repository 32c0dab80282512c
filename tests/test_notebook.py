"""The notebook, executed on a run of the demo."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from facecls import fit

ROOT = Path(__file__).parent.parent


def test_the_notebook_runs_on_the_demo_and_keeps_no_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(ROOT / "examples/study.ipynb", as_version=4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)

    monkeypatch.chdir(tmp_path)
    short = ["--data.root=synthetic:300", "--trainer.max_epochs=2", "--trainer.log_every_n_steps=5"]
    fit.main(
        [
            f"--config={ROOT / 'configs/demo.yaml'}",
            *short,
            "--data.num_workers=0",
            "--trainer.enable_progress_bar=false",
        ]
    )
    monkeypatch.setenv("RUN", str(tmp_path / "runs/demo/version_0"))
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/svg+xml" in output.get("data", {}) for output in shown) == 4
    assert sum("text/html" in output.get("data", {}) for output in shown) == 6  # the tables
    assert any("image/png" in output.get("data", {}) for output in shown)  # what a head looked at
