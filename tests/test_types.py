"""What a checker says of a user's script: the plain one passes, and each mistake is flagged at its line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import selfrepair_nn

PACKAGE = Path(selfrepair_nn.__file__).parent

PLAIN = """
from pathlib import Path

import numpy as np
import selfrepair_nn as sr

ds = sr.run("heads", model="tiny-neox", tokens=512)
sr.run(Path("mine.py"), tokens=np.int64(512), layers=range(2), heads=[(1, 2)], share=np.float32(0.1), out=Path("x"))
sr.run("heads", model="tiny-neox", prompts=["one", "two"], param={"scale": 2}, components="top", check=False)
sr.preview("heads", calibrate=True, tokens=None)
sr.Options(tokens=5, shard=(1, 2))
means = sr.by_head(ds, share=0.02)
print(sr.summary(ds), sr.summary("outputs/x.zarr"), sr.analysis.by_layer(means), means.self_repair.mean())
sr.plot(ds, "outputs/figures")
sr.plot([ds, ds])
sr.plot({"a": ds})
sr.plot("outputs/x.zarr")
sr.plot(["x.zarr", Path("y.zarr")], names=["freeze"])
sr.write_report(Path("x.zarr"), "x.html")
graph = sr.Graph(ablate=sr.sweep([sr.Head(1, 2), sr.Mlp(3)]), replacement=sr.Scale(0.5))
sr.Variants("scale", {1: graph, 2: graph})
"""

MISTAKES = """
import selfrepair_nn as sr

sr.run("heads", tokens="x")
sr.run("heads", token=512)
sr.run(5)
sr.preview("heads", bos="maybe")
sr.Options("tiny-neox")
sr.Options(share="2%")
sr.Head("x", 1)
sr.Head(1)
sr.Graph(ablat=())
sr.by_head(5)
sr.by_head("x.zarr", shares=0.1)
sr.summary(None)
sr.plot(3)
sr.by_leyer
sr.run("heads", progress="yes")
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """The lines of each script in which the checker finds errors, with what it says."""
    folder = tmp_path_factory.mktemp("scripts")
    for name, script in (("plain", PLAIN), ("mistakes", MISTAKES)):
        (folder / f"{name}.py").write_text(script)
    (folder / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(PACKAGE.parent)]}))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", folder]
    ended = subprocess.run(command, capture_output=True, text=True)
    found = {"plain": {}, "mistakes": {}}
    for each in json.loads(ended.stdout)["generalDiagnostics"]:
        if each["severity"] == "error":
            name = "plain" if each["file"].endswith("plain.py") else "mistakes"
            found[name][each["range"]["start"]["line"]] = each["message"]
    return found


def test_a_plain_script_passes(said):
    assert not said["plain"]


@pytest.mark.parametrize("line", range(3, MISTAKES.count("\n")), ids=lambda n: MISTAKES.splitlines()[n])
def test_a_mistake_is_flagged(said, line):
    assert line in said["mistakes"]
