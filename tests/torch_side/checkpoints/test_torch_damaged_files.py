"""Checkpoint files that are damaged, wrong or malicious are refused, and the optimizer keeps what it had."""

import copy
import io
import pickle
import random
import warnings
import zipfile
from collections import Counter

import pytest
import torch

from automagic_core import PROFILES
from automagic_core.arrays.state_forms import SEARCH_SCALARS
from automagic_torch import AutomagicCameAMP8bit, create_improved_8bit_optimizer
from automagic_torch.checkpoints.saved_values import limits
from tests.torch_side.torch_helpers import SMALL, parameters, run, same, snapshot, through_a_file

SHAPES = [(5,), (8, 6)]
LAST = 1
"""The array that is checked last: what is wrong there must not leave the first one loaded."""


def make(profile=None, steps=0, **fields):
    optimizer = create_improved_8bit_optimizer(parameters(SHAPES), profile, **SMALL | fields)
    run(optimizer, range(1, 1 + steps))
    return optimizer


def as_file(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load(file):
    return torch.load(io.BytesIO(file), weights_only=True)


@pytest.mark.parametrize("profile", [None, *PROFILES])
@pytest.mark.parametrize("steps", [0, 2, 6])  # before the first, within the warm-up of 4, after it
def test_every_state_loads_with_weights_only(profile, steps):
    optimizer = make(profile, steps, percentile_clipping=90, torque_decay=0.5)
    other = make()
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same(other.state_dict(), optimizer.state_dict())


def test_a_truncated_file_cannot_be_read():
    file = as_file(make(steps=2).state_dict())
    for length in (0, 1, 100, len(file) // 2, len(file) - 30, len(file) - 1):
        # Which of these torch raises depends on the length.
        with pytest.raises((RuntimeError, ValueError, EOFError, pickle.UnpicklingError)):
            load(file[:length])


def flipped(file, bit):
    damaged = bytearray(file)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def checksums_agree(file):
    """What a user can do about numbers that nobody can tell from right ones: the file is a zip archive."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(file))
        # torch takes an entry with attributes for a folder, and reads whatever was in its memory.
        return archive.testzip() is None and not any(entry.external_attr for entry in archive.infolist())
    except Exception:  # zipfile has many for a damaged header
        return False


@pytest.mark.parametrize("flips", [200, pytest.param(4000, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_refused_or_harmless_or_found_by_the_archives_checksums(flips):
    optimizer = make(steps=2, percentile_clipping=90)
    good, good_file = copy.deepcopy(optimizer.state_dict()), as_file(optimizer.state_dict())
    assert checksums_agree(good_file)
    target = make(steps=1)
    before = snapshot(target)
    outcomes = Counter()
    choose = random.Random(0)
    for _ in range(flips):
        damaged = flipped(good_file, choose.randrange(8 * len(good_file)))
        try:
            with warnings.catch_warnings(action="ignore"):  # torch's, about the version of the pickle
                state_dict = load(damaged)
        except Exception:  # whatever torch says: it is refused
            outcomes["unreadable"] += 1
            continue
        try:
            target.load_state_dict(state_dict)
        except ValueError:  # another error would be a gap in the checks
            outcomes["refused"] += 1
            assert same(snapshot(target), before)
            continue
        if same(target.state_dict(), good):
            outcomes["harmless"] += 1
            target.load_state_dict(before[1])
        else:
            outcomes["other numbers"] += 1
            assert not checksums_agree(damaged)
            run(target, range(3, 5))
            assert all(p.isfinite().all() for p in target.param_groups[0]["params"])
            target = make(steps=1)
    # About 34, 8, 48 and 10 in a hundred: none may be empty, or nothing was tried.
    assert set(outcomes) == {"unreadable", "refused", "harmless", "other numbers"}


def state_value(key, value):
    def change(state_dict):
        tensor = state_dict["state"][LAST][key]
        tensor.view(-1)[-1] = value

    return change


def group_value(key, value):
    return lambda state_dict: state_dict["param_groups"][0].__setitem__(key, value)


def sparse(state_dict):
    state_dict["state"][LAST]["lr_mask"] = state_dict["state"][LAST]["lr_mask"].to_sparse()


DAMAGED = {
    "NaN scale": (state_value("exp_avg_absmax", torch.nan), "exp_avg_absmax .* nan"),
    "infinite scale": (state_value("exp_avg_sq_row_absmax", torch.inf), "exp_avg_sq_row_absmax .* inf"),
    "negative scale": (state_value("s_absmax", -1.0), "s_absmax .* -1"),
    "negative mean square": (state_value("exp_avg_sq_col", -1.0), "exp_avg_sq_col .* -1"),
    "mask out of its limits": (state_value("lr_mask", 2.0), "lr_mask .* 2"),
    "NaN walk": (state_value("walk", torch.nan), "walk .* nan"),
    "age": (state_value("age", -3), "age .* -3"),
    "sparse": (sparse, "lr_mask of shape .*dense"),
    "no dict of states": (lambda d: d["state"].__setitem__(LAST, [1]), "parameter 1 .* is a list"),
    "rate": (group_value("lr", float("nan")), "lr = nan"),
    "rate as text": (group_value("lr", "1e-3"), "lr = '1e-3'"),
    "scale of the rate": (group_value("automagic_log_rate_scale", torch.tensor(torch.nan)), "log_rate_scale .* nan"),
    "rate beyond float32": (group_value("automagic_log_rate_scale", torch.tensor(-90.0)), "log_rate_scale .* -90"),
    "energy": (group_value("automagic_walk_energy", torch.tensor(-1.0)), "walk_energy .* -1"),
    "agreement": (group_value("automagic_agreement", torch.tensor(1.5)), "agreement .* 1.5"),
    "peak": (group_value("automagic_peak_agreement", torch.tensor(-2.0)), "peak_agreement .* -2"),
    "norms": (group_value("automagic_norm_history", torch.full((100,), -1.0)), "norm_history .* -1"),
    "a parameter twice": (group_value("params", [0, 0]), "one twice"),
    "no list of parameters": (group_value("params", 3), "params = 3"),
    "no list of groups": (lambda d: d.update(param_groups={0: 1}), "dict as 'param_groups'"),
    "no group": (lambda d: d.update(param_groups=[[]]), "group 0 of the saved state is a list"),
    "states in a list": (lambda d: d.update(state=[]), "list as 'state'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_values_that_no_run_can_have_written_are_refused_and_nothing_changes(case):
    change, message = DAMAGED[case]
    state_dict = load(as_file(make(steps=2, percentile_clipping=90, torque_decay=0.5).state_dict()))
    change(state_dict)
    optimizer = make(steps=1)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(load(as_file(state_dict)))
    assert same(snapshot(optimizer), before)


@pytest.mark.parametrize("content", [None, [], torch.zeros(3), {"model": torch.zeros(3)}])
def test_a_file_of_something_else_is_refused(content):
    optimizer = make(steps=1)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="the saved state"):
        optimizer.load_state_dict(load(as_file(content)))
    assert same(snapshot(optimizer), before)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("end", [0, 1])
def test_states_at_the_limits_of_what_is_accepted_can_be_gone_on_with(profile, bits, end):
    optimizer = make(profile, 2, optim_bits=bits, torque_decay=0.5)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        for key, tensor in state.items():
            allowed = limits(key)
            if tensor.dtype == torch.uint8:
                tensor.fill_(255 * end)
            elif allowed is not None:
                # float32 has no 2³¹ − 1
                tensor.fill_(int(allowed[end]) if tensor.dtype == torch.int32 else allowed[end])
    for name in SEARCH_SCALARS:
        state_dict["param_groups"][0]["automagic_" + name].fill_(limits(name)[end])
    optimizer.load_state_dict(state_dict)
    run(optimizer, range(3, 7))
    assert all(p.isfinite().all() for p in optimizer.param_groups[0]["params"])
    # A state that became NaN would stay so, and its array would stand still for ever.
    assert all(t.isfinite().all() for state in optimizer.state.values() for t in state.values())
    assert all(
        optimizer.param_groups[0]["automagic_" + name].isfinite() for name in {*SEARCH_SCALARS} - {"walk_energy"}
    )


class Bomb:
    """A pickle of it calls a function when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["whole", "state", "field", "key of no interest"])
def test_code_in_a_file_does_not_run(tmp_path, zipped, place):
    trace = tmp_path / "ran"
    state_dict = make(steps=2).state_dict()
    if place == "state":
        state_dict["state"][0]["exp_avg"] = Bomb(trace)
    elif place == "field":
        state_dict["param_groups"][0]["lr"] = Bomb(trace)
    elif place == "key of no interest":
        state_dict["comment"] = Bomb(trace)
    file = tmp_path / "optimizer.pt"
    content = Bomb(trace) if place == "whole" else state_dict
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(file, weights_only=True)
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists()  # so the file was dangerous


def test_an_optimizer_of_other_arrays_is_refused():
    optimizer = AutomagicCameAMP8bit(parameters([(5,), (6, 8)]), **SMALL)
    run(optimizer, range(1, 2))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 \(shape \(6, 8\)\)"):
        optimizer.load_state_dict(load(as_file(make(steps=2).state_dict())))
    assert same(snapshot(optimizer), before)
