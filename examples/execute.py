"""Run the notebooks and keep what they show: `python examples/execute.py [NAME …]`, or `make notebooks`.

Each runs in an empty directory. The one that needs a server has NDIF's own, on this machine (docs/server.md).
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
SERVED = "a_remote_recipe"
WIDGET = "application/vnd.jupyter.widget-view+json"


def main(names: list[str]) -> None:
    """Execute the notebooks of these names, by default all, in place."""
    sys.path.append(str(HERE.parent))
    for path in sorted(HERE.glob("*.ipynb")):
        if not names or path.stem in names:
            with server() if path.stem == SERVED else nullcontext():
                execute(path)
            print(f"{path.name}: {path.stat().st_size:,} bytes")


def server():
    """An NDIF server of the embedded model, whose settings this process and its kernels have."""
    from selfrepair_nn.models.load import find
    from tests.ndif_server import Ndif

    class Serving(Ndif):
        def __enter__(self):
            running = super().__enter__()
            os.environ.update(running.trusted_env)
            return running

    return Serving({"local/tiny-neox": find("tiny-neox").location}, "sandboxed")


def execute(path: Path) -> None:
    """Execute one, and write it with what it shows, without what differs from run to run."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as place:
        client = NotebookClient(
            notebook,
            timeout=600,
            record_timing=False,
            store_widget_state=False,
            resources={"metadata": {"path": place}},
        )
        client.execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata, cell.outputs = {}, [each for each in cell.outputs if not passing(each)]
    nbformat.write(notebook, path)


def passing(output) -> bool:
    """Whether an output was for the page while it ran: bars, scripts. RuntimeError for what is on stderr."""
    if output.get("name") == "stderr":
        raise RuntimeError(f"on stderr: {output['text']}")
    kinds = {*output.get("data", ())}
    return output.output_type == "display_data" and (WIDGET in kinds or not kinds & {"text/plain", "image/png"})


if __name__ == "__main__":
    main(sys.argv[1:])
