"""Which matrices there are and which are refused, and what is read at their inputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.edit import inputs
from fasttrace.edit.inputs import read_embedding, read_text
from fasttrace.edit.matrices import encoder_of, find_matrix, find_sites, matrices_at
from fasttrace.edit.phrases import Fact, Facts, collect, parse_replacements
from fasttrace.edit.solver import solve_inputs, solve_moments
from fasttrace.errors import ModelError, UsageError
from fasttrace.testing import tiny_pipeline

PAIRS = parse_replacements([("big dog", "cat"), ("red", "blue house")], empty_new=False)
TEMPLATES = ("{}", "a photo of {}", "the {} in the house")


def near(found: torch.Tensor, expected: torch.Tensor, digits: float) -> bool:
    return float((found - expected).norm()) <= digits * float(expected.norm())


class TestFinding:
    def test_text_matrices(self, own, family, slow):
        pipe = own(family)
        model = Model(pipe)
        for kind, part in (("attn", "self_attn.out_proj"), ("mlp", "mlp.fc2")):
            sites = [s for s in find_sites(model, kind) if s.reaches != "nothing"]
            found = matrices_at(model, sites)
            last = {"sd": [3], "sdxl": [2, 3]}[family]
            assert [m.name for m in found] == [
                f"{e.name}.layers.{i}.{part}"
                for e, layers in zip(model.encoders, last, strict=True)
                for i in range(layers)
            ]
            for matrix in found:
                assert matrix.module is slow.module(pipe, matrix.name)
                assert matrix.of_text
                assert not matrix.weight.requires_grad
                assert matrix.bias is not None

    def test_cross_attention_in_execution_order(self, own, family, slow):
        pipe = own(family)
        model = Model(pipe)
        found = matrices_at(model, find_sites(model, "attn2"))
        names = {f"unet.{n}" for n, _ in pipe.unet.named_modules() if n.endswith(("to_k", "to_v"))}
        assert {m.name for m in found} == {n for n in names if ".attn2." in n}
        order = ["down_blocks", "mid_block", "up_blocks"]
        blocks = [order.index(m.name.split(".")[1]) for m in found]
        assert blocks == sorted(blocks)
        for matrix in found:
            assert matrix.module is slow.module(pipe, matrix.name)
            assert not matrix.of_text
            assert matrix.bias is None
            assert find_matrix(model, matrix.name).module is matrix.module

    def test_names_globs_and_lists(self, own):
        model = Model(own("sd"))
        one = "text_encoder.layers.1.self_attn"
        assert [s.name for s in find_sites(model, one)] == [one]
        assert [s.name for s in find_sites(model, "text_encoder.layers.*.mlp")] == [
            f"text_encoder.layers.{i}.mlp" for i in range(3)
        ]
        both = find_sites(model, [one, "unet.mid_block*attn2"])
        assert [s.name for s in both] == [
            one,
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2",
        ]
        assert [s.kind for s in find_sites(model, "cross-attn-0-mid")] == ["attn2"]

    @pytest.mark.parametrize("word", ["attn1", "resnet", "ff", "hidden"])
    def test_kinds_that_hold_no_matrix_of_an_edit(self, own, word):
        model = Model(own("sd"))
        with pytest.raises(UsageError, match=f"is of kind '{word}'; what can be edited is"):
            matrices_at(model, find_sites(model, word))

    @pytest.mark.parametrize("word", ["nowhere", "text_encoder.layers.7.mlp", "attn3", "mlps"])
    def test_no_such_site(self, own, word):
        with pytest.raises(UsageError, match="No site matches"):
            find_sites(Model(own("sd")), word)

    def test_a_site_that_reaches_nothing(self, own):
        model = Model(own("sdxl"))
        with pytest.raises(UsageError, match=r"layers\.2\.mlp can't reach the denoiser"):
            matrices_at(model, find_sites(model, "text_encoder.layers.2.mlp"))
        [pooled] = matrices_at(model, find_sites(model, "text_encoder_2.layers.2.mlp"))
        assert pooled.site.reaches == "pooled"

    @pytest.mark.parametrize(
        "name",
        ["text_encoder.layers.9.mlp.fc2", "text_encoder.layers.0.mlp.fc1", "unet.nowhere.to_k",
         "text_encoder_2.layers.0.mlp.fc2", "fc2", "", "unet.mid_block.resnets.0.conv1"],
    )  # fmt: skip
    def test_no_such_matrix(self, own, name):
        with pytest.raises((ModelError, UsageError)):
            find_matrix(Model(own("sd")), name)


class TestRefused:
    def found(self, pipe: Any, wanted: str) -> Any:
        model = Model(pipe)
        return matrices_at(model, find_sites(model, wanted))

    @pytest.fixture
    def pipe(self) -> Any:
        return tiny_pipeline("sd")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_nan(self, pipe, bad):
        with torch.no_grad():
            pipe.text_encoder.encoder.layers[0].mlp.fc2.weight[3, 4] = bad
        with pytest.raises(ModelError, match=r"layers\.0\.mlp\.fc2 holds NaN"):
            self.found(pipe, "mlp")
        assert len(self.found(pipe, "attn")) == 3

    def test_fused_projections(self, pipe):
        pipe.fuse_qkv_projections()
        with pytest.raises(ModelError, match=r"attn2 reads its fused projections.*unfuse_qkv"):
            self.found(pipe, "attn2")
        pipe.unfuse_qkv_projections()
        assert len(self.found(pipe, "attn2")) == 8

    def test_a_tied_weight(self, pipe):
        layers = pipe.text_encoder.encoder.layers
        layers[2].mlp.fc2.weight = layers[0].mlp.fc2.weight
        with pytest.raises(ModelError, match=r"layers\.0\.mlp\.fc2 is tied to another layer's"):
            self.found(pipe, "text_encoder.layers.0.mlp")

    @pytest.mark.parametrize("whole", [False, True])
    def test_a_module_in_two_places(self, pipe, whole):
        layers = pipe.text_encoder.encoder.layers
        if whole:
            layers[2].mlp = layers[0].mlp
        else:
            layers[2].mlp.fc2 = layers[0].mlp.fc2
        with pytest.raises(ModelError, match=r"layers\.0\.mlp\.fc2 is tied to another layer's"):
            self.found(pipe, "text_encoder.layers.0.mlp")

    def test_tied_across_two_encoders(self):
        pipe = tiny_pipeline("sdxl")
        pipe.text_encoder_2.text_model.encoder.layers[
            1
        ].mlp.fc2.weight = pipe.text_encoder.encoder.layers[0].mlp.fc2.weight
        with pytest.raises(ModelError, match="is tied to another layer's"):
            self.found(pipe, "text_encoder.layers.0.mlp")

    def test_a_lora(self, pipe):
        peft = pytest.importorskip("peft")
        pipe.text_encoder.add_adapter(peft.LoraConfig(target_modules=["out_proj"]))
        pipe.unet.add_adapter(peft.LoraConfig(target_modules=["to_v"]))
        with pytest.raises(ModelError, match=r"out_proj carries an adapter \(LoRA\); fuse it"):
            self.found(pipe, "attn")
        with pytest.raises(ModelError, match=r"to_v carries an adapter"):
            self.found(pipe, "attn2")
        assert len(self.found(pipe, "mlp")) == 3

    def test_meta(self, pipe):
        layer = pipe.text_encoder.encoder.layers[0].mlp.fc2
        model = Model(pipe)
        layer.weight = nn.Parameter(layer.weight.to("meta"))
        with pytest.raises(ModelError, match=r"fc2 is on the meta device"):
            matrices_at(model, find_sites(model, "mlp"))

    def test_integers(self, pipe):
        layer = pipe.text_encoder.encoder.layers[0].mlp.fc2
        layer.weight = nn.Parameter((layer.weight * 100).to(torch.int8), requires_grad=False)
        with pytest.raises(ModelError, match=r"fc2 is quantised \(Linear of int8\)"):
            self.found(pipe, "mlp")

    def test_other_layers(self, pipe):
        class Linear8bit(nn.Linear):
            pass

        mlp = pipe.text_encoder.encoder.layers[0].mlp
        mlp.fc2 = Linear8bit(32, 16)
        with pytest.raises(ModelError, match=r"fc2 is quantised \(Linear8bit of float32\)"):
            self.found(pipe, "mlp")
        mlp.fc2 = nn.Sequential(nn.Linear(32, 16))
        with pytest.raises(ModelError, match="fc2 is a Sequential; only plain linear layers"):
            self.found(pipe, "mlp")
        del mlp.fc2
        with pytest.raises(ModelError, match="fc2 is a NoneType"):
            self.found(pipe, "mlp")

    def test_inference_tensors(self):
        with torch.inference_mode():
            pipe = tiny_pipeline("sd")
        with pytest.raises(ModelError, match=r"under torch\.inference_mode\(\) and can't be"):
            self.found(pipe, "mlp")


def facts_of(pipe: Any, tokens: Any = "last_to_end", preserve: Any = ()) -> Facts:
    return collect(Model(pipe).encoders[0], PAIRS, TEMPLATES, tokens, preserve)


def modules_of(model: Model, name: str, wanted: str = "*") -> dict[str, Any]:
    sites = find_sites(model, [f"{name}.layers.{wanted}.self_attn", f"{name}.layers.{wanted}.mlp"])
    sites = [s for s in sites if s.reaches != "nothing"]
    return {m.name: m.module for m in matrices_at(model, sites)}


def slowly(rows: torch.Tensor, facts: Facts) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and goals [n, d], pair by pair, out of whole prompts."""
    keys, goals = [], []
    for fact in facts.facts:
        for i in range(fact.length):
            keys.append(rows[fact.prompt, fact.position + i])
            goal = torch.zeros_like(keys[-1])
            for prompt, place, share in fact.goal:
                goal += share * rows[prompt, place + i]
            goals.append(goal if fact.goal else keys[-1])
    return torch.stack(keys), torch.stack(goals)


