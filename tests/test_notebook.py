"""The notebook runs from top to bottom on a run of seconds, and is committed without outputs."""

import json
import os

import nbformat
import pytest
from nbclient import NotebookClient
from processes import ROOT

NOTEBOOK = ROOT / "experiments" / "notebooks" / "inspect.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_every_cell_runs(notebook, tiny_run, tmp_path, monkeypatch):
    """It loads the run that is there; a cell that fails raises CellExecutionError."""
    monkeypatch.setenv("JLML_WORKDIR", str(tiny_run))
    outputs = execute(notebook, tmp_path, monkeypatch)
    told = "".join(output.get("text", "") for output in outputs)
    results = [output["data"].get("text/plain", "") for output in outputs if "data" in output]
    assert "market1501" in results[0] and "checkpoint of step 12" in results[0]
    assert "joint       32 dimensions" in told and "strip 2: l1 norm" in told
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert shown.count("image/png") == 2 and shown.count("text/html") == 3


def test_it_trains_where_there_is_no_run(notebook, tiny_config, tmp_path, monkeypatch):
    # As that of `tiny_run`, so that its compiled step is in the cache.
    fields = {f"{part}.{name}" if isinstance(values, dict) else part: value
              for part, values in json.loads(tiny_config.to_json()).items()
              for name, value in (values.items() if isinstance(values, dict) else [("", values)])}
    monkeypatch.setenv("JLML_CONFIG", json.dumps(fields))
    monkeypatch.setenv("JLML_WORKDIR", str(tmp_path / "run"))
    notebook.cells = notebook.cells[:4]
    outputs = execute(notebook, tmp_path, monkeypatch)
    assert "checkpoint of step 12" in outputs[-1]["data"]["text/plain"]


def execute(notebook, folder, monkeypatch):
    """The outputs of all cells, run in `folder` by a kernel that finds the package without installing it."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_it_is_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    assert all(cell.outputs == [] and cell.execution_count is None
               for cell in notebook.cells if cell.cell_type == "code")
    assert "OWNER" not in "".join(cell.source for cell in notebook.cells)  # whose repository this is, nobody knows
