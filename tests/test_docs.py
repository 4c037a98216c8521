"""The notebook runs from top to bottom; the page of public names has them all."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import mask_rcnn_plus
from mask_rcnn_plus import modeling, ops

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/example.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "docs").mkdir()
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    kernel = tmp_path / "share/jupyter/kernels/python3/kernel.json"
    kernel.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": command, "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(kernel.parents[2]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(tmp_path / "docs")}}
    )
    client.execute()
    kinds = {
        kind
        for cell in notebook.cells
        for o in cell.get("outputs", [])
        for kind in o.get("data", ())
    }
    assert "image/png" in kinds


def test_the_notebook_is_committed_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not c.get("outputs") and not c.get("execution_count") for c in cells)


@pytest.mark.parametrize("module", [mask_rcnn_plus, ops, modeling], ids=lambda m: m.__name__)
def test_the_api_page_has_every_public_name(module: object) -> None:
    pdoc = pytest.importorskip("pdoc")
    pdoc.render.configure(docformat="google")
    page = pdoc.render.html_module(
        pdoc.doc.Module(module), all_modules={module.__name__: pdoc.doc.Module(module)}
    )
    for name in module.__all__:
        assert f'id="{name}"' in page, name
        assert getattr(module, name).__doc__, name
        if name.endswith(
            "Predictor"
        ):  # called as a function; pdoc shows such methods only if asked
            assert f'id="{name}.__call__"' in page
