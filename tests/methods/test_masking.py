"""Masked patches: never more than requested, in rectangles, and as many as fit."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gtsa.methods.parts import masking
from gtsa.methods.parts.masking import blocks, random_order


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(1, 16), st.integers(0, 99))
def test_no_more_patches_are_masked_than_requested(shares, side, seed):
    torch.manual_seed(seed)
    hidden = blocks(torch.tensor(shares), side)
    assert hidden.shape == (len(shares), side, side) and hidden.dtype == torch.bool
    for each, share in zip(hidden, shares, strict=True):
        assert each.sum() <= share * side**2 + 1e-3
        if share * side**2 < 0.999:
            assert not each.any()


def test_most_of_the_requested_patches_are_masked_at_all_positions():
    torch.manual_seed(0)
    hidden = blocks(torch.full((3000,), 0.3), 14).float()
    assert hidden.mean((1, 2)).min() > 0.28
    frequency = hidden.mean(0)  # rectangles that fit reach the border less often than the middle
    assert frequency.min() > 0.02 and frequency.max() < 0.65
    assert (frequency - frequency.flip(0)).abs().max() < 0.06 and (frequency - frequency.T).abs().max() < 0.06


def test_a_round_draws_a_rectangle(monkeypatch):
    monkeypatch.setattr(masking, "ROUNDS", 1)
    torch.manual_seed(1)
    areas = []
    for each in masking.blocks(torch.full((200,), 0.4), 9):
        rows, columns = each.any(1).nonzero()[:, 0], each.any(0).nonzero()[:, 0]
        if len(rows):
            assert each.sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            areas.append(int(each.sum()))
    assert len(areas) > 150 and min(areas) >= 5 and max(areas) <= 32


def test_orders_are_permutations():
    torch.manual_seed(0)
    order = random_order(200, 12)
    assert torch.equal(order.sort(1).values, torch.arange(12).expand(200, 12))
    assert (order[:, 0].bincount(minlength=12) > 4).all()
