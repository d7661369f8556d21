"""Which sites there are, in which order and of which shape."""

from collections import Counter
from itertools import pairwise

import pytest
import torch

from fasttrace.adapters.catalogue import list_sites, notes
from fasttrace.adapters.hooks import watching
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.adapters.selection import select_sites
from fasttrace.errors import UsageError

STAGES = ("down", "mid", "up")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("sd14", 70),
        ("sd15", 70),
        ("openjourney", 70),
        ("sd21", 70),
        ("sdxl", 227),
        ("sdxl-turbo", 227),
    ],
)
def test_the_authors_own_counts(name, count):
    assert len(list_sites(name)) == count


@pytest.mark.parametrize("name", ["kandinsky21", "kandinsky22", "if"])
def test_attention_with_added_keys_and_values(name):
    """12 resnets and 9 attentions on the way down, 2 and 1 in the middle, 16 and 12 up."""
    sites = list_sites(name)
    assert Counter(s.kind for s in sites) == {"resnet": 30, "added_kv": 22}
    assert sites[0].shape[1:] == (64, 64)
    middle = [s.name for s in sites if "mid_block" in s.name]
    assert middle == [
        f"unet.mid_block.{part}" for part in ("resnets.0", "attentions.0", "resnets.1")
    ]
    first = next(s for s in sites if s.kind == "added_kv")
    assert first.name == "unet.down_blocks.1.attentions.0"
    assert first.aliases == ("added-kv-0-down",)
    assert any("added_kv" in sentence for sentence in notes(name))
    assert len(list_sites(name, sites="added_kv")) == 22


def test_what_is_listed_and_not_traced():
    for name in ("kandinsky21", "kandinsky22"):
        prior = list_sites(name, "prior")
        assert Counter(s.kind for s in prior) == {"attn1": 20, "ff": 20}
        assert prior[-1].name == "prior.transformer_blocks.19.ff"
        assert any("40 sites (20 attn1, 20 ff)" in s and "not traced" in s for s in notes(name))
    assert any("not traced" in sentence for sentence in notes("if"))
    assert notes("sd15") == ()
    with pytest.raises(UsageError, match="'sdxl' has no prior"):
        list_sites("sdxl", "prior")
    with pytest.raises(UsageError, match="text encoder of 'if' has no sites"):
        list_sites("if", "text_encoder")


def test_text_encoders_of_kandinsky():
    """2.1: CLIP-L in the prior, XLM-Roberta in the decoder. 2.2: bigG in the prior."""
    both = Counter(s.component for s in list_sites("kandinsky21", "text_encoder"))
    assert both == {"prior_text_encoder": 3 * 12, "text_encoder": 3 * 24}
    assert Counter(s.component for s in list_sites("kandinsky22", "text_encoder")) == {
        "prior_text_encoder": 3 * 32
    }


@pytest.mark.parametrize("family", ["sd21", "sdxl-turbo", "kandinsky21", "kandinsky22"])
def test_a_folder_lists_what_its_pipeline_has(family, folders, loaded):
    model = Model(loaded(family))
    assert list_sites(str(folders[family])) == list(model.sites(16, 16).sites)
    own = [site for encoder in model.encoders for site in encoder.sites()]
    assert list_sites(str(folders[family]), "text_encoder") == own
    assert bool(notes(str(folders[family]))) == family.startswith("kandinsky")


