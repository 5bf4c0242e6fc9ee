"""Parameters and states seen in blocks, as a GPU's compiled step sees them, take the same step."""

import pytest
import torch

from automagic_torch import AutomagicCameAMP8bit
from automagic_torch.steps import compiled
from automagic_torch.steps.in_blocks import can_be_in_blocks, in_blocks
from automagic_torch.steps.new_values import new_values, written_back

FIELDS = {"profile": "balanced", "lr": 1e-3, "force_8bit": True}


def stepped(monkeypatch, seen_in_blocks, fields):
    """Parameters and states after three steps, one of them with an array that is skipped, and how often blocks were."""
    times = 0

    def run(way, given):
        nonlocal times
        seen, at_hand = way, given
        if seen_in_blocks and can_be_in_blocks(way, given):
            times += 1
            seen, at_hand = way._replace(in_blocks=True), in_blocks(way, given)
        new = new_values(seen, at_hand)
        written_back(seen, at_hand, new)
        return new._replace(after=given.before, stored=given.stored)

    monkeypatch.setattr(compiled, "run_compiled", run)
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((100, 200, 1, 1), (100, 256), (96, 200), (96, 200))]
    optimizer = AutomagicCameAMP8bit(params, compiled=True, **FIELDS | fields)
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        if number == 1:
            params[-1].grad[3, 4] = torch.nan
        optimizer.step()
    return [tensor for p in params for tensor in (p.detach(), *optimizer.state[p].values())], times


@pytest.mark.parametrize("fields", [{}, {"background_regularization": True}, {"block_size": 64}])
def test_a_step_in_blocks_is_the_same_bit_for_bit(fields, monkeypatch):
    fields = {"warmup_steps": 0} | fields
    (seen, times), (found, _) = (stepped(monkeypatch, flag, fields) for flag in (True, False))
    assert times == 6  # the two alone and the batch of two, but for the array with four axes
    assert all(map(torch.equal, seen, found))


@pytest.mark.parametrize("fields", [{"warmup_steps": 9}, {"warmup_steps": 0, "factored": "all"}, {"optim_bits": 32}])
def test_what_looks_at_rows_or_has_no_blocks_is_not_seen_so(fields, monkeypatch):
    assert stepped(monkeypatch, True, fields)[1] == 0
