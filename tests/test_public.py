"""The public face: every name is there, documented, and stays what it is once its room is imported."""

import ast
import inspect
import pydoc
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, SupportsFloat, SupportsIndex, get_args, get_origin

import pytest

import selfrepair_nn as sr
from selfrepair_nn.given import Given
from selfrepair_nn.options import Options, parameters

ROOT = Path(__file__).parents[1]
OPEN = {"ablation", "target", "freeze"}
"""Options whose choices are lists that grow with the engine: checkers take any text."""


@pytest.mark.parametrize("name", sr.__all__)
def test_every_public_name_is_a_documented_function_or_class(name):
    first, again = getattr(sr, name), getattr(sr, name)
    assert first is again
    assert not inspect.ismodule(first)
    assert inspect.getdoc(first)


def test_the_stub_offers_what_the_package_offers():
    """Names in `__all__` of the stub are what checkers and editors take as public."""
    stub = ast.parse((ROOT / "selfrepair_nn" / "__init__.pyi").read_text())
    (offered,) = [line.value for line in stub.body if isinstance(line, ast.Assign)]
    assert ast.literal_eval(offered) == sr.__all__
    assert {*sr.__all__, "analysis", "__version__"} == set(dir(sr))


@pytest.mark.parametrize("name", [n for n, (room, _) in sr._PLACES.items() if room.endswith(".analysis")])
def test_analysis_is_a_room_too(name):
    """Its functions take and refuse what those of the package do, a store's path too: they are the same ones."""
    assert getattr(sr.analysis, name) is getattr(sr, name)
    with pytest.raises(sr.UsageError, match="must be a dataset or the path of a store"):
        getattr(sr.analysis, name)(5)


# Options, for people and checkers


@pytest.mark.parametrize("function", [sr.run, sr.audit, sr.preview, sr.Options], ids=lambda f: f.__name__)
def test_signature_and_help_have_every_option(function):
    shown, said = inspect.signature(function).parameters, " ".join(inspect.getdoc(function).split())
    for option in fields(Options):
        parameter = shown[option.name]
        assert (parameter.kind, parameter.default) == (parameter.KEYWORD_ONLY, option.default)
        assert f"{option.name}: {option.metadata['help']}" in said
        for choice in option.metadata["choices"] or ():
            assert choice in said
    assert not any(p.kind is p.VAR_KEYWORD for p in shown.values())
    assert f"{function.__name__}(" in pydoc.plain(pydoc.render_doc(function))


def test_what_may_be_given_are_the_options():
    assert list(Given.__annotations__) == [option.name for option in fields(Options)]


def _kinds(annotation):
    return {get_origin(kind) or kind for kind in get_args(annotation) or (annotation,)}


@pytest.mark.parametrize("option", fields(Options), ids=lambda option: option.name)
def test_what_may_be_given_fits_what_is_kept(option):
    """What an option is kept as may be given, None stands for its default, and choices are those that there are."""
    (given,) = [each.annotation for each in parameters() if each.name == option.name]
    literal = [each for each in get_args(given) if get_origin(each) is Literal]
    if option.metadata["choices"] and option.name not in {"dtype", *OPEN}:
        assert [get_args(each) for each in literal] == [option.metadata["choices"]]
    else:
        assert not literal
    if given is not Any:
        assert NoneType in get_args(given)
        assert option.default is None or option.name == "param" or Options(**{option.name: option.default})
        wider = {int: SupportsIndex, float: SupportsFloat}
        kept = _kinds(option.type) - {NoneType, Any}
        accepted = _kinds(given) | ({str} if literal else set())
        assert {wider.get(kind, kind) for kind in kept} <= accepted


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


def test_what_a_dataset_lacks_is_a_mistake_in_words():
    """A dataset is a mapping too, of its variables."""
    import xarray as xr

    from selfrepair_nn.face import guarded

    def missing(ds: xr.Dataset) -> xr.DataArray:
        return ds["nowhere"]

    with pytest.raises(sr.UsageError, match="missing cannot read this dataset"):
        guarded(missing)(sr.simulate_heads(1, 1, 2, 1))
