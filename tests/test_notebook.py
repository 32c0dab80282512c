"""The notebook, executed on a run of the demo."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from run_folders import without_rendering

from facecls import fit

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).parent.parent


def test_the_notebook_runs_on_the_demo_and_keeps_no_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(ROOT / "examples/study.ipynb", as_version=4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)

    monkeypatch.chdir(tmp_path)
    without_rendering(monkeypatch)
    short = ["--data.root=synthetic:200", "--trainer.max_epochs=1", "--trainer.log_every_n_steps=5"]
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
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    pages = [data["text/html"] for data in shown if "text/html" in data]
    assert sum("<svg" in page for page in pages) == 2 + 1 + 3 + 2  # confusion, ages, groups, reliability
    assert sum("<table" in page for page in pages) == 6
    assert any("image/png" in data for data in shown)  # what a head looked at
