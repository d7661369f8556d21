"""What is written comes back as the same edit, and nothing half written is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from fasttrace_exports import (
    CALLS,
    FEW,
    LORAS,
    PAIRS,
    everywhere,
    latents_of,
    same_changes,
)
from safetensors.torch import save_file

from fasttrace import Editor, Replacement, load_edit
from fasttrace.edit import export
from fasttrace.edit.edit import Edit
from fasttrace.edit.factors import factorise
from fasttrace.errors import ModelError, StoreError, UsageError
from fasttrace.testing import tiny_pipeline


@pytest.fixture
def edit(own: Any) -> Edit:
    return Editor(own("sd")).edit(PAIRS, **FEW)


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
