"""`fasttrace info MODEL`: which kernel each site runs, here and on a GPU that isn't here."""

import json
from collections import Counter

import pytest

from fasttrace.adapters.catalogue import list_sites
from fasttrace.cli import main
from fasttrace.errors import UsageError
from fasttrace.kernels_used import kernels_of_model


@pytest.mark.parametrize(
    ("name", "heads"),
    [("sd15", {40: 10, 80: 10, 160: 12}), ("sd21", {64: 32}), ("sdxl", {64: 140})],
)
def test_every_attention_of_a_real_model_is_fused_on_cuda(name, heads):
    """SD 1.5: 16 self- and as many cross-attentions over heads of 40, 80 and 160."""
    used = kernels_of_model(name, "cuda", "fp16")
    expected = [site.name for site in list_sites(name) if site.kind in ("attn1", "attn2")]
    fused = [site for site in used.sites if site.attention.startswith("patch_attention")]
    assert [site.site for site in fused] == expected
    found = Counter(int(site.attention.split("head ")[1].split()[0]) for site in fused)
    assert found == heads
    cross = [site for site in fused if site.site.endswith("attn2")]
    assert all(site.attention.endswith(", 77 keys") for site in cross)
    assert not any(site.attention for site in used.sites if ".resnets." in site.site)


def test_heads_are_split_and_not_padded():
    used = kernels_of_model("sd15", "cuda", "fp16").sites
    by_head = {site.attention.split(",")[1].strip() for site in used if site.attention}
    assert by_head == {"head 40 as 32 + 16", "head 80 as 64 + 16", "head 160 as 128 + 32"}


def test_elsewhere_attention_is_torchs():
    for device, dtype in (("cpu", "fp32"), ("cuda", "fp32"), ("cpu", "bf16")):
        used = kernels_of_model("sd15", device, dtype)
        assert {s.attention.split(",")[0] for s in used.sites if s.attention} == {"torch attention"}
    asked = kernels_of_model("sd15", "cpu", "fp32", "fused")
    assert any(site.attention.startswith("patch_attention") for site in asked.sites)
    assert {site.patch for site in asked.sites} == {"patch_rows (C++)"}


def test_the_command(capsys):
    assert main(["info", "sd15", "--device", "cuda"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 71
    assert "patch_rows (Triton); patch_attention, head 40 as 32 + 16, 4096 keys" in lines[1]
    assert lines[-1] == "70 sites on cuda in fp16; guided_step (Triton) ends each call"
    assert main(["info", "embedded", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["sites"]) == len(list_sites("embedded"))


@pytest.mark.parametrize(
    "options", [{"device": "tpu"}, {"dtype": "fp8"}, {"attention": "magic"}], ids=str
)
def test_unknown_words(options):
    with pytest.raises(UsageError, match=next(iter(options.values()))):
        kernels_of_model("sd15", **options)