def test_sd15_in_detail():
    sites = list_sites("sd15")
    kinds = {k: sum(s.kind == k for s in sites) for k in ("resnet", "attn1", "attn2", "ff")}
    assert kinds == {"resnet": 22, "attn1": 16, "attn2": 16, "ff": 16}
    assert [s.index for s in sites] == list(range(70))
    stages = [STAGES.index(s.name.split(".")[1].split("_")[0]) for s in sites]
    assert stages == sorted(stages)  # registration order has up before mid
    assert [s.name for s in sites[:4]] == [
        "unet.down_blocks.0.resnets.0",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff",
    ]
    shapes = {s.name: s.shape for s in sites}
    assert shapes["unet.down_blocks.0.resnets.0"] == (320, 64, 64)
    assert shapes["unet.mid_block.attentions.0.transformer_blocks.0.attn2"] == (64, 1280)
    assert shapes["unet.up_blocks.3.resnets.2"] == (320, 64, 64)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_aliases_are_unique_and_resolve(name):
    sites = list_sites(name)
    aliases = [a for s in sites for a in s.aliases]
    assert len(set(aliases)) == len(sites)
    for site in sites[:: len(sites) // 7]:
        assert select_sites(sites, site.aliases[0]) == [site]


def test_aliases_of_sd15():
    named = {s.aliases[0]: s.name for s in list_sites("sd15")}
    assert named["down-1-resnet-1"] == "unet.down_blocks.1.resnets.1"
    assert named["mid-0-resnet-1"] == "unet.mid_block.resnets.1"
    block = "attentions.{}.transformer_blocks.0"
    assert named["self-attn-0-down"] == f"unet.down_blocks.0.{block.format(0)}.attn1"
    assert named["cross-attn-3-down"] == f"unet.down_blocks.1.{block.format(1)}.attn2"
    assert named["ff-0-mid"] == f"unet.mid_block.{block.format(0)}.ff"
    assert named["cross-attn-8-up"] == f"unet.up_blocks.3.{block.format(2)}.attn2"


def test_a_saved_folder_lists_what_a_loaded_pipeline_does(tiny, folders):
    model = Model(tiny)
    size = model.default("height")
    assert list_sites(str(folders[model.name])) == list(model.sites(size, size).sites)


def test_order_and_shapes_are_those_of_a_real_run(tiny, probe):
    model = Model(tiny)
    size = model.default("height")
    seen = []
    with (
        scope(tiny),
        watching(model.unet_modules(), lambda n, o: seen.append((n, o.shape[1:]))),
    ):
        tiny(probe.prompt, num_inference_steps=1, output_type="latent")
    layout = model.sites(size, size)
    for sites in (layout.sites, layout.whole):
        names = {s.name for s in sites}
        ours = [(name, shape) for name, shape in seen if name in names]
        assert ours == [(s.name, torch.Size(s.shape)) for s in sites]
    assert len(seen) == len(layout.every)


def test_shapes_follow_the_picture(sd):
    model = Model(sd)
    small, large = model.sites(16, 16).sites, model.sites(32, 48).sites
    assert small[0].shape == (8, 8, 8)
    assert large[0].shape == (8, 16, 24)
    assert [s.name for s in small] == [s.name for s in large]


def test_text_fed_sites(tiny):
    layout = Model(tiny).sites(16, 16)
    assert layout.text_fed == {s.name for s in layout.sites if s.kind == "attn2"}


def test_discovery_leaves_weights_alone(sd):
    before = {n: (p.data_ptr(), p._version, p.device.type) for n, p in sd.unet.named_parameters()}
    Model(sd).sites(16, 16)
    after = {n: (p.data_ptr(), p._version, p.device.type) for n, p in sd.unet.named_parameters()}
    assert before == after


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        ("paper", 70),
        ("all", 91),
        ("attn2", 16),
        ("all attn2", 16),
        ("resnet", 22),
        ("unet.mid_block.*", 5),
        ("mid_block.*", 5),
        ("self-attn-*-up", 9),
        (["resnet", "down-0-resnet-0", "ff"], 38),
    ],
)
def test_selection(wanted, count):
    sites = list_sites("sd15", sites=wanted)
    assert len(sites) == count
    assert all(a.index < b.index for a, b in pairwise(sites))


def test_whole_transformers_and_blocks_are_sites_beyond_the_default_set():
    kinds = [s.kind for s in list_sites("sd15", sites="all")]
    assert (kinds.count("transformer"), kinds.count("block")) == (16, 5)
    assert len(kinds) == 70 + 16 + 5
    blocks = [s.name for s in list_sites("sdxl", sites="block")]
    assert blocks == ["unet.mid_block", *(f"unet.up_blocks.{i}" for i in range(3))]
    assert not {"transformer", "block"} & {s.kind for s in list_sites("sdxl")}
