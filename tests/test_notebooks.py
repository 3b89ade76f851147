"""Tests that the tutorials run and show their pictures and audio players."""

import shutil
import sys

import pytest

from tests.crash import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.nemo]

# Changes that shorten a tutorial. Pictures of validation clips take longer than steps, so there is one such clip.
SHORTER = {
    "Inference": {},
    "Training": {"STEPS_PER_EPOCH = 30": "STEPS_PER_EPOCH = 3", '"--valid-share", 0.3': '"--valid-share", 0.1'},
}


@pytest.mark.parametrize(("name", "pictures", "players"), [("Inference", 4, 2), ("Training", 3, 2)])
def test_a_tutorial_runs(tmp_path, monkeypatch, name, pictures, players):
    pytest.importorskip("nemo", reason="the tutorials use NeMo: pip install '.[nemo]'")
    import nbformat
    from nbclient import NotebookClient

    for folder in ("examples", "conf"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("codec_tutorial"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Use this Python as the kernel rather than one that is installed on the machine.
    kernels = tmp_path / "jupyter" / "kernels" / "python3"
    kernels.mkdir(parents=True)
    command = '["' + sys.executable + '", "-m", "ipykernel_launcher", "-f", "{connection_file}"]'
    (kernels / "kernel.json").write_text(f'{{"argv": {command}, "display_name": "here", "language": "python"}}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    notebook = nbformat.read(tmp_path / "examples" / f"Audio_Codec_{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    for before, after in SHORTER[name].items():
        assert any(before in cell.source for cell in notebook.cells), before
        for cell in notebook.cells:
            cell.source = cell.source.replace(before, after)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path / "examples")}})
    client.execute()  # raises for a cell that fails
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("image/png" in data for data in shown) == pictures
    assert sum("<audio" in data.get("text/html", "") for data in shown) == players
