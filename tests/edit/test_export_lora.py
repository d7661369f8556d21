"""A LoRA that was written loads in diffusers as the same edit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fasttrace_exports import (
    CALLS,
    FEW,
    LORAS,
    MID,
    PAIRS,
    assert_same_pictures,
    everywhere,
    latents_of,
)
from safetensors.torch import load_file

from fasttrace import Editor
from fasttrace.edit.edit import Edit
from fasttrace.edit.factors import factorise
from fasttrace.testing import tiny_pipeline


class TestLora:
    def check(self, edit: Edit, family: str, form: str, folder: Path) -> None:
        pytest.importorskip("peft")
        pipe = tiny_pipeline(family)  # type: ignore[arg-type]
        plain = latents_of(pipe)
        with edit.applied(pipe):
            expected = latents_of(pipe)
        edit.save(folder, forms=["peft", "kohya"])
        pipe.load_lora_weights(folder, weight_name=LORAS[form])
        assert_same_pictures(latents_of(pipe), expected, plain)
        pipe.unload_lora_weights()
        assert_same_pictures(latents_of(pipe), plain, expected)

    @pytest.mark.parametrize("form", LORAS)
    @pytest.mark.parametrize("call", CALLS)
    def test_sd(self, own, tmp_path, call, form):
        pairs = [("a big dog", "a big cat")] if call == "time" else PAIRS
        edit = Editor(own("sd")).edit(pairs, **CALLS[call])
        self.check(edit, "sd", form, tmp_path / "edit")

    @pytest.mark.parametrize("form", LORAS)
    @pytest.mark.parametrize("call", ["diffquickfix", "mlp", "uce", "few"])
    def test_sdxl(self, own, tmp_path, call, form):
        """diffquickfix: both text encoders; uce: keys and values."""
        edit = Editor(own("sdxl")).edit(PAIRS, **CALLS[call])
        self.check(edit, "sdxl", form, tmp_path / "edit")

    @pytest.mark.parametrize("form", LORAS)
    @pytest.mark.parametrize("options", [{}, FEW])
    def test_text_encoders_and_unet_at_once(self, own, family, tmp_path, form, options):
        """Ranks differ: of matrices, and of components."""
        edit = everywhere(own(family), **options)
        self.check(edit, family, form, tmp_path / "edit")

    @pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
    @pytest.mark.parametrize("form", LORAS)
    def test_one_encoder_of_two(self, own, tmp_path, name, form):
        edit = Editor(own("sdxl")).edit(PAIRS, site=f"{name}.layers.0.self_attn")
        assert list(edit.changes) == [f"{name}.layers.0.self_attn.out_proj"]
        self.check(edit, "sdxl", form, tmp_path / "edit")
        keys = load_file(tmp_path / "edit" / "kohya.safetensors")
        number = 2 if name == "text_encoder_2" else 1
        assert all(key.startswith(f"lora_te{number}_text_model_encoder_") for key in keys)

    def test_every_module_of_a_component_has_one_rank(self, own, tmp_path):
        """Loaders before diffusers 0.42 scale other ranks by what the first one is."""
        edit = everywhere(own("sd"))
        edit.save(tmp_path / "edit")
        ranks: dict[str, set[int]] = {}
        for key, tensor in load_file(tmp_path / "edit" / LORAS["peft"]).items():
            ranks.setdefault(key.split(".")[0], set()).add(tensor.shape["lora_B" in key])
        needed: dict[str, set[int]] = {}
        for name, change in edit.changes.items():
            needed.setdefault(name.split(".")[0], set()).add(factorise(change).rank)
        assert len(needed["unet"]) > 1
        assert ranks == {component: {max(all_)} for component, all_ in needed.items()}

    def test_keys(self, own, tmp_path):
        everywhere(own("sd"), **FEW).save(tmp_path / "edit")
        peft = load_file(tmp_path / "edit" / LORAS["peft"])
        kohya = load_file(tmp_path / "edit" / LORAS["kohya"])
        start = "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"
        assert {f"{start}.lora_A.weight", f"{MID}.to_v.lora_B.weight"} <= set(peft)
        start = "lora_te_text_model_encoder_layers_0_self_attn_out_proj"
        mid = "lora_" + MID.replace(".", "_") + "_to_v"
        ends = ("lora_down.weight", "lora_up.weight", "alpha")
        assert {f"{s}.{e}" for s in (start, mid) for e in ends} <= set(kohya)
        assert all(t.dtype == torch.float32 for t in (*peft.values(), *kohya.values()))
