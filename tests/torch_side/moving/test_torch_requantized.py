"""A run of this optimizer goes on with other bits, blocks or another `factored`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from automagic_core import Config, rounding_key, state_plan
from automagic_core.arrays.group_keys import SEARCH_KEYS
from automagic_core.arrays.state_forms import coded_shapes
from automagic_torch import AutomagicCameAMP8bit, load_requantized
from automagic_torch.codec import quantized_tensor as codec
from automagic_torch.codec.quantized_tensor import QuantizedTensor
from tests.torch_side.torch_helpers import parameters, run, same, set_gradients, snapshot, through_a_file

pytestmark = pytest.mark.skipif(not codec.BITSANDBYTES_AVAILABLE, reason="8 bits need bitsandbytes")

SHAPES = ((24, 70), (7,), (4, 3, 3, 3), (65, 66))
FIELDS: dict[str, Any] = {
    "lr": 1e-3,
    "max_lr": 1e-1,
    "warmup_steps": 12,
    "torque_decay": 0.5,
    "min_8bit_size": 100,
    "force_8bit": True,
    "lr_mask_gain": 0.2,
    "straightness": 0.7,
}


def after(steps: int, **fields: Any) -> tuple[AutomagicCameAMP8bit, Any]:
    optimizer = AutomagicCameAMP8bit(parameters(SHAPES), **{**FIELDS, **fields})
    run(optimizer, range(steps))
    return optimizer, through_a_file(optimizer.state_dict())


def into(saved: Any, **fields: Any) -> tuple[AutomagicCameAMP8bit, list[str]]:
    optimizer = AutomagicCameAMP8bit(parameters(SHAPES, seed=1), **{**FIELDS, **fields})
    return optimizer, load_requantized(optimizer, saved)


@pytest.mark.parametrize("factored", ["none", "second_moment", "all"])
@pytest.mark.parametrize("steps", [5, 15])  # within and after the warm-up
def test_to_8_bits_and_back(factored: str, steps: int) -> None:
    source, saved = after(steps, optim_bits=32, factored=factored)
    eight, told = into(saved, factored=factored)
    assert any("32-bit states are rounded to 8 bits (parameter 0" in sentence for sentence in told)
    back, told = into(through_a_file(eight.state_dict()), optim_bits=32, factored=factored)
    assert any("go on in 32 bits" in sentence for sentence in told)
    for optimizer in (eight, back):
        group = optimizer.param_groups[0]
        assert group["automagic_step"] == steps
        assert all(same(group[key], source.param_groups[0][key]) for key in SEARCH_KEYS)
    assert all(float(source.param_groups[0][key]) != 0 for key in SEARCH_KEYS)
    assert all(("walk" in state) == (steps == 5) for state in source.state.values())
    for p, q, original in zip(*(o.param_groups[0]["params"] for o in (eight, back, source)), strict=True):
        held, wide, first = eight.state[p], back.state[q], source.state[original]
        assert ("exp_avg_absmax" in held) == (p.numel() >= 100)
        assert wide.keys() == first.keys()
        plan = state_plan(tuple(p.shape), Config(**{**FIELDS, "factored": factored}), "torch")
        for name, value in first.items():
            if name in coded_shapes(plan):
                # One code's width, relative to the largest: 2 / 127, squares twice that.
                assert float((wide[name] - value).abs().max()) <= 0.032 * float(value.abs().max()), name
            else:
                assert same(wide[name], value), name
    if factored == "none":
        p, original = (next(iter(o.state)) for o in (eight, source))
        key = rounding_key(steps, 0, p.numel())
        expected = QuantizedTensor.write(source.state[original]["exp_avg"][None], False, 256, key)
        assert torch.equal(eight.state[p]["exp_avg"], expected.codes[0])
    run(eight, range(steps, steps + 2))
    run(back, range(steps, steps + 2))


def test_what_keeps_its_form_keeps_every_bit() -> None:
    source, saved = after(5)
    other, told = into(saved)
    assert told == []
    assert same(other.state_dict(), source.state_dict())
    # Only exp_avg_sq changes its form: exp_avg and exp_avg_res keep their codes.
    other, told = into(saved, factored="none")
    for p, q in zip(source.state, other.state, strict=True):
        for name in ("exp_avg", "exp_avg_absmax", "exp_avg_res", "exp_avg_res_absmax"):
            if name in source.state[p]:
                assert same(other.state[q][name], source.state[p][name])
    assert any("exp_avg_sq is approximated by the product" in sentence for sentence in told)


@pytest.mark.parametrize("factored", ["second_moment", "all"])
def test_single_values_to_means_and_back(factored: str) -> None:
    source, saved = after(8, optim_bits=32, factored="none")
    means, told = into(saved, optim_bits=32, factored=factored)
    assert any("exp_avg_sq goes on as row and column means" in sentence for sentence in told)
    p, original = next(iter(means.state)), next(iter(source.state))
    v = source.state[original]["exp_avg_sq"]
    torch.testing.assert_close(means.state[p]["exp_avg_sq_row"], v.mean(1, keepdim=True))
    back, _ = into(means.state_dict(), optim_bits=32, factored="none")
    state = back.state[next(iter(back.state))]
    expected = v.mean(1, keepdim=True) * v.mean(0, keepdim=True) / v.mean()
    torch.testing.assert_close(state["exp_avg_sq"], expected)
    run(back, range(8, 10))


def test_the_background_scale_that_means_do_not_keep() -> None:
    _, saved = after(8, optim_bits=32)
    assert "background_scale" not in saved["state"][0]
    single, _ = into(saved, optim_bits=32, factored="none")
    state = single.state[next(iter(single.state))]
    expected = (state["exp_avg_sq"] / (1 - 0.99**8)).sqrt().mean()
    torch.testing.assert_close(state["background_scale"], expected)


def test_other_blocks_and_other_betas_read_the_same() -> None:
    source, saved = after(9, optim_bits=32, factored="none")
    other, told = into(saved, optim_bits=32, factored="none", betas=(0.8, 0.95, 0.99))
    assert any("betas" in sentence and "(0.9, 0.99, 0.999)" in sentence for sentence in told)
    p, q = next(iter(source.state)), next(iter(other.state))
    for name, before, now in (("exp_avg", 0.9, 0.8), ("exp_avg_sq", 0.99, 0.95)):
        torch.testing.assert_close(
            other.state[q][name] / (1 - now**9), source.state[p][name] / (1 - before**9), rtol=1e-5, atol=1e-7
        )
    confidence = [
        (o.state[x]["exp_avg_res"] + 1 - b) / (2 - b - b**9) for o, x, b in ((source, p, 0.999), (other, q, 0.99))
    ]
    # A difference of numbers near one another: a digit or two less.
    torch.testing.assert_close(*confidence, rtol=1e-3, atol=1e-5)
    blocks, told = into(after(9)[1], block_size=64)
    assert any("blocks of 64" in sentence for sentence in told)
    assert blocks.state[next(iter(blocks.state))]["exp_avg_absmax"].shape == (-(-24 * 70 // 64),)


def test_states_that_one_side_lacks() -> None:
    bare = {
        "search_gain": 0.0,
        "lr_mask_gain": 0.0,
        "edge_suppression": False,
        "spatial_awareness": False,
        "torque_decay": 0.0,
    }
    _, saved = after(5, **bare, optim_bits=32)
    full, told = into(saved, optim_bits=32, percentile_clipping=95)
    for word in (
        "walk begins",
        "lr_mask begins",
        "edge_history is estimated",
        "spatial_variance begins",
        "s begins",
    ):
        assert any(word in sentence for sentence in told), word
    # The estimate is of the size of what a run of its own has there: independent gradients are a little rougher.
    own = after(5, optim_bits=32)[0]
    for p, q in zip(full.state, own.state, strict=True):
        if "edge_history" in full.state[p]:
            ratio = full.state[p]["edge_history"].mean() / own.state[q]["edge_history"].mean()
            assert 0.8 < float(ratio) < 1.8
    run(full, range(5, 7))
    back, told = into(full.state_dict(), **bare, optim_bits=32)
    for name in ("walk", "lr_mask", "edge_history", "spatial_variance", "s", "norm_history"):
        assert any(name in sentence and "dropped" in sentence for sentence in told), name
    run(back, range(7, 8))


@pytest.mark.parametrize("fields", [{"layout": "flax"}, {"shapes": ((24, 71), *SHAPES[1:])}])
def test_what_does_not_fit_is_refused_and_changes_nothing(fields: dict[str, Any]) -> None:
    _, saved = after(3, optim_bits=32)
    shapes = fields.pop("shapes", SHAPES)
    optimizer = AutomagicCameAMP8bit(parameters(shapes), **FIELDS, **fields)
    set_gradients(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"layout 'torch'|shape \(24, 70\)"):
        load_requantized(optimizer, saved)
    assert same(snapshot(optimizer), before)


@pytest.mark.parametrize("kind", ["cosine", "plateau"])
def test_the_rate_that_a_scheduler_has_set_goes_on(kind: str) -> None:
    def scheduler(optimizer: AutomagicCameAMP8bit) -> Any:
        if kind == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)

    def go_on(optimizer: AutomagicCameAMP8bit, schedule: Any, steps: range) -> list[float]:
        rates = []
        for step in steps:
            run(optimizer, range(step, step + 1))
            schedule.step(*([1.0] if kind == "plateau" else []))
            rates += optimizer.get_learning_rates()
        return rates

    source = AutomagicCameAMP8bit(parameters(SHAPES), **FIELDS, optim_bits=32)
    schedule = scheduler(source)
    go_on(source, schedule, range(20))
    other = AutomagicCameAMP8bit(parameters(SHAPES), **FIELDS)
    again = scheduler(other)
    told = load_requantized(other, source.state_dict())
    again.load_state_dict(schedule.state_dict())
    assert any("goes on with the saved run's lr" in sentence for sentence in told)
    assert go_on(other, again, range(20, 25)) == go_on(source, schedule, range(20, 25))


def embedding(marked: bool, **fields: Any) -> tuple[Any, Any]:
    """A parameter, marked or not, and what makes optimizers of it that keep embeddings in 32 bits."""
    p: Any = parameters([(64, 64)])[0]
    p._is_embedding = marked
    return p, lambda: AutomagicCameAMP8bit([("e", p)], **FIELDS, stable_emb=True, **fields)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("steps", [5, 15])  # within and after the warm-up
def test_a_mark_that_changed_after_the_first_step(marked: bool, steps: int) -> None:
    p, make = embedding(marked)
    source = make()
    run(source, range(steps))
    p._is_embedding = not marked
    with pytest.raises(RuntimeError, match="load_requantized goes on"):
        run(source, range(1))
    hint = "call mark_embeddings" if marked else "is marked as an embedding, which stable_emb keeps in 32 bits"
    with pytest.raises(ValueError, match=f"holds {32 if marked else 8} bits: .*{hint}"):
        make().load_state_dict(source.state_dict())
    optimizer = make()
    (told,) = load_requantized(optimizer, through_a_file(source.state_dict()))
    assert ("rounded to 8 bits" if marked else "go on in 32 bits") in told
    assert ("exp_avg_absmax" in optimizer.state[p]) == marked
    assert same(optimizer.state[p]["lr_mask"], source.state[p]["lr_mask"])
    run(optimizer, range(steps, steps + 1))


def test_a_mark_that_turns_the_rows_is_refused() -> None:
    p, make = embedding(False, layout="flax")
    source = make()
    run(source, range(5))
    p._is_embedding = True
    with pytest.raises(ValueError, match=r"'e' is marked as an embedding, .* with layout 'flax' the mark turns"):
        load_requantized(make(), source.state_dict())
    p._is_embedding = False
    run(source, range(5, 6))
    assert load_requantized(make(), source.state_dict()) == []


@pytest.mark.parametrize("fields", [{"optim_bits": 32}, {"min_8bit_size": 10_000}])
def test_bits_that_the_saved_fields_do_not_give(fields: dict[str, Any]) -> None:
    source, _ = after(5)
    source.param_groups[0].update({f"automagic_{name}": value for name, value in fields.items()})
    with pytest.raises(RuntimeError, match="load_requantized goes on"):
        run(source, range(5, 6))
    optimizer, told = into(source.state_dict(), **fields)
    assert any("go on in 32 bits" in sentence for sentence in told)
    run(optimizer, range(5, 6))
