"""The public face: every name is there, documented, and stays what it is once its room is imported."""

import inspect
import subprocess
import sys

import pytest

import selfrepair_nn as sr


@pytest.mark.parametrize("name", sr.__all__)
def test_every_public_name_is_a_documented_function_or_class(name):
    first, again = getattr(sr, name), getattr(sr, name)
    assert first is again
    assert not inspect.ismodule(first)
    assert inspect.getdoc(first)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(AttributeError, match="by_layer"):
        _ = sr.by_leyer


def test_importing_the_package_loads_nothing_heavy():
    heavy = "('torch', 'xarray', 'matplotlib', 'nnsight')"
    code = f"import sys, selfrepair_nn; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_results_need_no_torch():
    code = (
        "import sys, selfrepair_nn as sr; ds = sr.simulate_heads(); sr.by_layer(ds); sr.summary(ds); sr.plot; "
        "sr.write_report; sr.open_store; print([m for m in ('torch', 'transformers', 'nnsight') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
