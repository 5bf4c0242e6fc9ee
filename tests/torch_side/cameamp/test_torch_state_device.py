"""`state_device="cpu"`: states in the host's memory, computed with on their parameters' device."""

import copy
import pickle

import pytest
import torch

from automagic_torch import AutomagicCameAMP8bit, optimizer, release_gradients
from automagic_torch.arrays.host_memory import on_device, on_host
from automagic_torch.sharding import extent as extent_module
from automagic_torch.steps import slabs
from tests.torch_side.torch_helpers import SMALL, parameters, run, same, snapshot, through_a_file

SHAPES = ((), (5,), (8, 6), (8, 6), (16, 256), (4, 3, 3, 3))
FIELDS = SMALL | {"torque_decay": 0.5, "factored": "none", "percentile_clipping": 90}


def in_two_memories(monkeypatch):
    """As if the host's memory were another one: what was copied to it is destroyed on the device."""
    held = {}

    def to_host(x):
        kept = x.clone()
        x.fill_(77)
        held[id(kept)] = kept
        return kept

    monkeypatch.setattr(extent_module, "on_host", to_host)
    monkeypatch.setattr(extent_module, "on_device", lambda tensors, device: [x.clone() for x in tensors])
    return held


def test_a_step_uses_only_what_it_brought_and_keeps_only_what_it_took_back(monkeypatch):
    there, kept_apart = (parameters(SHAPES) for _ in range(2))
    plain = AutomagicCameAMP8bit(there, **FIELDS)
    offloaded = AutomagicCameAMP8bit(kept_apart, state_device="cpu", **FIELDS)
    run(plain, range(1, 7))
    held = in_two_memories(monkeypatch)
    run(offloaded, range(1, 7))
    assert same(snapshot(offloaded), snapshot(plain))
    states = [tensor for state in offloaded.state.values() for tensor in state.values()]
    assert all(id(tensor) in held for tensor in states)


@pytest.mark.parametrize("state_device", [None, "cpu"])
@pytest.mark.parametrize("shape", [(128, 512), (40, 24)])
def test_a_step_leaves_an_earlier_state_dict_as_it_was(monkeypatch, state_device, shape):
    monkeypatch.setattr(slabs, "SLAB", dict.fromkeys(slabs.SLAB, 2**13))
    (p,) = parameters([shape])
    optimizer = AutomagicCameAMP8bit([p], state_device=state_device, **FIELDS)
    for _ in range(3):
        p.grad = torch.ones(shape)
        optimizer.step()
        given = optimizer.state_dict()["state"][0]
        before = {name: x.clone() for name, x in given.items()}
        optimizer.step()
        assert all(torch.equal(given[name], x) for name, x in before.items())


def test_parameters_elsewhere_have_their_states_on_the_host(monkeypatch):
    # The meta device computes shapes and devices without values, and refuses to mix its tensors with the host's.
    monkeypatch.setattr(extent_module, "on_host", lambda x: torch.zeros(x.shape, dtype=x.dtype))
    params = [torch.nn.Parameter(p.detach().to("meta")) for p in parameters(SHAPES)]
    params[2]._is_lora_layer = True
    optimizer = AutomagicCameAMP8bit(
        params, state_device="cpu", **FIELDS | {"optim_bits": 32, "percentile_clipping": 100}
    )
    for _ in range(6):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert {x.device.type for state in optimizer.state.values() for x in state.values()} == {"cpu"}
    optimizer.load_state_dict(optimizer.state_dict())
    assert {x.device.type for state in optimizer.state.values() for x in state.values()} == {"cpu"}


def test_tensors_move_between_devices_and_stay_where_they_are():
    x = torch.arange(6.0)
    assert on_host(x) is x
    assert on_device([x], torch.device("cpu"))[0] is x
    assert on_device([x], torch.device("meta"))[0].device.type == "meta"


def test_checkpoints_and_copies_keep_the_place_and_every_bit():
    optimizer = AutomagicCameAMP8bit(parameters(SHAPES), state_device="cpu", **FIELDS)
    run(optimizer, range(1, 3))
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for state_device in (None, torch.device("cpu")):
        params = [torch.nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]
        other = AutomagicCameAMP8bit(params, state_device=state_device)
        other.load_state_dict(through_a_file(optimizer.state_dict()))
        assert other.state_device == state_device
        copies.append(other)
    run(optimizer, range(3, 7))
    for other in copies:
        run(other, range(3, 7))
        assert same(snapshot(other), snapshot(optimizer))
    assert [other.state_device for other in copies[:2]] == [torch.device("cpu")] * 2


@pytest.mark.parametrize("value", ["cuda", "disk", 3.5])
def test_another_place_is_refused(value):
    with pytest.raises(ValueError, match=r"state_device = .*valid: None .*'cpu'"):
        AutomagicCameAMP8bit(parameters(), state_device=value)


@pytest.mark.parametrize("released", [False, True])
def test_a_step_waits_for_every_device_whose_states_it_copied(monkeypatch, released):
    waited = []
    monkeypatch.setattr(optimizer, "wait_for_copies", lambda devices: waited.append(set(devices)))
    (p,) = parameters([(8, 6)])
    stepped = AutomagicCameAMP8bit([p], state_device="cpu", **FIELDS | {"percentile_clipping": 100})
    if released:
        release_gradients(stepped)
    p.square().sum().backward()
    stepped.step()
    assert waited == [{p.device}]
