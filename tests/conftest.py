"""What the tests share: one thread, quiet libraries, the models of `families` wrapped once for the whole session."""

import gc
import os
import shutil
import signal
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

# Read when torch, transformers and huggingface_hub are first imported: light tests stay free of all three.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A store is many small files, each synced: where memory has room for them, tests need not wait for a disk.
MEMORY, ROOM = Path("/dev/shm"), 8e9
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# In the background, or under nohup, these are ignored, and so they would be in what the tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

SERVED = ("test_examples.py", "test_faults.py", "test_remote.py")
"""The files that have tests of a real server."""


def pytest_collection_finish():
    """What all tests import is not looked at again and again for garbage: that was a tenth of their time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_ignore_collect(collection_path, config):
    """Where only tests of a real server run, the other files are not even imported."""
    name = collection_path.name
    return True if _only_served(config) and name.startswith("test_") and name not in SERVED else None


def _only_served(config):
    words = config.option.markexpr.split()
    return words[:1] == ["served"] and "or" not in words


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that need a real server are marked, for `pytest -m served`; those that break it are the last."""
    for item in items:
        if "server" in item.fixturenames:
            if item.path.name not in SERVED:
                raise pytest.UsageError(f"{item.nodeid} needs a server: name its file in SERVED, in {__file__}")
            item.add_marker("served")
    items.sort(key=lambda item: "ndif" in item.fixturenames)


@pytest.fixture(scope="session")
def wrapped():
    """wrapped(name, **options): a model of `families.build`, as the package takes it; made once, so never change it."""

    @cache
    def made(name, **options):
        import families

        from selfrepair_nn.models.load import wrap

        return wrap(families.build(name, **options))

    return made


@pytest.fixture(scope="session")
def seeded(wrapped):
    """seeded(name, prompts, length, seed): random token ids int64 [prompt, position] of a model's vocabulary."""
    import families

    def drawn(name, prompts=4, length=8, seed=0):
        return families.random_ids(wrapped(name).nn._module, prompts, length, seed)

    return drawn


@pytest.fixture
def measure(wrapped, seeded, tmp_path):
    """measure(name, **choices): a heads run of an exact model on the seeded prompts, as a loaded dataset.

    Without the proof that comes before every run, unless that is chosen: a test has its own.
    """
    import families

    import selfrepair_nn as sr

    def measured(name, exact=True, **choices):
        choices = {"prompts": seeded(name), "components": "all", "check": False} | choices
        if choices.get("ablation", "resample") == "resample":
            choices.setdefault("partners", families.derangement(len(choices["prompts"])))
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.zarr"
        return sr.run(model=wrapped(name, exact=exact), out=out, progress=False, **choices).load()

    return measured


@pytest.fixture
def hardly_written(monkeypatch):
    """Figures are drawn; what takes long is their layout and their files, which tests of figures look at."""
    from matplotlib.figure import Figure

    def write(figure, where, **_):
        where.write(b"<svg/>") if hasattr(where, "write") else Path(where).write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", write)


@pytest.fixture
def no_figures(monkeypatch):
    """Pages without figures, which take longest of a page; tests of figures look at them."""
    from selfrepair_nn import figures

    monkeypatch.setattr(figures, "drawn", lambda *_, **__: ())


@pytest.fixture
def patient(monkeypatch):
    """A clock that patience with servers goes by: it stands still but for the pauses before something is tried again.

    So these take no time, and a machine that stalls ends no patience.
    """
    from types import SimpleNamespace

    import tenacity
    from fake_service import Clock

    clock = Clock()
    monkeypatch.setattr(tenacity, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(tenacity.nap, "time", clock)
    return clock


@pytest.fixture(scope="session")
def server(request, tmp_path_factory):
    """An NDIF server, started once for all tests; who breaks it takes `ndif`. Skips, loudly, where none can run.

    It is sandboxed; with `trusted_env` requests run beside the weights. Under "local/…" it has the embedded models,
    tiny-neox in bfloat16 too, and for thorough tests SmolLM2 where that can be had. Deployed only when they are asked
    for: "late", "impatient", which is slow and has a time limit, and "broken", which has no weights.
    """
    from ndif_server import Ndif, missing
    from smollm2 import Unavailable, smollm2

    from selfrepair_nn.models.load import EMBEDDED, find

    required = os.environ.get("SELFREPAIR_REQUIRE_SERVER") == "1"
    if (reason := missing()) and not required:
        pytest.skip(f"NOTHING WAS TRIED ON A REAL NDIF SERVER: {reason}")
    models = {f"local/{name}": find(name).location for name in EMBEDDED}
    models["local/tiny-neox-bfloat16"] = models["local/tiny-neox"]
    if any(item.get_closest_marker("thorough") for item in request.session.items):
        try:
            models["local/smollm2"] = smollm2()
        except Unavailable:
            if required:
                raise
    whole, broken = models["local/tiny-neox"], tmp_path_factory.mktemp("models") / "broken"
    shutil.copytree(whole, broken, ignore=shutil.ignore_patterns("*.safetensors"))
    later = {"local/late": whole, "local/impatient": whole, "local/broken": broken}
    more = {
        "deploy": list(models),
        "special": {
            "local/tiny-neox-bfloat16": {"dtype": "bfloat16"},
            "local/impatient": {"execution_timeout_seconds": 3.0},
        },
        "slow": {"local/impatient": 1 / 150},
    }
    with Ndif(models | later, "sandboxed", **more) as running:
        yield running


@pytest.fixture(scope="session")
def ndif(server):
    """The same, to be broken: each test leaves it whole, and is later than all that do not."""
    return server


@pytest.fixture(scope="session")
def far(server, tmp_path_factory):
    """Clients of the server: they have a key that it trusts, and no weights."""
    from far import Far

    with Far(server.trusted_env, tmp_path_factory.mktemp("far")) as clients:
        yield clients


@pytest.fixture(scope="session")
def undisturbed(server, far, tmp_path_factory):
    """The store of a `far.RUN` of tiny-neox on the server, which nothing has disturbed."""
    from far import RUN

    store = tmp_path_factory.mktemp("undisturbed") / "s.zarr"
    ended = far.run("run", "heads", "--model", "local/tiny-neox", "--host", server.url, "--out", store, *RUN)
    assert ended.code == 0, ended.err
    return store


def pytest_terminal_summary(terminalreporter):
    """Say what was not tested and why, even when pytest is quiet: a skipped proof is no proof."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    if reasons:
        terminalreporter.section("NOT TESTED", sep="!")
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")
