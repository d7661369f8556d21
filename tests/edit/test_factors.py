"""A change as factors: all of it, or the best of a rank, with what is left out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from fasttrace_exports import FEW, LORAS, PAIRS, everywhere
from safetensors.torch import load_file

from fasttrace import Editor, load_edit
from fasttrace.edit.edit import Edit
from fasttrace.edit.factors import factorise
from fasttrace.edit.solver import Change
from fasttrace.errors import UsageError


@pytest.fixture
def edit(own: Any) -> Edit:
    return Editor(own("sd")).edit(PAIRS, **FEW)


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
