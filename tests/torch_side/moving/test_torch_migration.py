"""From Adam in PyTorch and bitsandbytes to this optimizer, in the middle of a run."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from automagic_core.arrays.parts import elements
from automagic_torch import AutomagicCameAMP8bit, load_adam_state
from automagic_torch.codec import quantized_tensor as codec
from tests.torch_side.torch_helpers import parameters, run, same, set_gradients, snapshot, through_a_file

needs_bitsandbytes = pytest.mark.skipif(not codec.BITSANDBYTES_AVAILABLE, reason="8 bits need bitsandbytes")
IN_32: dict[str, Any] = {"optim_bits": 32, "warmup_steps": 0, "factored": "none"}


def adamw(params: list[Any], **fields: Any) -> Any:
    return torch.optim.AdamW(params, **{"lr": 1e-3, "betas": (0.8, 0.95), **fields})


def adamw8bit(params: list[Any], **fields: Any) -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, **{"lr": 1e-3, **fields})


def steps_of(optimizer: Any, count: int) -> Any:
    """The optimizer's state_dict after some steps, from a file."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in range(count):
        set_gradients(params, t)
        optimizer.step()
    return through_a_file(optimizer.state_dict())


def test_every_state_is_what_adams_moments_say() -> None:
    params = parameters(((8, 6), (5,)))
    saved = steps_of(adamw(params), 7)
    fields: dict[str, Any] = {"betas": (0.9, 0.99, 0.999), "update_clip": 0.5}
    optimizer = AutomagicCameAMP8bit(params, lr=1e-3, **IN_32, **fields)
    load_adam_state(optimizer, saved, restart_warmup=False)
    assert (
        optimizer.param_groups[0]["automagic_step"],
        float(optimizer.param_groups[0]["automagic_log_rate_scale"]),
    ) == (
        7,
        0.0,
    )
    clipped = False
    for index, p in enumerate(params):
        state, adam = optimizer.state[p], saved["state"][index]
        m_hat = adam["exp_avg"].double() / (1 - 0.8**7)
        v_hat = adam["exp_avg_sq"].double() / (1 - 0.95**7)
        u = (m_hat / (v_hat.sqrt() + 1e-8)).clamp(-0.5, 0.5)
        clipped |= bool((u.abs() == 0.5).any())
        close(state["exp_avg"] / (1 - 0.9**7), u)
        close(state["exp_avg_sq"] / (1 - 0.99**7), v_hat)
        close((state["exp_avg_res"] + 0.001) / (1.001 - 0.999**7), torch.ones_like(u))
        close(state["background_scale"], v_hat.sqrt().mean())
        assert (int(state["age"]), int(state["skipped_steps"]), float(state["torque_mean"])) == (7, 0, 1.0)
    assert clipped


@pytest.mark.parametrize(("factored", "shape"), [("second_moment", (65, 66)), ("all", (65, 66)), ("all", (8, 6))])
def test_factored_statistics_are_row_and_column_means(factored: str, shape: tuple[int, int]) -> None:
    (p,) = params = parameters((shape,))
    saved = steps_of(adamw(params), 4)
    optimizer = AutomagicCameAMP8bit(params, lr=1e-3, **{**IN_32, "factored": factored})
    load_adam_state(optimizer, saved)
    v = saved["state"][0]["exp_avg_sq"].double() / (1 - 0.95**4) * (1 - 0.99**4)
    state = optimizer.state[p]
    torch.testing.assert_close(state["exp_avg_sq_row"].double(), v.mean(1, keepdim=True), rtol=1e-5, atol=0)
    torch.testing.assert_close(state["exp_avg_sq_col"].double(), v.mean(0, keepdim=True), rtol=1e-5, atol=0)
    # Of an array that is not narrow elements or both statistics, else the one along the six columns.
    held = {name: x for name, x in state.items() if name.startswith("exp_avg_res")}
    assert len(held) == 1 + (factored == "all" and min(shape) > 64)
    r = elements(held, "exp_avg_res").expand(shape)
    # As the next step reads it (factored: before that step's own residuals).
    torch.testing.assert_close((r + 0.001) / (1.001 - 0.999**4), torch.ones(shape), rtol=1e-5, atol=0)


def close(a: Tensor, b: Tensor) -> None:
    # float32 against float64: a few rounding errors.
    torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)


