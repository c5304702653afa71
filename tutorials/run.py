# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Execute the tutorials: all of them in full, outputs written in place; or in a short mode, as the tests do.

``python tutorials/run.py`` runs every notebook beside this file, ``python tutorials/run.py 03 05`` those whose names
begin so. ``--smoke`` sets ``PYRO_CPA_SMOKE=1``, which the notebooks read to do everything with few steps; the
notebooks stay as they are then, and ``--to FOLDER`` keeps what was executed.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image
from traitlets.config import Config

FOLDER = Path(__file__).parent
CELL_TIMEOUT = 600  # seconds: none comes near it, but a kernel that hangs should not hang the tests


def environment(smoke: bool) -> dict[str, str]:
    """That of the kernels."""
    variables = {
        # One thread: the order of floating-point sums, and so the outputs, do not depend on the number of cores.
        "OMP_NUM_THREADS": "1",
        # tqdm says so at its import in a kernel without ipywidgets, which only draw progress bars.
        "PYTHONWARNINGS": "ignore:IProgress not found",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    inherited = {name: value for name, value in os.environ.items() if name != "PYRO_CPA_SMOKE"}
    return inherited | variables | ({"PYRO_CPA_SMOKE": "1"} if smoke else {})


def execute(path: Path, smoke: bool = False) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel; raises on the first error."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        # Sockets that are files of this process: two kernels that start at once may pick the same TCP port.
        sockets = {"transport": "ipc", "connection_file": str(Path(folder) / "kernel.json")}
        NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,  # how prints arrive depends on the time
            resources={"metadata": {"path": str(path.parent)}},
            config=Config({"KernelManager": {} if os.name == "nt" else sockets}),
        ).execute(env=environment(smoke))
    # What depends on the machine and not on the notebook.
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    return notebook


def smaller(png: str) -> str:
    """A picture in 256 colours, a third of the size; without the metadata that names matplotlib's version."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    file = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Execute the tutorials.")
    parser.add_argument("names", nargs="*", help="beginnings of file names; all notebooks by default")
    parser.add_argument("--smoke", action="store_true", help="short mode; the notebooks stay as they are")
    parser.add_argument("--to", type=Path, help="folder for the executed notebooks, instead of their own")
    chosen = parser.parse_args(arguments)
    paths = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
    if chosen.names:
        paths = [path for path in paths if path.name.startswith(tuple(chosen.names))]
    if not paths:
        parser.error(f"no notebook of {FOLDER} begins with {' or '.join(chosen.names)}")
    if chosen.to:
        chosen.to.mkdir(parents=True, exist_ok=True)
    for path in paths:
        start = time.perf_counter()
        notebook = execute(path, chosen.smoke)
        target = chosen.to / path.name if chosen.to else None if chosen.smoke else path
        if target is not None:
            nbformat.write(notebook, target)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
