"""Plans as data: what is read back, what is one plan, and what is refused before anything runs."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fasttrace.errors import UsageError
from fasttrace.plan.request import Limits, PlanRequest, parse_plan, read_plan
from fasttrace.types import Corruption, Probe

PLAN: dict[str, Any] = {
    "model": "embedded",
    "probes": [{"prompt": "a photo of a dog", "subject": "dog", "attribute": "object"}],
    "seeds": [0, 3],
    "sites": ["attn2"],
    "windows": [[0, 2], [0.0, 0.5]],
    "steps": 4,
    "guidance": 3,
    "metrics": ["latent_recovery"],
}


def test_json_out_and_in():
    plan = parse_plan(PLAN)
    again = parse_plan(plan.to_json())
    assert again == plan
    assert again.digest() == plan.digest()
    assert plan.probes_and_seeds() == {Probe("a photo of a dog", "dog", "object"): [0, 3]}
    assert plan.corruption.corruption() == Corruption()
    # Whole numbers are calls, fractions are shares: neither becomes the other.
    assert [[type(v) for v in pair] for pair in again.asked_windows()] == [[int] * 2, [float] * 2]


def test_digest_is_of_the_values():
    plan = parse_plan(PLAN)
    turned = dict(reversed(PLAN.items()))
    assert parse_plan(json.dumps(turned, indent=7)).digest() == plan.digest()
    assert parse_plan(PLAN | {"branch": "cond"}).digest() == plan.digest()
    assert parse_plan(PLAN | {"guidance": 3.0}).digest() == plan.digest()
    others = [
        PLAN | {"branch": "both"},
        PLAN | {"seeds": [3, 0]},
        PLAN | {"windows": [[0, 2]]},
        PLAN | {"corruption": {"seed": 1}},
        PLAN | {"engine": {"name": "reference"}},
    ]
    digests = {parse_plan(other).digest() for other in others}
    assert len(digests) == len(others)
    assert plan.digest() not in digests


PROBE = PLAN["probes"][0]
REFUSED: dict[str, tuple[Any, str]] = {
    "unknown key": ({"exec": "rm"}, "exec: Extra inputs"),
    "unknown key inside": ({"probes": [PROBE | {"path": "/etc"}]}, "probes.0.path: Extra"),
    "a number for words": ({"sites": [3]}, "sites.0: Input should be a valid string"),
    "words for a number": ({"steps": "4"}, "steps: Input should be a valid integer"),
    "truth for a number": ({"steps": True}, "steps: Input should be a valid integer"),
    "a share of a step": ({"steps": 2.5}, "steps"),
    "no probes": ({"probes": []}, "probes: List should have at least 1"),
    "negative seed": ({"seeds": [-1]}, "seeds.0: Input should be greater"),
    "huge seed": ({"seeds": [2**63]}, "seeds.0: Input should be less"),
    "steps": ({"steps": Limits.STEPS + 1}, "steps: Input should be less"),
    "height": ({"height": 10**9}, "height: Input should be less"),
    "pixels": ({"height": Limits.SIDE, "width": Limits.SIDE}, "million pixels"),
    "pixels, one side": ({"height": Limits.SIDE}, "million pixels"),
    "lanes": ({"engine": {"lanes": 10**6}}, "engine.lanes: Input should be less"),
    "an engine of its own": ({"engine": {"name": "/bin/sh"}}, "engine.name"),
    "options of the other": ({"engine": {"name": "reference", "lanes": 8}}, "takes no options"),
    "many metrics": ({"metrics": ["a"] * (Limits.METRICS + 1)}, "metrics: List should have at"),
    "many windows": ({"windows": [[0, 1]] * 1001}, "windows: List should have at most"),
    "window of three": ({"windows": [[0, 1, 2]]}, "windows.0: List should have at most 2"),
    "long prompt": (
        {"probes": [PROBE | {"prompt": "a" * (Limits.TEXT + 1)}]},
        "probes.0.prompt: String should have at most",
    ),
    "one probe twice": ({"probes": [PROBE, PROBE | {"seeds": [7]}]}, "one probe twice"),
    "a path as model": ({"model": "../secret"}, "a plan names 'embedded' or a hub id"),
    "an absolute path": ({"model": "/etc/passwd"}, "a plan names 'embedded' or a hub id"),
    "dots in a hub id": ({"model": "a/b..c"}, "a plan names 'embedded' or a hub id"),
    "a path in a metric": ({"metrics": ["clip:./model"]}, "The plan's CLIP model is"),
    "NUL": ({"sites": ["attn2\0"]}, "NUL character"),
    "half a surrogate": ({"sites": ["\ud800"]}, "sites.0: Input should be a valid string"),
    "another format": ({"format": "shell script"}, "format"),
    "a later version": ({"version": 2}, "version"),
    "infinite": ({"guidance": float("inf")}, "guidance"),
    "not a number": ({"corruption": {"sigma": float("nan")}}, "corruption.sigma"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_sentence(name):
    change, expected = REFUSED[name]
    with pytest.raises(UsageError) as caught:
        parse_plan(PLAN | change)
    sentence = str(caught.value)
    assert expected in sentence
    assert "\n" not in sentence
    assert len(sentence) < 400


def test_many_pairs():
    probes = [PROBE | {"prompt": f"a photo of a dog {i}"} for i in range(101)]
    with pytest.raises(UsageError, match="101000 pairs"):
        parse_plan(PLAN | {"probes": probes, "seeds": list(range(1000))})


TEXTS: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "not JSON"),
    "a list": ("[]", "a JSON object, {...}; this is something else"),
    "NaN": ('{"guidance": NaN}', "NaN, which is no finite number"),
    "infinite": ('{"guidance": -Infinity}', "no finite number"),
    "overflow": ('{"probes": [{"prompt": "a", "subject": "a"}], "guidance": 1e999}', "guidance"),
    "twice": ('{"seeds": [1], "seeds": [2]}', "'seeds' twice"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "deep objects": ('{"a":' * 200 + "1" + "}" * 200, "nested too deeply"),
    "many digits": ('{"steps": 1' + "0" * 5000 + "}", "not JSON"),
    "much": ('{"a": "' + "x" * Limits.FILE + '"}', "4 MiB"),
    "escape codes": ('{"\\u001b[2Jred": 1}', "2Jred"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_refused(name):
    text, expected = TEXTS[name]
    for given_text in (text, text.encode()):
        with pytest.raises(UsageError) as caught:
            parse_plan(given_text)
        assert expected in str(caught.value)
        assert str(caught.value).isprintable()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(PlanRequest.model_fields)), JSON, max_size=4))
def test_any_data_is_a_plan_or_a_sentence(change):
    try:
        plan = parse_plan(PLAN | change)
    except UsageError:
        return
    assert parse_plan(plan.to_json()) == plan


@given(st.binary(max_size=60))
def test_any_bytes_are_a_plan_or_a_sentence(data):
    with pytest.raises(UsageError):
        parse_plan(data)


def test_files(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(parse_plan(PLAN).to_json(), encoding="utf-8")
    assert read_plan(file) == parse_plan(PLAN)
    with pytest.raises(UsageError, match="is a folder"):
        read_plan(tmp_path)
    with pytest.raises(UsageError, match="is not there"):
        read_plan(tmp_path / "other.json")
    with file.open("r+b") as handle:
        handle.truncate(1 << 40)  # a sparse file of a TiB
    with pytest.raises(UsageError, match="4 MiB"):
        read_plan(file)


def test_a_hub_id_is_no_way_to_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse_plan(PLAN | {"model": "owner/model"})
    (tmp_path / "owner" / "model").mkdir(parents=True)
    with pytest.raises(UsageError, match="is a folder here"):
        parse_plan(PLAN | {"model": "owner/model"})


def test_a_plan_stays_as_it_was_read():
    plan = parse_plan(PLAN)
    with pytest.raises(ValidationError):
        plan.steps = 7
