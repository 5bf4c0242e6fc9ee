"""What the evidence compares with: methods written here against hand calculations, and how a run uses them."""

import math

import pytest
import torch

from automagic_torch import AutomagicCameAMP8bit
from benchmarks.evidence.jobs.flax_lora import FlaxDiffusion, Settings
from benchmarks.evidence.optimizers import swapped
from benchmarks.evidence.plan import Spec
from benchmarks.evidence.rivals import RECIPES
from benchmarks.evidence.rivals.automagic_v3 import AutomagicV3
from benchmarks.evidence.rivals.cautious import CautiousAdamW
from benchmarks.evidence.rivals.method import Averaged, ScheduleFree
from benchmarks.evidence.training import train
from benchmarks.evidence.variants import VARIANTS


class TestCautious:
    def test_first_step_is_adamw_scaled_by_its_mask(self):
        g = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
        ours, theirs = (torch.nn.Parameter(torch.ones(10, 10)) for _ in range(2))
        ours.grad, theirs.grad = g.clone(), g.clone()
        CautiousAdamW([ours], lr=0.1, weight_decay=0.0).step()
        torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0).step()
        torch.testing.assert_close(ours - 1, (theirs - 1) * 100 / 101)

    def test_stands_still_where_momentum_and_gradient_differ(self):
        p = torch.nn.Parameter(torch.zeros(4))
        optimizer = CautiousAdamW([p], lr=0.1, weight_decay=0.0)
        for g in ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, -0.1]):
            before = p.detach().clone()
            p.grad = torch.tensor(g)
            optimizer.step()
        moved = (p - before).abs()
        assert moved[3] == 0
        # Three of four move by 4 / (3 + 1) of AdamW's step, which is lr for a steady gradient.
        torch.testing.assert_close(moved[:3], torch.full((3,), 0.1))


class TestAutomagicV3:
    @pytest.mark.parametrize(
        ("signs", "factor"),
        [
            ([1] * 8, math.e),  # all of the window equal
            ([1, -1] * 4, 1 / math.e),  # it alternates
            ([1] * 7, 1),  # not full yet
            ([1, 1, -1, 1, 1, 1, 1, 1], 1),  # neither
            ([-1] + [1] * 8, math.e),  # the first sign has left it
        ],
    )
    def test_the_rate_follows_the_votes(self, signs, factor):
        p = torch.nn.Parameter(torch.zeros(3, 2))
        optimizer = AutomagicV3([p], lr=1e-3)
        for sign in signs:
            p.grad = sign * torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
            optimizer.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * factor, rel=1e-6)

    def test_votes_weigh_as_much_as_the_updates(self):
        p = torch.nn.Parameter(torch.zeros(2))
        optimizer = AutomagicV3([p], lr=1e-3, beta2=0.0, eps=0.0)
        for step in range(8):
            p.grad = torch.tensor([1.0, 1.0 if step < 7 else -1.0])
            optimizer.step()
        # β₂ = 0: both updates are of size 1; one of the two votes up, the other not at all.
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * math.exp(0.5), rel=1e-6)

    def test_the_first_update_is_bounded_and_decays(self):
        p = torch.nn.Parameter(torch.full((2, 2), 2.0))
        p.grad = torch.tensor([[1.0, -2.0], [2.0, -4.0]])  # of rank one: the factored v is exact
        AutomagicV3([p], lr=0.1, weight_decay=0.5).step()
        # g / √(0.001 g²) is 31.6 everywhere; the bound makes it 1, and the decay adds 0.5 · 2.
        torch.testing.assert_close(p.detach(), 2 - 0.1 * (torch.tensor([[1.0, -1.0], [1.0, -1.0]]) + 1))


