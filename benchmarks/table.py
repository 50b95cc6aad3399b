"""The one table: a row for each measurement, a column for each model, and the goal where there is one."""

from collections.abc import Callable
from typing import Any

from benchmarks import counts, gpu

REAL = "smollm2"
"""The model that the goals are for: in a tiny one what is done once outweighs the work."""


def table(found: dict[str, Any]) -> str:
    """The measurements as text. `found` is what `__main__` collected; a cell that misses its goal says so."""
    models = found["models"]
    hooked, spared = (_part(models, name) for name in ("transformerlens", "fewer"))
    rows = [["", *models, "goal"], *_rows(ROWS, models)]
    rows += [*_rows(THROUGH_TRANSFORMERLENS, hooked), *_rows(FEWER, spared)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    waiting = _waiting(found["waiting"]) if "waiting" in found else []
    store = _store(found["store"]) if "store" in found else []
    counted = counts.lines(found["counts"]) if "counts" in found else []
    measured = gpu.lines(found["gpu"]) if "gpu" in found else []
    blocks = (lines if found["models"] else [], waiting, store, counted, measured)
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _part(models: dict[str, dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    return {model: measured.get(name, {}) for model, measured in models.items()}


def _rows(wanted: list[tuple], models: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Those of the rows for which something was measured."""
    rows = []
    for label, value, goal, holds in wanted:
        cells = [_cell(value, measured, holds if name == REAL else None) for name, measured in models.items()]
        rows += [[label, *cells, goal]] if any(cells) else []
    return rows


def _waiting(found: dict[str, Any]) -> list[str]:
    """What a user waits for, a line for each."""
    torch = "with torch" if found["import_loads_torch"] else "without torch"
    seconds = {
        f"import selfrepair_nn, {torch}": found["import"],
        "import all that a run needs": found["import_for_run"],
        "selfrepair --help": found["help"],
        "selfrepair recipes": found["recipes"],
        "selfrepair run heads --model tiny-neox": found["first_run"],
        "that, and its figures": found["first_figure"],
        f"one figure of {found['large_tokens']} tokens, 12 heads ({found['large_mib']:.0f} MiB)": found[
            "large_figure"
        ],
        "all figures of the same": found["large_figures"],
    }
    width = max(map(len, seconds))
    return [f"CPU s: {what.ljust(width)}  {taken:.3g}" for what, taken in seconds.items()]


def _store(found: dict[str, Any]) -> list[str]:
    """A store at scale: what it takes to keep, and to read, a line for each."""
    each = found["for_a_head_token"]
    lines = [
        f"store: {found['cases']} heads, {found['tokens']} tokens, {found['block']} prompts in a block",
        f"  {found['files']} files, {found['bytes'] / 1e9:.3g} GB, {each['bytes']:.3g} bytes for a head and token",
        f"  writing takes {1e9 * each['write_cpu']:.3g} CPU ns for a head and token",
    ]
    read = {name: value for name, value in found.items() if isinstance(value, dict) and "peak_mib" in value}
    for name, value in read.items():
        cost = f"{value['cpu']:.3g} CPU s, {1e9 * each[name]:.3g} ns for a head and token"
        lines.append(f"  {name:<10} {cost}, peak {value['peak_mib']:.0f} MiB")
    return lines


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
    ("naive / the job", lambda m: m["naive/job"], ">= 2.5", lambda x: x >= 2.5),
    ("the job / suffix", lambda m: m["job/suffix"], "<= 1", lambda x: x <= 1),
    ("the job / limit", lambda m: m["job/limit"], "<= 1.25", lambda x: x <= 1.25),
    ("naive / a whole run", lambda m: m["naive/run"], ">= 2", lambda x: x >= 2),
    ("a whole run / suffix", lambda m: m["run/suffix"], "<= 1.15", lambda x: x <= 1.15),
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
    ("layer that is ablated", lambda m: m["layers_ablated"], "", None),
    ("  CPU ms for a head and token", lambda m: m["cpu_ms_by_depth"], "", None),
    ("  CPU ms for each layer more", lambda m: m["cpu_ms_of_a_layer"], "flat", None),
    ("bytes stored for a head and token", lambda m: m["bytes_per_head_token"], "", None),
    ("share of a run spent in writing", lambda m: m["share_of_writes"], "", None),
]

THROUGH_TRANSFORMERLENS = [
    (
        "through TransformerLens: heads, prompts, tokens",
        lambda t: [t["heads"], t["prompts"], t["length"]],
        "",
        None,
    ),
    ("  CPU s: published", lambda t: t["published"], "", None),
    ("  CPU s: careful", lambda t: t["careful"], "", None),
    ("  CPU s: ours, the job alone", lambda t: t["job"], "", None),
    ("  CPU s: ours, a whole run", lambda t: t["run"], "", None),
    ("  published / ours", lambda t: t["published/run"], ">= 20", lambda x: x >= 20),
    ("  published / ours, the job alone", lambda t: t["published/job"], "", None),
    ("  published, to the letter / published", lambda t: t["letter/published"], "", None),
    (
        "  published, to the letter / ours",
        lambda t: t["letter/published"] * t["published/run"],
        ">= 20",
        lambda x: x >= 20,
    ),
    ("  careful / ours", lambda t: t["careful/run"], "", None),
    ("  careful / ours, the job alone", lambda t: t["careful/job"], "", None),
    ("  largest change of a logit", lambda t: t["largest_change"], "", None),
    ("  ours - published, at most", lambda t: t["differs_from_published"], "< 0.001", lambda x: x < 1e-3),
    ("  ours - careful, at most", lambda t: t["differs_from_careful"], "< 0.001", lambda x: x < 1e-3),
    ("  peak MiB: published", lambda t: t["peak_mib"]["published"], "", None),
    ("  peak MiB: careful", lambda t: t["peak_mib"]["careful"], "", None),
]


def _saved(name: str) -> Callable:
    """Head-tokens, and CPU seconds, of a whole run for each of this one."""
    return lambda f: [f["whole"][what] / f[name][what] for what in ("head_tokens", "cpu")]


FEWER = [
    (
        "fewer: heads, prompts, tokens in a prompt",
        lambda f: [f["heads"], f["prompts"], f["length"]],
        "",
        None,
    ),
    ("  CPU s: whole run", lambda f: f["whole"]["cpu"], "", None),
    ("  saved by the top share: head-tokens, CPU", _saved("top_share"), "", None),
    ("    largest difference of a statistic", lambda f: f["top_share"]["differs"], "", None),
    ("  widest interval of a layer in the whole run: +-", lambda f: f["widest"]["layers"], "", None),
    ("  saved by layers known to that: head-tokens, CPU", _saved("layers"), "", None),
    ("    layers that agree, of", lambda f: f["layers"]["agree"], "", None),
    ("  widest interval of a head in the whole run: +-", lambda f: f["widest"]["heads"], "", None),
    ("  saved by heads known to that: head-tokens, CPU", _saved("each_head"), "", None),
    ("    heads that agree, of", lambda f: f["each_head"]["agree"], "", None),
    ("  tokens of text, growing", lambda f: f["texts"], "", None),
    (
        "    head-tokens saved, layers to +-0.1",
        lambda f: f["grown"]["0.1"]["saved"],
        ">= 10",
        lambda x: x[-1] >= 10,
    ),
    ("    head-tokens saved, layers to +-0.05", lambda f: f["grown"]["0.05"]["saved"], "", None),
]
"""What a whole run may leave out. Agreeing: the whole run's mean lies in the interval."""
