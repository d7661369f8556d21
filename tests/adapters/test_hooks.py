"""What a patch writes, and what it leaves alone."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fasttrace.adapters.hooks import rereading, rewriting, watching, write_rows

NAN = float("nan")


@given(
    rows=st.integers(1, 4),
    tokens=st.integers(1, 5),
    strength=st.sampled_from([0.0, 0.25, 1.0]),
    data=st.data(),
)
def test_write_rows(rows, tokens, strength, data):
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    chosen = data.draw(st.none() | st.sets(st.integers(0, tokens - 1), min_size=1))
    generator = torch.Generator().manual_seed(rows * 10 + tokens)
    out = torch.randn(rows, tokens, 3, generator=generator)
    source = torch.randn(stop - start, tokens, 3, generator=generator)
    before = out.clone()
    new = write_rows(
        out,
        source,
        rows=slice(start, stop),
        tokens=None if chosen is None else tuple(sorted(chosen)),
        strength=strength,
    )
    assert torch.equal(out, before)
    for row in range(rows):
        for token in range(tokens):
            there = start <= row < stop and (chosen is None or token in chosen)
            mix = out[row, token]
            if there and strength == 1:
                mix = source[row - start, token]
            elif there and strength > 0:
                mix = out[row, token].lerp(source[row - start, token], strength)
            assert torch.equal(new[row, token], mix)


def test_strength_zero_leaves_a_nan_where_it_is():
    out = torch.randn(2, 3, 4)
    assert write_rows(out, torch.full_like(out, NAN), strength=0.0) is out


def test_unwritten_rows_and_tokens_are_never_read():
    out, source = torch.randn(2, 3, 4), torch.full((1, 3, 4), NAN)
    source[:, 1] = 1.0
    new = write_rows(out, source, rows=slice(1, 2), tokens=(1,))
    assert torch.isfinite(new).all()


class Tuple(nn.Module):
    def forward(self, x, encoder_hidden_states=None):
        return (x if encoder_hidden_states is None else encoder_hidden_states), "weights"


def test_tuples_keep_their_rest():
    module = Tuple()
    with rewriting({"m": module}, lambda _, out: out + 1):
        out = module(torch.zeros(1))
    assert out[0] == 1
    assert out[1] == "weights"
    assert module(torch.zeros(1))[0] == 0


def test_order_of_hooks():
    """`first` is seen by a hook that was there before; otherwise ours has the last word."""
    module, seen = nn.Identity(), []
    module.register_forward_hook(lambda _m, _a, out: seen.append(float(out)))
    with rewriting({"m": module}, lambda _, out: out + 1, first=True):
        module(torch.zeros(()))
    with rewriting({"m": module}, lambda _, out: out + 1):
        module(torch.zeros(()))
    assert seen == [1.0, 0.0]


def test_rereading_changes_the_text_alone():
    module = Tuple()
    with rereading({"m": module}, lambda _, text: text * 2):
        assert module(torch.zeros(1), encoder_hidden_states=torch.ones(1))[0] == 2
        assert module(torch.zeros(1))[0] == 0


def test_hooks_go_away_on_an_error():
    module = nn.Identity()
    try:
        with watching({"m": module}, lambda _, out: 1 / 0):
            module(torch.zeros(1))
    except ZeroDivisionError:
        pass
    assert not module._forward_hooks
