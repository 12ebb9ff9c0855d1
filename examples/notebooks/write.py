"""Write the notebooks: execute compare.py and after.py, and keep what they print and draw in .ipynb files.

    python examples/notebooks/write.py

About four minutes on two cores. The sources are in the percent format of jupytext.
"""

from __future__ import annotations

import os
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent
SOURCES = [HERE / "compare.py", HERE / "after.py"]


def read(source: Path) -> NotebookNode:
    """The cells of a source, without outputs; the same on every call."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = NotebookNode(kernelspec={"name": "python3", "display_name": "Python 3", "language": "python"})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = NotebookNode()
    return notebook


def execute(source: Path) -> NotebookNode:
    """The same with outputs, from a kernel that starts in this folder."""
    notebook = read(source)
    here = {"metadata": {"path": str(HERE)}}
    client = NotebookClient(notebook, timeout=600, record_timing=False, resources=here)
    client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore:IProgress"})  # widgets are not installed
    return notebook


if __name__ == "__main__":
    for source in SOURCES:
        nbformat.write(execute(source), source.with_suffix(".ipynb"))
