"""A saved edit that was damaged is refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fasttrace_exports import FEW, MID, everywhere
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasttrace import load_edit
from fasttrace.errors import StoreError


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