class TestReading:
    """In float64, where a shorter or a padded run differs by rounding alone."""

    @pytest.mark.parametrize("tokens", ["last", "last_to_end", "aligned"])
    def test_every_layers_inputs_are_those_of_a_whole_padded_run(self, own, family, slow, tokens):
        pipe = own(family, torch.float64)
        model = Model(pipe)
        facts = facts_of(pipe, tokens)
        for encoder in model.encoders:
            modules = modules_of(model, encoder.name)
            assert len(modules) == (4 if family == "sdxl" and encoder.name == "text_encoder" else 6)
            whole = slow.read(pipe, modules, facts.prompts)
            with scope(pipe):
                reads = read_text(encoder, modules, kept(facts), 1.0)
            assert list(reads) == list(modules)
            for name, read in reads.items():
                keys, goals = slowly(whole[name][0], facts)
                assert near(torch.cat(read.keys), keys, 1e-12)
                assert near(torch.cat(read.goals), goals, 1e-12)

    def test_the_embedding_is_the_pipelines(self, own, family, slow):
        pipe = own(family, torch.float64)
        facts = facts_of(pipe, "aligned")
        with scope(pipe):
            read = read_embedding(Model(pipe), kept(facts), 1.0)
        keys, goals = slowly(slow.encode(pipe, facts.prompts), facts)
        assert near(torch.cat(read.keys), keys, 1e-12)
        assert near(torch.cat(read.goals), goals, 1e-12)

    @pytest.mark.parametrize("part", ["self_attn", "mlp"])
    def test_nothing_above_is_computed_and_nothing_stays(self, own, slow, part):
        pipe = own("sd")
        model, encoder = Model(pipe), Model(pipe).encoders[0]
        before, hooks = slow.encode(pipe, ["a dog"]), hooks_of(pipe)
        modules = {
            m.name: m.module
            for m in matrices_at(model, find_sites(model, f"text_encoder.layers.1.{part}"))
        }
        called: list[str] = []
        handles = [
            module.register_forward_pre_hook(lambda *_, n=name: called.append(n))
            for name, module in encoder.module.named_modules()
        ]
        with scope(pipe):
            read_text(encoder, modules, facts_of(pipe, "last"), 1.0)
        for handle in handles:
            handle.remove()
        assert "encoder.layers.0.mlp.fc2" in called
        assert f"encoder.layers.1.{part}" in called
        above = [n for n in called if "layers.2" in n or n == "final_layer_norm"]
        above += [n for n in called if part == "self_attn" and n.startswith("encoder.layers.1.mlp")]
        assert above == []
        assert hooks_of(pipe) == hooks
        assert torch.equal(slow.encode(pipe, ["a dog"]), before)
        out = pipe.text_encoder(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
        assert len(out.hidden_states) == 4

    def test_only_the_tokens_that_are_needed_are_run(self, own):
        pipe = own("sd")
        lengths: list[int] = []
        handle = pipe.text_encoder.embeddings.register_forward_hook(
            lambda *args: lengths.append(args[2].shape[1])
        )
        model = Model(pipe)
        for tokens in ("last", "last_to_end"):
            with scope(pipe):
                facts = facts_of(pipe, tokens)
                read_text(model.encoders[0], modules_of(model, "text_encoder", "0"), facts, 1.0)
        handle.remove()
        # "the blue house ...": the last target's second word is the fourth token
        assert lengths == [6, 24]

    def test_hooks_are_gone_after_an_error(self, own):
        pipe = own("sd")
        model, hooks = Model(pipe), hooks_of(pipe)
        modules = modules_of(model, "text_encoder")

        def fail(*_: Any) -> None:
            raise RuntimeError("from a module")

        handle = pipe.text_encoder.encoder.layers[1].mlp.fc1.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="from a module"), scope(pipe):
            read_text(model.encoders[0], modules, facts_of(pipe), 1.0)
        handle.remove()
        assert hooks_of(pipe) == hooks

    def test_prompts_in_parts(self, own, monkeypatch):
        pipe = own("sd", torch.float64)
        model, facts = Model(pipe), kept(facts_of(pipe, "last_to_end", ("style",)))
        modules = modules_of(model, "text_encoder")

        def read() -> dict[str, Any]:
            with scope(pipe):
                found = read_text(model.encoders[0], modules, facts, 2.0)
                return found | {"": read_embedding(model, facts, 2.0)}

        whole = read()
        monkeypatch.setattr(inputs, "AT_ONCE", 3)
        parts = read()
        for name, one in whole.items():
            assert len(parts[name].keys) > 2
            assert near(torch.cat(parts[name].keys), torch.cat(one.keys), 1e-12)
            assert near(torch.cat(parts[name].goals), torch.cat(one.goals), 1e-12)

    def test_more_prompts_than_fit_one_pass(self, own, slow):
        pipe = own("sd", torch.float64)
        colours, things = ("red", "blue", "big", "tiny"), ("dog", "cat", "car", "house")
        phrases = [f"{c} {d} {t}" for c in colours for d in colours for t in things]
        pairs = parse_replacements([(p, f"the {p}") for p in phrases], empty_new=False)
        facts = collect(Model(pipe).encoders[0], pairs, ["a {}", "{} in"], "last")
        assert len(facts.prompts) == 256 > 2 * inputs.AT_ONCE - 1
        runs: list[int] = []
        handle = pipe.text_encoder.register_forward_pre_hook(
            lambda _m, _a, k: runs.append(len(k["input_ids"])), with_kwargs=True
        )
        modules = modules_of(Model(pipe), "text_encoder", "0")
        with scope(pipe):
            reads = read_text(Model(pipe).encoders[0], modules, kept(facts), 1.0)
        handle.remove()
        assert runs == [128, 128]
        whole = slow.read(pipe, modules, facts.prompts)
        for name, read in reads.items():
            keys, goals = slowly(whole[name][0], facts)
            assert near(torch.cat(read.keys), keys, 1e-12)
            assert near(torch.cat(read.goals), goals, 1e-12)

    def test_what_is_preserved_weighs(self, own, slow):
        pipe = own("sd", torch.float64)
        facts = kept(facts_of(pipe, "last", ("style", "a house")))
        with scope(pipe):
            read = read_embedding(Model(pipe), facts, 9.0)
        keys, _ = slowly(slow.encode(pipe, facts.prompts), facts)
        n = sum(not f.goal for f in facts.facts)
        assert n == 2 * len(TEMPLATES)
        assert near(torch.cat(read.keys)[:-n], keys[:-n], 1e-12)
        assert near(torch.cat(read.keys)[-n:], 3 * keys[-n:], 1e-12)
        assert torch.equal(torch.cat(read.goals)[-n:], torch.cat(read.keys)[-n:])

    @pytest.mark.parametrize("lams", [[0.01], [0.01, 1.0]])
    def test_more_pairs_than_inputs_give_the_change_of_all_of_them(self, own, slow, lams):
        pipe = own("sd", torch.float64)
        model, facts = Model(pipe), facts_of(pipe, "last_to_end", ("style",))
        assert facts.pairs > 32
        modules = modules_of(model, "text_encoder")
        whole = slow.read(pipe, modules, facts.prompts)
        whole[""] = slow.encode(pipe, facts.prompts), torch.empty(0)
        with scope(pipe):
            reads = read_text(model.encoders[0], modules, facts, 1.0)
            reads[""] = read_embedding(model, facts, 1.0)
        for name, read in reads.items():
            assert read.keys == []
            weight = torch.eye(read.width, dtype=torch.float64)
            keys, goals = slowly(whole[name][0], facts)
            for lam, found, kept_ in zip(
                lams,
                solve_moments(read.moments, lams),
                solve_inputs(keys, goals, lams),
                strict=True,
            ):
                system = keys.T @ keys + lam * weight
                dense = torch.linalg.solve(system, keys.T @ (goals - keys)).T
                assert near(found.of(weight).dense, dense, 1e-9)
                assert near(kept_.of(weight).dense, dense, 1e-9)


def kept(facts: Facts) -> Facts:
    """Pairs that are kept, though there are more of them than inputs."""

    class Few(Facts):
        @property
        def pairs(self) -> int:
            return 0

    return Few(facts.prompts, facts.facts)


def hooks_of(pipe: Any) -> list[tuple[int, int]]:
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks))
        for part in (pipe.text_encoder, pipe.unet)
        for m in part.modules()
    ]


def test_the_encoder_of_a_site(own):
    model = Model(own("sdxl"))
    for encoder in model.encoders:
        assert all(encoder_of(model, site) is encoder for site in encoder.sites())


def test_a_copy_of_facts_is_the_same(own):
    facts = facts_of(own("sd"))
    assert copy.deepcopy(facts) == facts
    assert facts.facts[0] == Fact(0, 2, 24 - 2, ((1, 1, 1.0),))
