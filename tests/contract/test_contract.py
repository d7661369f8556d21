"""What fasttrace asks of diffusers and transformers: every family, from a saved folder and back.

`.ci/contract` runs this under the oldest and the newest versions that pyproject.toml claims.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

import fasttrace
from fasttrace import Editor, Tracer, load_edit
from fasttrace.adapters.catalogue import list_sites
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.engine.base import CLEAN, CORRUPT, Pair
from fasttrace.engine.fast import FastEngine
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.forecast import architecture
from fasttrace.plan.lanes import RUN
from fasttrace.testing import runs_of
from fasttrace.testing.tiny import FAMILIES
from fasttrace.types import Probe, Sampling

pytestmark = [
    pytest.mark.contract,
    pytest.mark.filterwarnings("ignore:`callback_steps` is deprecated"),
]

ROOT = Path(__file__).parents[2]
PROMPT, STEPS = "a photo of a big dog", 2
STABLE = tuple(name for name in FAMILIES if not name.startswith("kandinsky"))
LORAS = {"peft": "pytorch_lora_weights.safetensors", "kohya": "kohya.safetensors"}
# Layers of a text encoder lie in `text_model` before this version.
FLATTENED = Version("5.6")


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def picture_of(pipe: Any) -> Tensor:
    """[1, 3, 16, 16] in [0, 1], from the pipeline's own call."""
    found: Tensor = pipe(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    return (found / 2 + 0.5).clamp(0, 1) if "Kandinsky" in type(pipe).__name__ else found


def clean_of(pipe: Any, engine: Any) -> Tensor:
    """The same picture, from an engine."""
    with scope(pipe):
        model, sampling = Model(pipe), Sampling(STEPS, 3.0, 16, 16)
        start = model.start(sampling, 3)
        text = model.text(PROMPT, "", True, start)
        pair = Pair({CLEAN: text, CORRUPT: text}, CORRUPT, start, sampling, ())
        return model.decode(runs_of(engine(model), pair)[CLEAN])


def rows_of(pipe: Any, engine: str, component: str) -> list[Any]:
    tracer = Tracer(pipe, engine=engine)
    more = {"tokens": ["last subject", "EOS"]} if component == "text_encoder" else {}
    plan = tracer.plan(
        Probe(PROMPT, "dog"), component=component, steps=STEPS, metric="latent_recovery", **more
    )
    return [row for row, _ in tracer.iter_rows(plan, pictures=False)]


@pytest.mark.parametrize("name", ["diffusers", "transformers"])
def test_the_versions_are_those_that_were_asked_for(name):
    column = os.environ.get("CONTRACT")
    if column not in ("oldest", "newest"):
        pytest.skip("whatever is installed: .ci/contract asks for versions")
    lines = (ROOT / ".ci" / "contract.txt").read_text(encoding="utf-8").splitlines()
    _, oldest, newest = next(line.split() for line in lines if line.startswith(f"{name} "))
    assert version(name) == {"oldest": oldest, "newest": newest}[column]


def test_the_layout_of_text_encoders(loaded):
    """Both are resolved; which of them is tested follows from the version."""
    encoder = loaded("sd").text_encoder
    assert hasattr(encoder, "text_model") == (Version(version("transformers")) < FLATTENED)
    projected = loaded("sdxl").text_encoder_2
    assert len(Model(loaded("sdxl")).encoders) == 2
    assert hasattr(projected, "text_projection")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_lists_the_sites_of_its_pipeline(family, folders, loaded):
    tracer = Tracer(loaded(family))
    for component in ("unet", "text_encoder"):
        listed = [site.name for site in list_sites(str(folders[family]), component)]
        assert listed == [site.name for site in tracer.sites(component)]
        assert len(listed) > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clean_run_is_the_pipelines_own(family, loaded):
    pipe = loaded(family)
    expected = picture_of(pipe)
    for engine in (ReferenceEngine, FastEngine):
        torch.testing.assert_close(clean_of(pipe, engine), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace(family, component, loaded):
    found = {e: rows_of(loaded(family), e, component) for e in ("reference", "fast")}
    scores = {name: torch.tensor([row.score for row in rows]) for name, rows in found.items()}
    torch.testing.assert_close(scores["fast"], scores["reference"], rtol=0, atol=1e-4)
    ran = {round(row.effect, 6) for row in found["fast"] if row.status == RUN}
    assert len(ran) > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_saved_and_loaded(family, own_pipe, tmp_path):
    pipe = own_pipe(family)
    edit = Editor(pipe).edit([("big dog", "cat")])
    plain = picture_of(pipe)
    with edit.applied(pipe):
        expected = picture_of(pipe)
    assert rms(expected - plain) > 1e-3 * rms(plain)
    assert torch.equal(picture_of(pipe), plain)
    edit.save(tmp_path / "edit", forms=["pipeline"], pipe=pipe)
    again = fasttrace.load(str(tmp_path / "edit" / "pipeline"))
    torch.testing.assert_close(picture_of(again), expected, rtol=0, atol=1e-4)
    with load_edit(tmp_path / "edit").applied(pipe):
        torch.testing.assert_close(picture_of(pipe), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("form", LORAS)
@pytest.mark.parametrize("family", STABLE)
def test_a_lora(family, form, own_pipe, tmp_path):
    """Text encoders and cross-attention, in one file that diffusers loads."""
    pipe = own_pipe(family)
    editor, pairs = Editor(pipe), [("big dog", "cat")]
    edit = editor.edit(pairs, method="uce", after=editor.edit(pairs))
    plain = picture_of(pipe)
    with edit.applied(pipe):
        expected = picture_of(pipe)
    assert rms(expected - plain) > 1e-3 * rms(plain)
    edit.save(tmp_path / "edit", forms=["peft", "kohya"])
    pipe.load_lora_weights(tmp_path / "edit", weight_name=LORAS[form])
    torch.testing.assert_close(picture_of(pipe), expected, rtol=0, atol=1e-4)


@pytest.fixture
def own_pipe(folders):
    """A pipeline that a test may change."""
    return lambda family: fasttrace.load(str(folders[family]))


@pytest.mark.parametrize("family", ["sd", "sdxl", "kandinsky22"])
def test_half_precision(family, folders):
    pipe = fasttrace.load(str(folders[family]), dtype="float16")
    parts = (pipe.unet, pipe.prior_text_encoder if "kand" in family else pipe.text_encoder)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float16}
    exact = clean_of(fasttrace.load(str(folders[family])), FastEngine)
    assert float((clean_of(pipe, FastEngine) - exact).abs().mean()) <= 0.02


def test_a_variant(folders, tmp_path):
    pipe = fasttrace.load(str(folders["sd"]))
    pipe.save_pretrained(tmp_path / "model", variant="fp16")
    found = fasttrace.load(str(tmp_path / "model"), variant="fp16")
    assert torch.equal(picture_of(found), picture_of(pipe))


def test_a_full_size_graph():
    """On fake tensors: Stable Diffusion 1.5's sites and FLOPs a row."""
    _, denoiser = architecture("sd15")
    work = denoiser.cost.whole + denoiser.text_cost + denoiser.step_cost
    assert work == pytest.approx(0.803e12, rel=0.01)
    sites = {site.name for site in list_sites("sd15")}
    outputs = {m.name for m in denoiser.marks.values() if m.kind == "output"}
    assert len(sites & outputs) == len(sites) == 70
