"""The gradient stages of section 4 in PyTorch as pure functions: against the float64 oracle, and what can be proved."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from automagic_core import row_shape
from automagic_torch import clip_by_percentile, encourage_low_rank, suppress_edges, suppress_high_frequencies
from automagic_torch.stages.encourage_low_rank import functions_of
from tests.oracle import stages as oracle

# With two spatial axes of length 3 and more, with one too short, and without; convolutions with 1 to 3 spatial axes.
SHAPES = ((), (5,), (3, 3), (5, 7), (1, 9), (2, 5), (7, 3), (33, 20), (4, 3, 5), (0, 4), (3, 0))
CONVOLUTIONS = {
    "torch": ((4, 3, 3, 3), (2, 3, 5, 4), (2, 1, 2, 6), (2, 3, 2, 4, 5)),
    "flax": ((3, 3, 3, 4), (5, 4, 3, 2), (2, 6, 1, 2), (2, 4, 5, 3, 2)),
}
CASES = [(layout, shape) for layout in ("torch", "flax") for shape in SHAPES + CONVOLUTIONS[layout]]
MATRICES = ((4, 9), (9, 4), (5, 5), (1, 7), (7, 1), (1, 1), (2, 3), (16, 40))

# Multiples of an eighth: squares of tiny numbers would leave float32.
pictures = hnp.arrays(
    np.float32,
    st.tuples(st.integers(3, 9), st.integers(3, 9)),
    elements=st.integers(-8000, 8000).map(lambda n: n / 8),
)


def distance(ours, theirs):
    """Relative, in the norm of the whole."""
    theirs = np.asarray(theirs, dtype=np.float64)
    error = float(np.linalg.norm(np.asarray(ours, dtype=np.float64) - theirs))
    return error / max(float(np.linalg.norm(theirs)), 1e-30)


def samples(shape, count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


@pytest.fixture(params=["whole", "in pieces"])
def pieces(request, monkeypatch):
    """Small arrays in one piece, or in several as large ones on a CPU."""
    if request.param == "in pieces":
        edges, frequencies = (
            sys.modules[function.__module__] for function in (suppress_edges, suppress_high_frequencies)
        )
        monkeypatch.setattr(edges, "SLAB", 12)
        monkeypatch.setattr(frequencies, "LARGE", 0)
        monkeypatch.setattr(frequencies, "STRIP", 20)


# ---------------------------------------------------------------- 1. clip_by_percentile


@pytest.mark.parametrize("percentile", [1, 50, 95, 99])
def test_clipping_is_the_oracles(percentile):
    rng = np.random.default_rng(percentile)
    theirs = oracle.PercentileClip(percentile)
    history, position = torch.zeros(100), torch.zeros((), dtype=torch.int32)
    clipped = 0
    for step in range(250):
        grads = [(10 ** rng.uniform(-2, 2) * rng.standard_normal(s)).astype(np.float32) for s in ((3, 4), (5,), ())]
        if step % 17 == 0:
            grads = [g * np.float32(rng.choice([0.0, np.nan])) for g in grads]
        skipped = [bool(np.isnan(g).any()) for g in grads]
        expected = theirs(
            [None if bad else g.astype(np.float64) for g, bad in zip(grads, skipped, strict=True)], skipped
        )
        ours, history, position = clip_by_percentile(
            [torch.tensor(g) for g in grads], history, position, percentile=percentile
        )
        for mine, right, g in zip(ours, expected, grads, strict=True):
            assert right is None or distance(mine, right) < 1e-6  # some roundings of a float32 sum
            clipped += right is not None and bool(np.abs(right).sum() < np.abs(g).sum() * 0.999)
        if theirs.ring:
            np.testing.assert_allclose(history.sort().values, sorted(theirs.ring), rtol=1e-6)
    # Entry 99 is the largest of the history, this n² included: nothing is above it.
    assert (clipped > 10) == (percentile < 99)
    assert (history.dtype, position.dtype, position.shape) == (torch.float32, torch.int32, ())


def test_the_first_norm_fills_the_history_and_the_oldest_goes_first():
    history, position = torch.zeros(100), torch.zeros((), dtype=torch.int32)
    for step in range(1, 104):
        _, history, position = clip_by_percentile([torch.tensor([float(step)])], history, position, percentile=99)
        newest = history[(position.item() - 1) % 100].item()
        assert newest == step**2
        assert (history == 1).sum() == max(0, 101 - step)
    assert history[position].item() == 4**2


# ---------------------------------------------------------------- 2. suppress_edges


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize(("layout", "shape"), CASES)
def test_edges_are_the_oracles(layout, shape, embedding):
    place = {"layout": layout, "embedding": embedding}
    strengths = {"penalty": 0.2, "threshold": 0.3}
    start = oracle.initial_edge_history(shape, layout, embedding)
    theirs = [start] * 3
    if start is not None:
        assert start.shape == row_shape(shape, layout, embedding)
    batch = None if start is None else torch.zeros(3, *start.shape)
    single = None if start is None else torch.zeros(start.shape)
    # Arrays of one batch may have different ages.
    for step, ages in enumerate([(1, 1, 1), (2, 5, 2), (3, 6, 900)]):
        g = samples(shape, 3, seed=step)
        out, batch = suppress_edges(
            torch.tensor(g), batch, torch.tensor(ages, dtype=torch.int32), **place, **strengths, batched=True
        )
        alone, single = suppress_edges(
            torch.tensor(g[0]), single, torch.tensor(ages[0], dtype=torch.int32), **place, **strengths
        )
        for i, age in enumerate(ages):
            expected, theirs[i] = oracle.suppress_edges(g[i].astype(np.float64), theirs[i], age, **place, **strengths)
            assert distance(out[i], expected) < 1e-6  # ten roundings of float32
            assert start is None or distance(batch[i], theirs[i]) < 1e-6
        assert distance(alone, out[0]) < 1e-6
        assert single is None or distance(single, batch[0]) < 1e-6
    assert start is None or distance(g, out) > 1e-3  # it does something


def test_stages_can_be_differentiated(pieces):
    g = torch.randn(40, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
    history, age = torch.zeros(40, 1), torch.tensor(1)
    for stage in (
        lambda x: suppress_edges(x, history, age, penalty=0.2, threshold=0.5)[0],
        lambda x: suppress_high_frequencies(x, penalty=0.5),
    ):
        # With a derivative frequencies are damped in one piece, whose FFT rounds numbers of up to 5 otherwise.
        torch.testing.assert_close(stage(g).detach(), stage(g.detach()), rtol=0, atol=2e-6)
        direction = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
        (slope,) = torch.autograd.grad((stage(g) * direction).sum(), g)
        # Both stages are linear between kinks, so a difference over a short way is a derivative but for rounding.
        way = 1e-3 * slope
        ahead, behind = ((stage(g.detach() + sign * way).double() * direction).sum() for sign in (1, -1))
        assert abs((ahead - behind) / 2 - (slope * way).sum()) < 1e-3 * (slope * way).sum()


@given(pictures, st.floats(0, 0.2), st.floats(0, 2))
def test_edges_never_exceed_the_largest_magnitude(g, penalty, threshold):
    out, _ = suppress_edges(
        torch.tensor(g), torch.zeros(len(g), 1), torch.tensor(1), penalty=penalty, threshold=threshold
    )
    assert out.abs().max() <= np.abs(g).max() * (1 + 1e-6)  # rounding of a weighted mean


@given(st.floats(-(2.0**49), 2.0**49, width=32), st.integers(3, 20), st.integers(3, 20))
def test_edges_leave_constants_exactly(value, n1, n2):
    g = torch.full((n1, n2), value)
    out, history = suppress_edges(g, torch.zeros(n1, 1), torch.tensor(1), penalty=0.2, threshold=0.0)
    assert torch.equal(out, g)
    assert not history.any()


# ---------------------------------------------------------------- 3. suppress_high_frequencies


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("penalty", [0.05, 1.0])
@pytest.mark.parametrize(("layout", "shape"), CASES)
def test_frequencies_are_the_oracles(layout, shape, penalty):
    g = samples(shape, 3)
    out = suppress_high_frequencies(torch.tensor(g), penalty=penalty, layout=layout, batched=True)
    for i in range(3):
        expected = oracle.suppress_high_frequencies(g[i].astype(np.float64), layout=layout, penalty=penalty)
        assert distance(out[i], expected) < 1e-6  # a float32 FFT
        alone = suppress_high_frequencies(torch.tensor(g[i]), penalty=penalty, layout=layout)
        assert distance(alone, expected) < 1e-6
        assert alone.is_contiguous()
    g = torch.tensor(g)
    assert torch.equal(
        suppress_high_frequencies(g.clone(), penalty=penalty, layout=layout, in_place=True, batched=True), out
    )
    suppress_high_frequencies(g, penalty=penalty, layout=layout, batched=True)
    assert torch.equal(g, torch.tensor(samples(shape, 3)))  # not written into unless asked to


@given(pictures, st.floats(0, 1))
def test_energy_above_the_cutoff_is_multiplied_and_the_rest_is_kept(g, penalty):
    out = suppress_high_frequencies(torch.tensor(g), penalty=penalty).double().numpy()
    high = oracle.above_cutoff(*g.shape)
    before, after = (np.fft.rfft2(x.astype(np.float64)) for x in (g, out))
    size = np.linalg.norm(before)
    # Amplitudes rather than energies: their error is that of the float32 FFT, relative to the whole.
    assert np.linalg.norm((after - (1 - penalty) * before)[high]) <= 1e-6 * size
    assert np.linalg.norm((after - before)[~high]) <= 1e-6 * size


# ---------------------------------------------------------------- 4. encourage_low_rank


def weight(kind, side, length, rng):
    if kind == "rank one":
        return np.outer(rng.standard_normal(side), rng.standard_normal(length))
    if kind == "exactly rank one":
        return np.outer(rng.integers(1, 5, side), -rng.integers(1, 5, length)) + 0.0
    if kind == "repeated values":
        return np.linalg.qr(rng.standard_normal((length, side)))[0].T
    if kind == "half the rank":
        return rng.standard_normal((side, side // 2 + 1)) @ rng.standard_normal((side // 2 + 1, length))
    scale = {"full": 0.0, "steep": 6.0, "tiny": 0.0}[kind]
    w = rng.standard_normal((side, length)) * np.logspace(0, -scale, side)[:, None]
    return w * (1e-38 if kind == "tiny" else 1)


KINDS = ("rank one", "exactly rank one", "repeated values", "half the rank", "full", "steep", "tiny")


@pytest.mark.parametrize(("strength", "bound"), [(0.01, 1e-5), (0.3, 2e-4)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("side", "length"), [(2, 3), (16, 64), (48, 50)])
def test_low_rank_is_as_close_to_a_float64_svd_as_the_page_needs(kind, side, length, strength, bound):
    rng = np.random.default_rng(0)
    w = np.stack([weight(kind, side, length, rng) for _ in range(3)]).astype(np.float32)
    g = rng.standard_normal(w.shape).astype(np.float32)
    fields = {"strength": strength, "emphasis": 1.2}
    out = encourage_low_rank(torch.tensor(g), torch.tensor(w), **fields, batched=True)
    for i in range(3):
        expected = oracle.encourage_low_rank(g[i].astype(float), w[i].astype(float), layout="torch", **fields)
        assert distance(out[i], expected) < bound


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("layout", ["torch", "flax"])
@pytest.mark.parametrize("embedding", [False, True])
def test_low_rank_is_the_oracles(shape, layout, embedding):
    g, w = samples(shape, 3, seed=1), samples(shape, 3, seed=2)
    w[1] = 0.0
    fields = {"strength": 0.3, "emphasis": 1.7, "layout": layout, "embedding": embedding}
    out = encourage_low_rank(torch.tensor(g), torch.tensor(w), **fields, batched=True)
    assert torch.equal(out[1], torch.tensor(g[1]))
    for i in range(3):
        expected = oracle.encourage_low_rank(g[i].astype(float), w[i].astype(float), **fields)
        assert distance(out[i], expected) < 1e-6  # rounding to float32 at the end
        alone = encourage_low_rank(torch.tensor(g[i]), torch.tensor(w[i]), **fields)
        assert distance(alone, expected) < 1e-6


def test_low_rank_leaves_what_it_cannot_decompose():
    g, w = torch.randn(4, 6), torch.randn(4, 6)
    for bad in (torch.nan, torch.inf, -torch.inf):
        w[1, 2] = bad
        assert torch.equal(encourage_low_rank(g, w, strength=0.3, emphasis=2.0), g)
    for shape in ((5,), (2, 3, 4)):
        x = torch.randn(shape)
        assert encourage_low_rank(x, x, strength=0.3, emphasis=2.0) is x
    assert not encourage_low_rank(torch.zeros(4, 6), torch.randn(4, 6), strength=0.3, emphasis=2.0).any()
    with pytest.raises(ValueError, match=r"g has shape \(4, 6\), w \(6, 4\)"):
        encourage_low_rank(g, w.mT, strength=0.3, emphasis=2.0)


def test_reduced_precision_that_the_user_allows_does_not_reach_low_rank():
    g, w = torch.tensor(samples((16, 64), 1)[0]), torch.tensor(samples((16, 64), 1, seed=1)[0])
    fields = {"strength": 0.3, "emphasis": 1.5}
    before = torch.get_float32_matmul_precision()
    expected = encourage_low_rank(g, w, **fields)
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            found = encourage_low_rank(g, w, **fields)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, expected)


def matrices(kinds):
    return st.tuples(st.integers(1, 8), st.integers(0, 6), st.integers(0, 2**31), st.sampled_from(kinds))


# Of the other kinds rounding the turned weight to float32 changes the weakest directions.
@settings(deadline=None, max_examples=60)
@given(matrices(("full", "repeated values")), st.floats(0.01, 0.9), st.floats(1, 3))
def test_low_rank_turns_with_the_long_side(matrix, strength, emphasis):
    side, more, seed, kind = matrix
    rng = np.random.default_rng(seed)
    w, g = weight(kind, side, side + more, rng), rng.standard_normal((side, side + more))
    turn = np.linalg.qr(rng.standard_normal((side + more, side + more)))[0]

    def stage(g, w):
        g, w = (torch.tensor(x.astype(np.float32)) for x in (g, w))
        return encourage_low_rank(g, w, strength=strength, emphasis=emphasis).double().numpy()

    # Rounding the turned arrays: 6e-8 of w, up to ten times as much of its weakest direction, and the whole of g.
    assert distance(stage(g @ turn, w @ turn), stage(g, w) @ turn) < 1e-5


@settings(deadline=None, max_examples=60)
@given(matrices(KINDS))
def test_the_tail_has_singular_values_between_0_and_1(matrix):
    side, more, seed, kind = matrix
    W = torch.tensor(weight(kind, side, side + more, np.random.default_rng(seed)).astype(np.float32)).double()[None]
    W = W / W.abs().max()
    weak, F, norm = functions_of(W @ W.mT)
    spectrum = torch.linalg.svdvals(F @ W)
    scale = torch.linalg.vector_norm(W).item() / side**0.5  # the root of the mean eigenvalue
    assert 0 < spectrum.max() <= scale * (1 + 1e-6)
    values = torch.linalg.eigvalsh(weak)
    assert ((values >= -1e-12) & (values <= 1 + 1e-12)).all()
    assert norm.item() == pytest.approx(torch.linalg.vector_norm(spectrum).item(), rel=1e-6)


# ---------------------------------------------------------------- all


@settings(deadline=None)
@given(pictures, st.integers(-12, 12))
def test_every_stage_scales_with_the_gradient(g, power):
    g, c = torch.tensor(g), 2.0**power
    w = torch.tensor(samples(tuple(g.shape), 1)[0])
    history, position = torch.zeros(100), torch.zeros((), dtype=torch.int32)

    def all_stages(c):
        rings = history, position
        for norm in (0.5, 1.0, 2.0):
            _, *rings = clip_by_percentile([c * norm * g], *rings, percentile=90)
        (clipped,), *_ = clip_by_percentile([3 * c * g], *rings, percentile=90)
        _, rough = suppress_edges(c * g.flip(0), torch.zeros(len(g), 1), torch.tensor(1), **edges)
        edged, _ = suppress_edges(c * g, rough, torch.tensor(2), **edges)
        smooth = suppress_high_frequencies(c * g, penalty=0.3)
        return clipped, edged, smooth, encourage_low_rank(c * g, w, strength=0.3, emphasis=1.5)

    edges = {"penalty": 0.1, "threshold": 0.6}
    for scaled, plain in zip(all_stages(c), all_stages(1.0), strict=True):
        # A power of two moves no rounding, but for the FFT's order of summation none is promised.
        torch.testing.assert_close(scaled, c * plain, rtol=1e-6, atol=1e-6 * c * g.abs().max().item())


def test_a_default_device_changes_nothing():
    g = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    expected = suppress_high_frequencies(g, penalty=0.1)
    with torch.device("meta"):
        assert torch.equal(suppress_high_frequencies(g, penalty=0.1), expected)