class Run:
    """A classifier of noisy labels from a fixed teacher, the same data for everyone who asks for the same steps."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.teacher, self.model = (
            torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 10)) for _ in range(2)
        )
        self.params = list(self.model.parameters())

    def step(self, optimizer: Any, t: int) -> float:
        """The norm of the update."""
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(32, 64, generator=generator)
        with torch.no_grad():
            y = (3 * self.teacher(x) + torch.randn(32, 10, generator=generator)).argmax(1)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(self.model(x), y).backward()
        before = [p.detach().clone() for p in self.params]
        optimizer.step()
        return math.sqrt(sum(float((p.detach() - b).square().sum()) for p, b in zip(self.params, before, strict=True)))


@pytest.mark.parametrize("adam", [adamw, pytest.param(adamw8bit, marks=needs_bitsandbytes)])
@pytest.mark.parametrize("steps", [5, 120])
def test_the_first_step_is_no_longer_than_adams_last(adam: Any, steps: int) -> None:
    train = Run()
    source = adam(train.params, weight_decay=0.0, betas=(0.9, 0.999))
    lasts = [train.step(source, t) for t in range(steps)]
    saved, weights = source.state_dict(), copy.deepcopy(train.model.state_dict())
    for factored in ("none", "second_moment", "all"):
        for bits in (8, 32):
            for torque in (True, False):
                train.model.load_state_dict(weights)
                optimizer = AutomagicCameAMP8bit(
                    train.params,
                    lr=1e-3,
                    factored=factored,
                    optim_bits=bits,
                    torque=torque,
                    warmup_steps=0,
                    weight_decay=0.0,
                    min_8bit_size=256,
                    force_8bit=True,
                )
                load_adam_state(optimizer, saved, restart_warmup=False)
                norm = train.step(optimizer, steps)
                # And no stand-still either: torque lets about half of the elements move at the first step.
                assert 0.5 * lasts[-1] < norm <= lasts[-1], (factored, bits, torque)


def test_what_adams_eps_held_back_does_not_jump() -> None:
    (p,) = parameters(((40, 40),))
    source = adamw([p], betas=(0.9, 0.999), weight_decay=0.0)
    for t in range(20):
        set_gradients([p], t)
        p.grad[:, ::2] *= 1e-11  # type: ignore[index]  # far below eps = 1e-8
        before = p.detach().clone()
        source.step()
    assert float((p.detach() - before)[:, ::2].abs().max()) < 1e-5
    optimizer = AutomagicCameAMP8bit([p], lr=1e-3, **IN_32)
    load_adam_state(optimizer, source.state_dict())
    assert float(optimizer.state[p]["exp_avg"][:, ::2].abs().max()) < 1e-2


@needs_bitsandbytes
def test_bitsandbytes_states_are_read_as_it_reads_them() -> None:
    from bitsandbytes.functional import dequantize_blockwise

    params = parameters(((70, 67), (64, 64), (5,)))  # 4690 elements: the last block is short; 5: kept in 32 bits
    saved = steps_of(adamw8bit(params), 6)
    optimizer = AutomagicCameAMP8bit(params, lr=1e-3, **IN_32)
    load_adam_state(optimizer, saved)
    for index, p in enumerate(params):
        adam = saved["state"][index]["__bnb_optimizer_quant_state__"]
        v = adam["state2"]
        assert (v.dtype == torch.uint8) == (p.numel() >= 4096)
        if v.dtype == torch.uint8:
            v = dequantize_blockwise(v, absmax=adam["absmax2"], code=adam["qmap2"], blocksize=256)
        expected = v.double() / (1 - 0.999**6) * (1 - 0.99**6)
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"].double(), expected, rtol=1e-5, atol=0)


class Halved(Tensor):
    """Like a state of torchao: a tensor of a class of its own, whose values `dequantize` gives."""

    def dequantize(self) -> Tensor:
        return 2 * self.as_subclass(Tensor)


def test_states_of_classes_of_their_own_are_read() -> None:
    params = parameters()
    saved, held = steps_of(adamw(params), 3), []
    optimizer = AutomagicCameAMP8bit(params, lr=1e-3, **IN_32)
    for _ in range(2):
        load_adam_state(optimizer, saved)
        held.append(copy.deepcopy(optimizer.state_dict()))
        for state in saved["state"].values():
            state |= {key: (state[key] / 2).as_subclass(Halved) for key in ("exp_avg", "exp_avg_sq")}
    assert same(*held)


def test_a_new_warm_up_and_the_first_votes() -> None:
    first, second = params = parameters(((8, 6), (8, 6)))
    saved = steps_of(adamw(params), 5)
    for restart in (True, False):
        optimizer = AutomagicCameAMP8bit(
            params, lr=1e-4, max_lr=1.0, warmup_steps=9, edge_suppression=False, frequency_penalty=0.0
        )
        load_adam_state(optimizer, saved, restart_warmup=restart)
        group = optimizer.param_groups[0]
        assert group["automagic_step"] == (0 if restart else 5)
        momentum = {p: saved["state"][i]["exp_avg"].clone() for i, p in enumerate(params)}
        for p in params:
            assert not optimizer.state[p]["walk"].any()
        if restart:  # step 1 has no vote, and `second` does not take part in it
            first.grad, second.grad = torch.zeros_like(first), None
            optimizer.step()
            assert float(group["automagic_agreement"]) == 0
        first.grad, second.grad = None, momentum[second].clone()
        optimizer.step()
        # Every element agrees with Adam's momentum: the full vote.
        assert float(group["automagic_agreement"]) == pytest.approx(1, rel=1e-6)
        assert int(optimizer.state[second]["age"]) == 6


@needs_bitsandbytes
def test_the_run_goes_on_and_its_checkpoints_too() -> None:
    train = Run()
    source = adamw(train.params)
    for t in range(30):
        train.step(source, t)
    fields: dict[str, Any] = {
        "lr": 1e-3,
        "warmup_steps": 5,
        "min_8bit_size": 256,
        "force_8bit": True,
        "percentile_clipping": 95,
    }
    optimizer = AutomagicCameAMP8bit(train.params, **fields)
    load_adam_state(optimizer, source.state_dict())
    assert optimizer.get_memory_efficiency_report()["8bit_parameters"] == 64 * 96 + 96 * 10
    again = AutomagicCameAMP8bit(train.params, **fields)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same(again.state_dict(), optimizer.state_dict())
    for t in range(30, 40):
        train.step(optimizer, t)
    assert all(bool(p.isfinite().all()) for p in train.params)
    assert optimizer.param_groups[0]["automagic_step"] == 10
    assert all(int(state["age"]) == 40 for state in optimizer.state.values())


def test_what_is_not_carried_is_said(caplog: pytest.LogCaptureFixture) -> None:
    params = parameters(((8, 70), (5,)))
    source = adamw(params, amsgrad=True)
    params[1].requires_grad_(False)
    set_gradients(params[:1], 0)
    source.step()
    optimizer = AutomagicCameAMP8bit(params, lr=1e-3, spatial_scope="all")
    with caplog.at_level(logging.INFO, "automagic_torch"):
        told = load_adam_state(optimizer, source.state_dict())
    assert told == [record.message for record in caplog.records]
    assert [record.levelname for record in caplog.records if "max_exp_avg_sq" in record.message] == ["WARNING"]
    for word in (
        "parameter 1 of group 0",
        "walk begins",
        "edge_history",
        "spatial_variance",
        "betas",
        "search for the rate",
    ):
        assert any(word in sentence for sentence in told), word
    assert params[1] not in optimizer.state


def _changed(saved: Any, entry: str, value: Any) -> Any:
    saved = copy.deepcopy(saved)
    saved["state"][0][entry] = value
    return saved


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: _changed(s, "exp_avg", torch.zeros(6, 8)), r"exp_avg of shape \(6, 8\); valid: \(8, 6\)"),
        (lambda s: _changed(s, "exp_avg_sq", torch.full((8, 6), torch.nan)), "exp_avg_sq that are not finite"),
        (lambda s: _changed(s, "exp_avg_sq", torch.full((8, 6), -1.0)), "negative second moments"),
        (lambda s: {**s, "state": {0: {"step": 3, "exp_avg": torch.zeros(8, 6)}}}, "lacks exp_avg_sq"),
        (lambda s: {**s, "state": {7: {}}}, "unknown parameters: .7"),
        (lambda s: {**s, "state": {}}, "took no step"),
        (lambda s: {"state": {}}, "no 'param_groups'"),
        (lambda s: {**s, "param_groups": [{**s["param_groups"][0], "params": [0]}]}, r"groups of \[1\] parameters"),
        (lambda s: {**s, "param_groups": [{**s["param_groups"][0], "betas": 0.9}]}, "betas = 0.9"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(break_it: Callable[[Any], Any], message: str) -> None:
    params = parameters(((8, 6), (5,)))
    saved = steps_of(adamw(params), 3)
    optimizer = AutomagicCameAMP8bit(params, lr=1e-3)
    run(optimizer, range(2))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        load_adam_state(optimizer, break_it(saved))
    assert same(snapshot(optimizer), before)


def test_parameters_of_other_names_are_refused() -> None:
    a, b = parameters(((8, 6), (8, 6)))
    saved = steps_of(adamw([("a", a), ("b", b)]), 1)
    optimizer = AutomagicCameAMP8bit([("b", b), ("a", a)], lr=1e-3)
    with pytest.raises(ValueError, match="'a' for 'b'"):
        load_adam_state(optimizer, saved)
