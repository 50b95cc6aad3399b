"""What runs on models that nobody here could load would take on a shared server: plans, from configurations alone."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from selfrepair_nn.errors import UsageError
from selfrepair_nn.estimating.fitting import fitted, jobs_of
from selfrepair_nn.estimating.timetable import hours_of, of_server
from selfrepair_nn.estimating.workable import Here, require_workable
from selfrepair_nn.layout.experiment import prepare
from selfrepair_nn.models.load import describe
from selfrepair_nn.models.model import AS_SERVED, Model
from selfrepair_nn.options import Options
from tests.shapes import SHAPES, save_ids, save_shape

RECORDS = {
    "total": {"split": "total"},
    "sums": {},
    "components, top": {"components": "top"},
    "components, all": {"components": "all"},
}
DEGREE = {"Llama-3.1-8B": 1, "Llama-3.1-70B": 4, "Llama-3.1-405B": 8}
"""Processes that each layer is split among."""
PROMPTS, LENGTH = 32, 128
HERE = Here(memory=64 * 2**30, disk=10**12)
"""A client with 64 GiB of memory and a terabyte of disk that are free."""


def plans() -> list[dict[str, Any]]:
    """A row for each shape, of its last four layers and of all, and each record."""
    with TemporaryDirectory() as folder:
        return [*_rows(Path(folder))]


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    ids = save_ids(folder / "ids.npy", PROMPTS, LENGTH)
    for shape, (layers, *_) in SHAPES.items():
        model = Model(describe(save_shape(shape, folder / shape)), None, None, AS_SERVED, "server")
        for chosen in (f"{layers - 4}:{layers}", f"0:{layers}"):
            for record, choices in RECORDS.items():
                options = Options(model=model, prompts=ids, remote=True, layers=chosen, out=folder / "x", **choices)
                row = {"shape": shape, "layers": chosen, "record": record}
                yield row | _planned(options, DEGREE[shape])


def _planned(options: Options, degree: int) -> dict[str, Any]:
    jobs = jobs_of(fitted(prepare("heads", replace(options, tensor_parallel=degree))))
    try:
        require_workable(jobs, HERE)
    except UsageError as error:
        return {"refused": str(error).removeprefix("this cannot work: ")}
    return hours_of(jobs) | of_server(jobs) | {"degree": degree}


def as_table(rows: list[dict[str, Any]]) -> str:
    """The rows as docs/remote.md has them."""
    columns = ("model, layers", "record", "jobs", "minutes a job", "hours", "results", "crossings (processes)")
    return "\n".join([f"| {' | '.join(columns)} |", f"{'|---' * len(columns)}|", *map(_line, rows)])


def _line(row: dict[str, Any]) -> str:
    first = f"| {row['shape']}, {row['layers']} | {row['record']} |"
    if "refused" in row:
        return f"{first} – | | | | refused: {row['refused']} |"
    minutes, hours = (" to ".join(_short(x / s) for x in row[name]) for name, s in (("job_seconds", 60), ("hours", 1)))
    results, crossed = (f"{_short(row[name] / 1e9)} GB" for name in ("result_bytes", "crossing_bytes"))
    return f"{first} {row['jobs']:,} | {minutes} | {hours} | {results} | {crossed} ({row['degree']}) |"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
