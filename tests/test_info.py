"""`environment()` describes any machine and raises on none."""

import sys

import pytest

from fasttrace import info


def facts():
    return {fact.name: fact for fact in info.environment()}


def test_describes_this_machine():
    found = facts()
    assert list(found) == [
        "python",
        "cores",
        "memory",
        "torch",
        "cuda",
        "triton",
        "compiled ops",
        "diffusers",
        "transformers",
        "peft",
        "xformers",
        "nvtx",
    ]
    assert found["python"].present
    assert found["torch"].sentence.startswith("torch 2.")
    assert found["compiled ops"].present, found["compiled ops"].sentence
    assert "interpreter" in found["triton"].sentence
    assert all(fact.sentence and "\n" not in fact.sentence for fact in found.values())


@pytest.mark.parametrize("error", [ImportError, RuntimeError, OSError, AttributeError])
def test_an_xformers_that_does_not_load(monkeypatch, error):
    def import_module(name):
        raise error(f"{name}: undefined symbol\nand a long story")

    monkeypatch.setattr(info, "_version", lambda name: "0.0.35")
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(info.importlib, "import_module", import_module)
    fact = info._xformers()
    assert not fact.present
    assert "xformers 0.0.35 does not load beside this torch" in fact.sentence
    assert f"{error.__name__}: xformers.ops: undefined symbol" in fact.sentence
    assert "long story" not in fact.sentence


@pytest.mark.parametrize("name", ["torch", "fasttrace_kernels"])
def test_a_missing_library_is_a_fact(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    found = facts()
    affected = found["torch" if name == "torch" else "compiled ops"]
    assert not affected.present
    assert "can't be used: ModuleNotFoundError" in affected.sentence


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(info, "_version", lambda name: None)
    found = facts()
    for name in ("diffusers", "transformers", "peft", "triton", "xformers"):
        assert not found[name].present
        assert f"{name} is not installed" in found[name].sentence