class TestSwaps:
    """What the package has no switch for."""

    def direction(self, gradients, swaps, **fields):
        """The last step's −update over the rate, with everything off that is not asked for."""
        p = torch.nn.Parameter(torch.zeros(2, 3))
        off = {"edge_suppression": False, "frequency_penalty": 0.0, "lora_rank_penalty": False, "optim_bits": 32}
        off |= {"spatial_awareness": False, "background_regularization": False, "search_gain": 0.0, "torque": False}
        optimizer = AutomagicCameAMP8bit([p], lr=1e-3, warmup_steps=0, weight_decay=0.0, **{**off, **fields})
        for g in gradients:
            before = p.detach().clone()
            p.grad = g.clone()
            with swapped(swaps):
                optimizer.step()
        return (before - p.detach()) / 1e-3

    def test_the_hard_mask_drops_what_disagrees_and_rescales(self):
        first = torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 2.0]])
        second = first * torch.tensor([[-0.3, 1.0, 1.0], [1.0, -0.3, 1.0]])
        plain = self.direction([first, second], ())
        agrees = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
        masked = self.direction([first, second], ("hard-mask",), torque=True)
        # Four of six are left: times 6 / (4 + 1).  Float32 parameters of about 1e-3, divided by 1e-3.
        torch.testing.assert_close(masked, plain * agrees * 6 / 5, rtol=1e-5, atol=1e-6)

    def test_without_confidence_the_direction_is_the_momentum(self):
        g = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0]])  # of rank one: the factored v is exact
        found = self.direction([g, g / 2], ("no-confidence",))
        v = (0.99 * 0.01 + 0.01 / 4) / (1 - 0.99**2)
        m = (0.9 * 0.1 + 0.1 / 2 / v**0.5) / (1 - 0.9**2)
        torch.testing.assert_close(found, torch.full((2, 3), m / (1 + 0.01) ** 0.5), rtol=1e-5, atol=0)
        assert (self.direction([g, g / 2], ()) - found).abs().min() > 1e-3

    def test_the_package_is_as_before(self):
        g = [torch.ones(2, 3), 2 * torch.ones(2, 3)]
        before = self.direction(g, (), torque=True)
        with pytest.raises(ZeroDivisionError), swapped(("hard-mask", "no-confidence")):
            1 / 0  # noqa: B018
        torch.testing.assert_close(self.direction(g, (), torque=True), before, rtol=0, atol=0)


class Average:
    """An averager as DoG's package has it, of a single number."""

    def __init__(self, p):
        self.p, self.seen = p, []

    def step(self):
        self.seen.append(float(self.p.detach()))

    @property
    def averaged_model(self):
        return [torch.tensor(sum(self.seen) / len(self.seen))]


def test_an_averaged_method_is_judged_by_its_average_and_goes_on_from_its_own():
    p = torch.nn.Parameter(torch.tensor(0.0))
    method = Averaged(torch.optim.SGD([p], lr=1.0), 3, Average(p), [p])
    for _ in range(3):
        p.grad = torch.tensor(-1.0)
        method.step()
    with method.judged():
        assert float(p.detach()) == 2.0  # of 1, 2 and 3
    assert float(p.detach()) == 3.0


def test_a_schedule_free_method_is_judged_in_eval_mode():
    class Modes(torch.optim.SGD):
        mode = None

        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

    optimizer = Modes([torch.nn.Parameter(torch.tensor(0.0))], lr=1.0)
    method = ScheduleFree(optimizer, 3)
    assert optimizer.mode == "train"
    with method.judged():
        assert optimizer.mode == "eval"
    assert optimizer.mode == "train"


PACKAGES = {
    "prodigy": "prodigyopt",
    "prodigy-corrected": "prodigyopt",
    "prodigy-schedule-free": "prodigyplus",
    "d-adaptation": "dadaptation",
}
PACKAGES |= {"schedule-free": "schedulefree", "mechanic": "mechanic_pytorch", "dog": "dog", "came": "came_pytorch"}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_lowers_a_bowl(name):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason="installed by `make evidence`")
    generator = torch.Generator().manual_seed(0)
    target = 0.1 * torch.randn(20, 20, generator=generator)
    p = torch.nn.Parameter(torch.zeros(20, 20))
    steps = 200
    # L-DoG and Prodigy leave their default start too late for so few steps.
    start = {"dog": 1e-3, "prodigy": 1e-4, "prodigy-corrected": 1e-4}.get(name, (*VARIANTS[name].starts, 1e-2)[0])
    method = RECIPES[name]([p], start, steps)
    for step in range(steps):
        method.set_rate(step)
        # With noise, without which all elements vote alike and Automagic v3 runs away.
        p.grad = p.detach() - target + 0.2 * torch.randn(20, 20, generator=generator)
        method.step()
    with method.judged():
        left = float((p - target).square().sum() / target.square().sum())
    assert left < 0.5
    found = method.found_rate()
    assert found is None or found > start
    assert sum(tensor.numel() for tensor in method.tensors()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["balanced", "schedule-free", "dog"])
def test_a_run_in_flax(name):
    sizes = Settings(width=16, depth=1, rank=2, batch=16, steps=10, base_batch=16, base_steps=60, held_out_noises=1)
    job = FlaxDiffusion(sizes)
    base = job.build_base()
    start = 1e-3
    first, second = (train(Spec("flax", name, start, 0), job, base) for _ in range(2))
    assert first["curve"] == second["curve"], "the seed decides everything"
    assert first["loss"] < first["curve"][0][1]
    assert first["parameters"] == sum(2 * (rows + columns) for rows, columns in LAYERS_OF_16)
    if name == "balanced":
        assert first["found_rate"] > 1.5e-5  # it begins at 1e-5, and four steps are the search
    if name == "dog":  # the start, the average and two numbers for the tree
        assert first["state_bytes"] >= first["adam_bytes"]


LAYERS_OF_16 = ((64, 16), (64, 32), (16, 16), (16, 16), (16, 64))
"""The denoiser's linear layers at width 16: entry, modulation, inner, outer, exit."""
