"""The stages inside the optimizer, in front of section 5: against the oracle, alone, in pairs and all together."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch

from automagic_torch import (
    AutomagicCameAMP8bit,
    encourage_low_rank,
    suppress_edges,
    suppress_high_frequencies,
)
from tests.oracle.cameamp import CameampOracle
from tests.oracle.settings import STAGES, STAGES_OFF
from tests.torch_side.cameamp.test_torch_oracle import differences, distance
from tests.torch_side.torch_helpers import SMALL, run, same, set_gradients, snapshot, through_a_file

ON = {
    "clip": {"percentile_clipping": 60},
    "edges": {"edge_suppression": True, "edge_penalty": 0.2, "edge_threshold": 0.2},
    "frequencies": {"frequency_penalty": 0.5},
    "low_rank": {"lora_rank_penalty": True, "rank_penalty_strength": 0.2, "low_rank_emphasis": 1.5},
}
BASE = {"lr": 1e-3, "max_lr": 1e-2, "warmup_steps": 12, "weight_decay": 0.1}
DENSE = ((), (5,), (8, 6), (3, 16), (7, 7), (1, 4), (2, 2), (4, 3, 5))
SHAPES = {
    "torch": (*DENSE, (4, 3, 3, 3), (2, 3, 4, 2), (2, 2, 3, 3, 5)),
    "flax": (*DENSE, (3, 3, 3, 4), (4, 2, 3, 2), (3, 3, 5, 2, 2)),
}
# Marks: a third of the arrays each, on arrays of every number of axes.
LORA = [i % 3 != 0 for i in range(11)]
EMBEDDING = [i % 3 == 2 for i in range(11)]


def stages(*names):
    return {**STAGES_OFF, **{key: value for name in names for key, value in ON[name].items()}}


def arrays(layout):
    rng = np.random.default_rng(3)
    params = []
    for shape, lora, embedding in zip(SHAPES[layout], LORA, EMBEDDING, strict=True):
        p = torch.nn.Parameter(torch.tensor(rng.standard_normal(shape), dtype=torch.float32))
        p._is_lora_layer, p._is_embedding = lora, embedding
        params.append(p)
    with torch.no_grad():
        params[4].zero_()  # a fresh B matrix
        params[3].copy_(params[3][:, :1] @ params[3][:1])  # of rank one
    return params


def gradient(rng, shape, step):
    if step > 3 and rng.random() < 0.05:
        return None
    g = np.asarray(10.0 ** rng.uniform(-2, 2) * (0.4 + rng.standard_normal(shape)), dtype=np.float32)
    if step > 2 and rng.random() < 0.04:
        g = g * np.float32(rng.choice([0.0, np.nan]))
    return g


def largest_distance(fields, *, layout="torch", steps=24, disable=frozenset()):
    """Over all updates and states of all steps."""
    params = arrays(layout)
    optimizer = AutomagicCameAMP8bit(params, optim_bits=32, layout=layout, **fields)
    oracle = CameampOracle(
        SHAPES[layout], layout=layout, lora=LORA, embedding=EMBEDDING, disable=disable, optim_bits=32, **fields
    )
    updates = {}
    optimizer._on_update = updates.__setitem__
    rng = np.random.default_rng(11)
    largest = 0.0
    for step in range(1, steps + 1):
        grads = [gradient(rng, shape, step) for shape in SHAPES[layout]]
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else torch.tensor(g)
        expected = oracle.step_(grads, [p.detach().numpy() for p in params])
        updates.clear()
        optimizer.step()
        for index, (p, theirs) in enumerate(zip(params, expected, strict=True)):
            state = optimizer.state.get(p, {})
            found = differences(state, oracle.state[index], float(np.linalg.norm(theirs))) if state else {}
            if not disable:
                assert ("edge_history" in state) == (bool(state) and "edge_history" in oracle.state[index])
            furthest = max(distance(updates.get(p, torch.zeros(p.shape)), theirs), *found.values())
            # In an array of a few elements a difference of two nearly equal numbers may be all there is.
            largest = max(largest, furthest if theirs.size > 4 else furthest / 10)
        if oracle.stages.clip.ring and "automagic_norm_history" in optimizer.param_groups[0]:
            ring = optimizer.param_groups[0]["automagic_norm_history"].sort().values
            largest = max(largest, distance(ring, sorted(oracle.stages.clip.ring)))
    return largest


# 24 steps of float32 against float64: about a hundred roundings of 6e-8 on the way to an update.
BOUND = 1e-5


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        *(((name,), "flax") for name in ON),
        *((names, "torch") for names in (("clip", "low_rank"), ("edges", "frequencies"))),
        *(pytest.param((name,), "torch", marks=pytest.mark.slow) for name in ON),
        *(
            pytest.param(names, layout, marks=pytest.mark.slow)
            for layout in ("torch", "flax")
            for names in itertools.combinations(ON, 2)
        ),
    ],
)
def test_stages_alone_and_in_pairs(names, layout):
    assert largest_distance(BASE | stages(*names), layout=layout) < BOUND


@pytest.mark.parametrize(
    ("factored", "layout"),
    [
        ("second_moment", "flax"),
        ("none", "torch"),
        *(pytest.param(factored, "flax", marks=pytest.mark.slow) for factored in ("none", "all")),
        *(pytest.param(factored, "torch", marks=pytest.mark.slow) for factored in ("second_moment", "all")),
    ],
)
def test_all_stages(factored, layout):
    fields = BASE | stages(*ON) | {"factored": factored, "torque_decay": 0.5}
    assert largest_distance(fields, layout=layout) < BOUND


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_stage_taken_out_of_the_oracle_is_noticed(stage):
    assert not largest_distance(BASE | stages(*ON), disable=frozenset({stage})) < 10 * BOUND


def marked(count=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    shapes = [(8, 6), (5,), (4, 12), (12, 4), (4, 3, 3, 3), (4, 12)][:count]
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for p in params:
        p._is_lora_layer = True
    return params


ALL = SMALL | stages(*ON)


def test_a_skipped_array_passes_no_stage_and_its_group_records_no_norm():
    params = marked()
    optimizer = AutomagicCameAMP8bit([{"params": params[:3]}, {"params": params[3:]}], **ALL)
    run(optimizer, range(1, 4))
    before, group = dict(optimizer.state[params[2]]), dict(optimizer.param_groups[0])
    other = optimizer.param_groups[1]["automagic_norm_position"].item()
    set_gradients(params, 4)
    params[2].grad[1, 1] = torch.inf
    optimizer.step()
    after = dict(optimizer.state[params[2]])
    assert after.pop("skipped_steps") == before.pop("skipped_steps") + 1
    assert same(after, {name: before[name] for name in after})
    assert not same(optimizer.state[params[0]]["edge_history"], torch.zeros(8, 1))
    for name in ("automagic_norm_history", "automagic_norm_position"):
        assert same(optimizer.param_groups[0][name], group[name])
    assert optimizer.param_groups[1]["automagic_norm_position"].item() == other + 1


def test_the_norm_is_that_of_the_group():
    params = marked()
    optimizer = AutomagicCameAMP8bit([{"params": params[:2]}, {"params": params[2:]}], **ALL)
    set_gradients(params, 1)
    params[4].grad = None
    optimizer.step()
    for group in optimizer.param_groups:
        norm = sum(p.grad.double().square().sum().item() for p in group["params"] if p.grad is not None)
        assert group["automagic_norm_history"].tolist() == pytest.approx([norm] * 100)
        assert (group["automagic_norm_position"].item(), group["automagic_norm_position"].dtype) == (1, torch.int32)


def test_the_history_is_there_while_the_group_clips():
    params = marked()
    optimizer = AutomagicCameAMP8bit(
        [{"params": params[:2]}, {"params": params[2:], "percentile_clipping": 100}], **ALL
    )
    first, second = optimizer.param_groups
    assert same(first["automagic_norm_history"], torch.zeros(100))
    assert "automagic_norm_history" not in second
    second["automagic_percentile_clipping"] = 50  # before the first step fields may still change
    run(optimizer, range(1, 3))
    assert second["automagic_norm_history"].all()
    first["automagic_percentile_clipping"] = 100
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="the state of group 0 does not fit its percentile_clipping"):
        run(optimizer, range(3, 4))
    assert same(snapshot(optimizer), before)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("saved_at", [0, 2, 6])
def test_a_saved_run_goes_on_bit_for_bit(bits, saved_at):
    params = marked()
    optimizer = AutomagicCameAMP8bit(params, **ALL | {"optim_bits": bits})
    run(optimizer, range(1, 1 + saved_at))
    copies = marked()
    with torch.no_grad():
        for p, q in zip(params, copies, strict=True):
            q.copy_(p)
    restored = AutomagicCameAMP8bit(copies)
    restored.load_state_dict(through_a_file(optimizer.state_dict()))
    run(optimizer, range(1 + saved_at, 5 + saved_at))
    run(restored, range(1 + saved_at, 5 + saved_at))
    assert same(snapshot(restored), snapshot(optimizer))
    assert "_stage_energy" not in optimizer.state_dict()


REFUSED = {
    "lacks norm_history": lambda group: group.pop("automagic_norm_history"),
    "lacks norm_position": lambda group: group.pop("automagic_norm_position"),
    "valid: a float32 tensor of shape .100,.": lambda group: group.update(automagic_norm_history=torch.zeros(99)),
    "norm_position = .* valid: an int32 scalar tensor in .0, 99.": lambda group: group.update(
        automagic_norm_position=torch.tensor(100, dtype=torch.int32)
    ),
    "has a norm_history with percentile_clipping = 100": lambda group: group.update(automagic_percentile_clipping=100),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_history_that_does_not_fit_is_refused_and_nothing_changes(message):
    optimizer = AutomagicCameAMP8bit(marked(), **ALL)
    run(optimizer, range(1, 3))
    state_dict = copy.deepcopy(optimizer.state_dict())
    REFUSED[message](state_dict["param_groups"][0])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert same(snapshot(optimizer), before)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_of_the_optimizer_keep_the_marks(way):
    optimizer = AutomagicCameAMP8bit(marked(), **ALL)
    run(optimizer, range(1, 3))
    other = way(optimizer)
    run(optimizer, range(3, 6))
    run(other, range(3, 6))
    assert same(snapshot(other), snapshot(optimizer))


def test_the_energy_of_every_stage_is_kept():
    params = marked()
    optimizer = AutomagicCameAMP8bit([{"params": params[:3]}, {"params": params[3:], **stages()}], **ALL)
    set_gradients(params, 1)
    params[1].grad.fill_(torch.nan)
    optimizer.step()
    set_gradients(params, 2)
    expected = []
    first = params[:3]
    norms = optimizer.param_groups[0]["automagic_norm_history"], optimizer.param_groups[0]["automagic_norm_position"]
    assert not norms[0].any()  # the first call had a skipped array
    grads = [p.grad.clone() for p in first]
    expected.append(list(grads))
    expected.append(list(grads))  # the first norm is its own threshold
    histories = [optimizer.state[p].get("edge_history") for p in first]
    grads = [
        suppress_edges(g, history, torch.tensor(2), penalty=0.2, threshold=0.2)[0]
        for g, history in zip(grads, histories, strict=True)
    ]
    expected.append(grads)
    grads = [suppress_high_frequencies(g, penalty=0.5) for g in grads]
    expected.append(grads)
    expected.append(
        [encourage_low_rank(g, p.detach(), strength=0.2, emphasis=1.5) for g, p in zip(grads, first, strict=True)]
    )
    untouched = sum(p.grad.square().sum().item() for p in params[3:])
    totals = [untouched + sum(g.square().sum().item() for g in grads) for grads in expected]
    optimizer.step()
    found = optimizer._stage_energy
    assert list(found) == [
        "clip_by_percentile",
        "suppress_edges",
        "suppress_high_frequencies",
        "encourage_low_rank",
    ]
    for index, (before, after) in enumerate(found.values()):
        assert (before.dtype, before.shape, after.dtype, after.shape) == (torch.float32, (), torch.float32, ())
        assert before.item() == pytest.approx(totals[index], rel=1e-5)
        assert after.item() == pytest.approx(totals[index + 1], rel=1e-5)
    assert len({round(total, 3) for total in totals}) == 4  # stages 2 to 4 do something here


def test_no_energy_without_stages():
    optimizer = AutomagicCameAMP8bit(marked(), **SMALL | stages())
    assert optimizer._stage_energy == {}
    run(optimizer, range(1, 3))
    assert optimizer._stage_energy == {}
