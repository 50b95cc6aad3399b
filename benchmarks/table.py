"""The one table: a row for each measurement, a column for each model, and the goal where there is one."""

from collections.abc import Callable
from typing import Any

REAL = "smollm2"
"""The model that the goals are for: in a tiny one what is done once outweighs the work."""


def table(found: dict[str, Any]) -> str:
    """The measurements as text. `found` is what `__main__` collected; a cell that misses its goal says so."""
    models = found["models"]
    rows = [["", *models, "goal"]]
    for label, value, goal, holds in ROWS:
        cells = [_cell(value, measured, holds if name == REAL else None) for name, measured in models.items()]
        rows.append([label, *cells, goal])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    alone = found["imports"]
    torch = "loads torch" if alone["import_loads_torch"] else "without torch"
    lines.append(f"\nimport selfrepair_nn: {alone['import']:.3f} CPU s, {torch}; ")
    lines[-1] += f"all that a run needs: {alone['import_for_run']:.1f} CPU s"
    return "\n".join(lines)


def _aligned(row, widths):
    cells = zip(row[1:-1], widths[1:-1], strict=True)
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in cells), row[-1]]


def _cell(value: Callable, measured: dict[str, Any], holds: Callable | None) -> str:
    try:
        found = value(measured)
    except KeyError:
        return ""
    missed = holds is not None and not holds(found)
    text = " / ".join(_number(x) for x in found) if isinstance(found, list) else _number(found)
    return text + (" MISSED" if missed else "")


def _number(x: float) -> str:
    if isinstance(x, int):
        return str(x)
    return f"{x:.1e}" if 0 < abs(x) < 1e-3 else f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"


ROWS = [
    ("heads, prompts, tokens in a prompt", lambda m: [m["heads"], m["prompts"], m["length"]], "", None),
    ("CPU s: naive", lambda m: m["naive"], "", None),
    ("CPU s: suffix", lambda m: m["suffix"], "", None),
    ("CPU s: ours, the job alone", lambda m: m["job"], "", None),
    ("CPU s: ours, a whole run", lambda m: m["run"], "", None),
    ("CPU s: limit (FLOP / rate)", lambda m: m["limit"], "", None),
    ("GFLOP per CPU s of large products", lambda m: m["gemm_gflops"], "", None),
    ("naive / ours", lambda m: m["naive/run"], ">= 2", lambda x: x >= 2),
    ("ours / suffix", lambda m: m["run/suffix"], "<= 1.15", lambda x: x <= 1.15),
    ("ours, the job alone / suffix", lambda m: m["job/suffix"], "", None),
    ("ours / limit", lambda m: m["run/limit"], "", None),
    ("largest change of a logit", lambda m: m["largest_change"], "", None),
    ("ours - naive, at most", lambda m: m["differs_from_naive"], "< 0.001", lambda x: x < 1e-3),
    ("ours - suffix, at most", lambda m: m["differs_from_suffix"], "< 0.001", lambda x: x < 1e-3),
    ("MiB once the model is loaded", lambda m: m["loaded_mib"], "", None),
    ("peak MiB: naive", lambda m: m["peak_mib"]["naive"], "", None),
    ("peak MiB: suffix", lambda m: m["peak_mib"]["suffix"], "", None),
    ("peak MiB: ours", lambda m: m["peak_mib"]["run"], "< 3072", lambda x: x < 3072),
    ("prompts, growing", lambda m: m["prompts_grown"], "", None),
    ("  peak MiB: ours", lambda m: m["peak_mib_by_prompts"], "flat", None),
    ("  last / first", lambda m: m["peak_growth"], "<= 1.2", lambda x: x <= 1.2),
    ("  CPU ms for a head and token", lambda m: m["cpu_ms_by_prompts"], "flat", None),
    ("heads, growing", lambda m: m["heads_grown"], "", None),
    ("  CPU ms for a head and token", lambda m: m["cpu_ms_by_heads"], "flat", None),
    ("bytes stored for a head and token", lambda m: m["bytes_per_head_token"], "", None),
    ("share of a run spent in writing", lambda m: m["share_of_writes"], "", None),
]
