"""What is written loads elsewhere as the same edit, and nothing half written is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasttrace import Editor, Replacement, load_edit
from fasttrace.edit import export
from fasttrace.edit.edit import Edit
from fasttrace.edit.factors import factorise
from fasttrace.edit.solver import Change
from fasttrace.errors import ModelError, StoreError, UsageError
from fasttrace.testing import tiny_pipeline

PAIRS = [("big dog", "cat")]
MID = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
FEW: dict[str, Any] = {"tokens": "last", "templates": ["{}", "a {}"]}  # rank 2: a LoRA is smaller
CALLS: dict[str, dict[str, Any]] = {
    "diffquickfix": {},
    "mlp": {"method": "mlp"},
    "uce": {"method": "uce"},
    "time": {"method": "time"},
    "locoedit": {"site": MID},
    "few": FEW,
    "few uce": {"method": "uce", **FEW},
}
LORAS = {"peft": "pytorch_lora_weights.safetensors", "kohya": "kohya.safetensors"}


def latents_of(pipe: Any) -> Tensor:
    found: Tensor = pipe(
        "a photo of a big dog",
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    return found


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def assert_same_pictures(found: Tensor, expected: Tensor, plain: Tensor) -> None:
    assert rms(expected - plain) > 1e-3 * rms(plain)
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, rms(expected))


def everywhere(pipe: Any, pairs: Any = PAIRS, **options: Any) -> Edit:
    """Text encoders, and the UNet on top."""
    editor = Editor(pipe)
    return editor.edit(pairs, method="uce", after=editor.edit(pairs, **options), **options)


@pytest.fixture
def edit(own: Any) -> Edit:
    return Editor(own("sd")).edit(PAIRS, **FEW)


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


class TestFactors:
    def changed(self, m: int, d: int, r: int, seed: int = 0) -> Change:
        generator = torch.Generator().manual_seed(seed)
        left, right = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((m, r), (r, d))
        )
        return Change(left, right)

    @pytest.mark.parametrize(("m", "d", "r"), [(20, 30, 4), (30, 20, 20), (8, 5, 30), (1, 9, 3)])
    def test_all_of_it(self, m, d, r):
        change = self.changed(m, d, r)
        found = factorise(change)
        assert found.rank == min(m, d, r)
        assert found.up.shape == (m, found.rank)
        assert found.down.shape == (found.rank, d)
        assert float((found.up @ found.down - change.dense).norm()) <= 1e-13 * float(
            change.dense.norm()
        )
        assert found.discarded <= 1e-13

    @pytest.mark.parametrize(("m", "d", "r"), [(20, 30, 9), (12, 7, 40)])
    @pytest.mark.parametrize("most", [1, 3, 6, 100])
    def test_truncated_is_the_best_of_its_rank(self, m, d, r, most):
        """Eckart and Young; the tail from the eigenvalues of the change times itself."""
        change = self.changed(m, d, r)
        found = factorise(change, most)
        kept = min(most, m, d, r)
        assert found.up.shape[1] == found.down.shape[0] == kept
        assert found.rank == min(m, d, r)
        dense = change.dense
        squares = torch.linalg.eigvalsh(dense @ dense.T).flip(0).clamp_min(0)
        tail = float((squares[kept:].sum() / squares.sum()).sqrt())
        assert found.discarded == pytest.approx(tail, rel=1e-9, abs=1e-7)
        lost = float((dense - found.up @ found.down).norm() / dense.norm())
        assert found.discarded == pytest.approx(lost, rel=1e-9, abs=1e-12)

    def test_rank_is_numerical(self):
        change = self.changed(20, 30, 4)
        twice = Change(
            torch.cat([change.left, change.left], 1), torch.cat([change.right, change.right], 0)
        )
        assert factorise(twice).rank == 4

    def test_no_change(self):
        found = factorise(Change(torch.zeros(5, 2).double(), torch.zeros(2, 7).double()))
        assert (found.rank, found.discarded) == (0, 0.0)
        assert float((found.up @ found.down).abs().max()) == 0

    def test_both_sides_are_of_one_size(self):
        change = self.changed(20, 30, 4)
        found = factorise(Change(change.left * 1e8, change.right * 1e-8))
        assert float(found.up.norm() / found.down.norm()) == pytest.approx(1, rel=1e-9)

    @pytest.mark.parametrize("rank", [1, 3])
    def test_a_truncated_export_says_what_it_left_out(self, own, tmp_path, rank, slow):
        pipe = own("sd")
        edit = everywhere(pipe)
        edit.save(tmp_path / "edit", rank=rank)
        written = json.loads((tmp_path / "edit" / "edit.json").read_text())
        peft = load_file(tmp_path / "edit" / LORAS["peft"])
        card = (tmp_path / "edit" / "README.md").read_text()
        loaded = load_edit(tmp_path / "edit")
        for name, change in edit.changes.items():
            values = torch.linalg.svdvals(change.dense)
            tail = float(values[rank:].norm() / values.norm())
            assert written["ranks"][name] == rank
            assert written["discarded"][name] == pytest.approx(tail, rel=1e-9)
            assert tail > 1e-3
            assert f"| `{name}` | {rank} | {tail:.2g} |" in card
            key = name.replace("text_encoder.", "text_encoder.text_model.encoder.")
            product = peft[f"{key}.lora_B.weight"].double() @ peft[f"{key}.lora_A.weight"].double()
            lost = float((product - change.dense).norm() / values.norm())
            assert lost == pytest.approx(tail, rel=1e-4)
            # what `evaluate` reads is the edit that was written
            read = loaded.changes[name].dense
            assert float((read - product).norm() / values.norm()) < 1e-6

    @pytest.mark.parametrize("rank", [0, -1, 1.5, True, "2"])
    def test_a_wrong_rank(self, edit, tmp_path, rank):
        with pytest.raises(UsageError, match="rank is .* a whole number above 0"):
            edit.save(tmp_path / "edit", rank=rank)
        assert list(tmp_path.iterdir()) == []


def same_changes(one: Edit, other: Edit) -> None:
    """To what float32 factors hold."""
    assert list(one.changes) == list(other.changes)
    for name, change in other.changes.items():
        lost = float((one.changes[name].dense - change.dense).norm() / change.dense.norm())
        assert lost <= 4e-7


class TestRoundTrip:
    @pytest.mark.parametrize("call", CALLS)
    def test_load_edit(self, own, family, tmp_path, call, slow):
        pipe = own(family)
        pairs = [("a big dog", "a big cat")] if call == "time" else PAIRS
        edit = Editor(pipe).edit(pairs, **CALLS[call])
        folder = edit.save(tmp_path / "new" / "edit")
        assert folder == tmp_path / "new" / "edit"
        loaded = load_edit(str(folder))
        assert loaded.manifest == edit.manifest
        assert str(loaded) == str(edit)
        assert loaded.fingerprint == edit.fingerprint
        assert loaded.parameters == edit.parameters
        same_changes(loaded, edit)
        with edit.applied(pipe):
            expected = {n: slow.module(pipe, n).weight.detach().clone() for n in edit.changes}
        before = slow.state(pipe)
        with loaded.applied(pipe):
            for name, weight in expected.items():
                found = slow.module(pipe, name).weight.detach()
                assert float((found - weight).norm()) <= 4e-7 * float(weight.norm())
        assert slow.state(pipe) == before
        again = load_edit(loaded.save(tmp_path / "again"))
        assert again.manifest == edit.manifest
        same_changes(again, edit)

    def test_an_edit_on_top_of_another(self, own, tmp_path):
        pipe = own("sd")
        edit = everywhere(pipe, [Replacement("dog", ("cat", "car"), 0.5, (1, 3))], preserve=["red"])
        loaded = load_edit(edit.save(tmp_path / "edit"))
        assert loaded.manifest == edit.manifest
        third = Editor(pipe).edit([("style", "blue")], after=loaded)
        assert third.manifest["after"][0] == edit.manifest["after"][0]

    def test_another_base_is_still_refused(self, edit, tmp_path):
        loaded = load_edit(edit.save(tmp_path / "edit"))
        with pytest.raises(ModelError, match="made on other weights"):
            loaded.apply_(tiny_pipeline("sd", seed=1))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_a_whole_pipeline(self, own, family, tmp_path, slow, dtype):
        pipe = own(family, dtype)
        edit = everywhere(pipe)
        before = slow.state(pipe)
        edit.save(tmp_path / "edit", forms=["pipeline"], pipe=pipe)
        assert slow.state(pipe) == before
        folder = tmp_path / "edit" / "pipeline"
        options = {"safety_checker": None} if family == "sd" else {}
        loaded = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **options)
        loaded.set_progress_bar_config(disable=True)
        with edit.applied(pipe):
            assert slow.state(loaded) == slow.state(pipe)
            if dtype == torch.float32:
                assert torch.equal(latents_of(loaded), latents_of(pipe))
        assert not (tmp_path / "edit" / LORAS["peft"]).exists()
        assert "DiffusionPipeline.from_pretrained" in (tmp_path / "edit/README.md").read_text()
        same_changes(load_edit(tmp_path / "edit"), edit)


class TestForms:
    def files(self, folder: Path) -> set[str]:
        return {path.name for path in folder.iterdir()}

    ALWAYS = {"edit.json", "edit.safetensors", "README.md"}  # noqa: RUF012

    def test_a_low_rank_is_a_lora(self, own, edit, tmp_path):
        edit.save(tmp_path / "edit", pipe=own("sd"))
        assert self.files(tmp_path / "edit") == self.ALWAYS | set(LORAS.values())

    def test_above_half_the_rank_it_is_a_pipeline_if_there_is_one(self, own, tmp_path):
        edit = Editor(own("sd")).edit(PAIRS)
        assert factorise(next(iter(edit.changes.values()))).rank > 8
        edit.save(tmp_path / "edit", pipe=own("sd"))
        assert self.files(tmp_path / "edit") == self.ALWAYS | {"pipeline"}
        edit.save(tmp_path / "without")
        assert self.files(tmp_path / "without") == self.ALWAYS | set(LORAS.values())
        edit.save(tmp_path / "truncated", pipe=own("sd"), rank=3)
        assert self.files(tmp_path / "truncated") == self.ALWAYS | set(LORAS.values())

    def test_chosen_ones(self, own, edit, tmp_path):
        edit.save(tmp_path / "edit", forms=["pipeline", "kohya"], pipe=own("sd"))
        assert self.files(tmp_path / "edit") == self.ALWAYS | {"pipeline", LORAS["kohya"]}
        card = (tmp_path / "edit" / "README.md").read_text()
        assert "kohya.safetensors" in card
        assert "load_lora_weights" not in card
        assert json.loads((tmp_path / "edit" / "edit.json").read_text())["forms"] == [
            "kohya", "pipeline"
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"forms": []}, r"forms is \[\]; expected some of peft, kohya, pipeline"),
            ({"forms": "peft"}, "forms is 'peft'; expected some of"),
            ({"forms": ["onnx"]}, r"forms is \['onnx'\]"),
            ({"forms": ["pipeline"]}, "needs pipe=, the unedited pipeline"),
        ],
    )
    def test_wrong_ones(self, edit, tmp_path, options, words):
        with pytest.raises(UsageError, match=words):
            edit.save(tmp_path / "edit", **options)
        assert list(tmp_path.iterdir()) == []


class TestNothingIsLost:
    def tree(self, folder: Path) -> dict[str, bytes]:
        return {
            str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b""
            for p in sorted(folder.rglob("*"))
        }

    def test_a_folder_that_is_there(self, edit, tmp_path):
        (tmp_path / "edit").mkdir()
        (tmp_path / "edit" / "mine").write_text("precious")
        (tmp_path / "file").write_text("precious")
        before = self.tree(tmp_path)
        for name in ("edit", "file"):
            with pytest.raises(StoreError, match=f"{name} is there already; choose a new folder"):
                edit.save(tmp_path / name)
        with pytest.raises(StoreError, match="can't be used"):
            edit.save(tmp_path / "file" / "below")
        assert self.tree(tmp_path) == before

    def test_an_empty_folder_is_used(self, edit, tmp_path):
        (tmp_path / "edit").mkdir()
        edit.save(tmp_path / "edit")
        same_changes(load_edit(tmp_path / "edit"), edit)
        before = self.tree(tmp_path)
        with pytest.raises(StoreError, match="is there already"):
            edit.save(tmp_path / "edit")
        assert self.tree(tmp_path) == before

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt])
    @pytest.mark.parametrize("at", [0, 1, 2])
    def test_a_failed_save(self, own, tmp_path, monkeypatch, slow, error, at):
        """At the factors, the LoRA and the second LoRA file."""
        pipe = own("sd")
        edit, before, done = everywhere(pipe), slow.state(pipe), []

        def failing(tensors: Any, path: Any, **options: Any) -> None:
            if len(done) == at:
                Path(path).write_bytes(b"half")
                raise error
            done.append(path)
            save_file(tensors, path, **options)

        monkeypatch.setattr(export, "save_file", failing)
        with pytest.raises(StoreError if isinstance(error, OSError) else KeyboardInterrupt):
            edit.save(tmp_path / "edit", forms=export.FORMS, pipe=pipe)
        assert list(tmp_path.iterdir()) == []
        assert slow.state(pipe) == before
        monkeypatch.undo()
        edit.save(tmp_path / "edit")

    def test_a_failed_pipeline(self, tmp_path, slow, monkeypatch):
        pipe = tiny_pipeline("sd")
        edit, before = everywhere(pipe), slow.state(pipe)

        def failing(folder: Any, **_: Any) -> None:
            Path(folder).mkdir()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(pipe, "save_pretrained", failing)
        with pytest.raises(StoreError, match="disk is full"):
            edit.save(tmp_path / "edit", pipe=pipe)
        assert list(tmp_path.iterdir()) == []
        assert slow.state(pipe) == before

    def test_a_pipeline_of_other_weights(self, edit, tmp_path):
        other = tiny_pipeline("sd", seed=1)
        with pytest.raises(ModelError, match="made on other weights"):
            edit.save(tmp_path / "edit", forms=["pipeline"], pipe=other)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("phrase", ["../x", "/etc/x", "a\\b", "x|y", "a\nb", "..", "~"])
    def test_phrases_are_never_paths(self, own, tmp_path, phrase):
        inner = tmp_path / "deep" / "inner"
        inner.mkdir(parents=True)
        edit = Editor(own("sd")).edit([(phrase, "cat"), ("dog", phrase)], **FEW)
        edit.save(inner / "edit")
        assert {p.name for p in (inner / "edit").iterdir()} == {
            "edit.json", "edit.safetensors", "README.md", *LORAS.values()
        }  # fmt: skip
        assert [p.name for p in tmp_path.iterdir()] == ["deep"]
        assert [p.name for p in (tmp_path / "deep").iterdir()] == ["inner"]
        loaded = load_edit(inner / "edit")
        assert loaded.manifest["pairs"][0]["old"] == phrase
        card = (inner / "edit" / "README.md").read_text(encoding="utf-8").splitlines()
        [first] = [i for i, line in enumerate(card) if line == "| --- | --- |"]
        rows = card[first + 1 : first + 3]
        assert [row.replace("\\|", "").count("|") for row in rows] == [3, 3]


class TestDamaged:
    @pytest.fixture
    def folder(self, own: Any, tmp_path: Path) -> Path:
        return everywhere(own("sd"), **FEW).save(tmp_path / "edit")

    def refused(self, folder: Path, words: str = "is damaged") -> None:
        with pytest.raises(StoreError, match=words) as caught:
            load_edit(folder)
        assert str(folder) in str(caught.value)

    def rewrite(self, folder: Path, change: Any) -> None:
        path = folder / "edit.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    def test_no_edit_at_all(self, tmp_path):
        self.refused(tmp_path, "holds no edit: there is no edit.json")
        self.refused(tmp_path / "nowhere", "holds no edit")

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "null", "\x00\x01", '{"format": 3}', "{}", "[" * 100_000]
    )
    def test_json_that_is_none_or_another(self, folder, text):
        (folder / "edit.json").write_text(text)
        self.refused(folder)

    def test_json_that_is_not_utf8(self, folder):
        (folder / "edit.json").write_bytes(b"\xff\xfe{}")
        self.refused(folder)

    @pytest.mark.parametrize("key", ["edit", "forms", "ranks", "discarded"])
    def test_a_missing_key(self, folder, key):
        self.rewrite(folder, lambda content: content.pop(key))
        self.refused(folder)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            (key, value)
            for key in ("base", "pairs", "method", "lam", "after", "model")
            for value in ("gone", None, 3, "words", [1], {"a": 1})
            if (key, value) not in [("lam", 3), ("method", "words"), ("model", "words")]
        ],
    )
    def test_a_manifest_of_another_kind(self, folder, key, value):
        def change(content: Any) -> None:
            if value == "gone":
                del content["edit"][key]
            else:
                content["edit"][key] = value

        self.rewrite(folder, change)
        self.refused(folder)

    def test_another_format_or_version(self, folder):
        for key, value in (("version", 2), ("format", "another")):
            self.rewrite(folder, lambda content, k=key, v=value: content.update({k: v}))
            self.refused(folder)
            self.rewrite(folder, lambda content: content.update(version=1, format="fasttrace edit"))
        load_edit(folder)

    def test_an_unknown_key(self, folder):
        self.rewrite(folder, lambda content: content.update(more=1))
        self.refused(folder)

    def test_a_missing_file(self, folder):
        (folder / "edit.safetensors").unlink()
        self.refused(folder)

    @pytest.mark.parametrize("kept", [0, 4, 100, -1])
    def test_a_file_cut_short(self, folder, kept):
        path = folder / "edit.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        self.refused(folder)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_nan(self, folder, bad):
        def poison(tensors: dict[str, Tensor]) -> None:
            next(reversed(tensors.values()))[0, 0] = bad

        self.retensor(folder, poison)
        self.refused(folder)

    def retensor(self, folder: Path, change: Any) -> None:
        tensors = load_file(folder / "edit.safetensors")
        change(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "edit.safetensors")

    @pytest.mark.parametrize("kind", ["missing", "strange", "flat", "ranks", "integers", "empty"])
    def test_wrong_tensors(self, folder, kind):
        name = f"{MID}.to_k.left"

        def change(tensors: dict[str, Tensor]) -> None:
            if kind == "missing":
                del tensors[name]
            elif kind == "strange":
                tensors["more"] = tensors[name].clone()
            elif kind == "flat":
                tensors[name] = tensors[name].reshape(-1)
            elif kind == "ranks":
                tensors[name] = tensors[name][:, :1]
            elif kind == "integers":
                tensors[name] = tensors[name].to(torch.int32)
            else:
                tensors[name] = tensors[name][:0]

        self.retensor(folder, change)
        self.refused(folder)

    def test_whole_it_loads(self, folder):
        assert len(load_edit(folder).changes) == 9
