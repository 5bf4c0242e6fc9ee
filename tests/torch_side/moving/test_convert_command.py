"""`python -m automagic_core.convert`: checkpoints become neutral files and come back, and nothing else is read."""

import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from automagic_core.convert import convert, main
from automagic_core.moving.state_file import read_groups
from automagic_torch import AutomagicCameAMP8bit

FIELDS = {"force_8bit": True, "min_8bit_size": 256, "warmup_steps": 4, "torque_decay": 0.5, "lr": 1e-3}
SHAPES = {"wte.weight": (30, 12), "lora_A.default.weight": (4, 70), "conv.weight": (16, 8, 3, 3), "conv.bias": (16,)}
NOT_TRAINED = "unused.weight"


def run(steps, order=None, **fields):
    """Two groups, one of them with a parameter that gets no gradient."""
    torch.manual_seed(0)
    params = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    params[NOT_TRAINED] = torch.nn.Parameter(torch.randn(3, 3))
    names = order or list(params)
    first = [(name, params[name]) for name in names if name != "conv.bias"]
    groups = [
        {"params": first, "initial_lr": 2e-3},
        {"params": [("conv.bias", params["conv.bias"])], "factored": "none"},
    ]
    optimizer = AutomagicCameAMP8bit(groups, percentile_clipping=90, **(FIELDS | fields))
    for _ in range(steps):
        for name in SHAPES:
            params[name].grad = torch.randn(SHAPES[name])
        optimizer.step()
    return optimizer


def assert_equal(ours, theirs):
    assert ours["state"].keys() == theirs["state"].keys()
    for key, states in theirs["state"].items():
        assert ours["state"][key].keys() == states.keys()
        for name, value in states.items():
            assert ours["state"][key][name].dtype == value.dtype
            assert torch.equal(ours["state"][key][name], value)
    for a, b in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert a.keys() - {"effective_lr"} == b.keys() - {"effective_lr"}  # an output, which loading forms
        for name, value in b.items():
            if name == "effective_lr":
                continue
            assert torch.equal(a[name], value) if isinstance(value, torch.Tensor) else a[name] == value
            assert type(a[name]) is type(value)


@pytest.mark.parametrize("steps", [0, 3, 6])
@pytest.mark.parametrize("inside", [False, True])
def test_there_and_back_keeps_every_bit(tmp_path, steps, inside):
    saved = run(steps).state_dict()
    source, middle, target = (tmp_path / name for name in ("run.pt", "run.safetensors", "back.pth"))
    torch.save({"optimizer": saved, "epoch": 3} if inside else saved, source)
    assert main([str(source), str(middle)]) == 0
    assert main([str(middle), str(target)]) == 0
    back = torch.load(target, weights_only=True)
    assert_equal(back, saved)
    run(0).load_state_dict(back)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.pth", "run.pt", "run.safetensors"]


def test_marks_come_from_names_or_from_the_caller(tmp_path, capsys):
    source, target = tmp_path / "run.pt", tmp_path / "run.safetensors"
    torch.save(run(2).state_dict(), source)
    assert main([str(source), str(target)]) == 0
    told = capsys.readouterr().out
    assert "group 0: 4 arrays, layout torch, step 2; embeddings: wte.weight; adapters: lora_A.default.weight" in told
    assert [array.embedding for array in read_groups(target)[0].arrays] == [True, False, False, False]
    convert(source, target, embedding=["conv.*"], lora=[])
    arrays = read_groups(target)[0].arrays
    assert [(array.embedding, array.lora) for array in arrays] == [(a.name.startswith("conv."), False) for a in arrays]
    assert main([str(source), str(target), "--embedding", ""]) == 0
    assert "embeddings: none; adapters: lora_A.default.weight" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no parameter is called 'nose'"):
        convert(source, target, embedding=["nose"])


def test_the_layout_changes_on_the_way_and_back(tmp_path):
    saved = run(3, optim_bits=32).state_dict()
    source, middle, target = (tmp_path / name for name in ("run.pt", "run.safetensors", "back.pt"))
    torch.save(saved, source)
    told = convert(source, middle, layout="flax")
    assert len(told) == 2
    shapes = {array.name: array.shape for group in read_groups(middle) for array in group.arrays}
    assert shapes == {
        "wte.weight": (30, 12),
        "lora_A.default.weight": (70, 4),
        "conv.weight": (3, 3, 8, 16),
        "conv.bias": (16,),
        NOT_TRAINED: None,
    }
    convert(middle, target, layout="torch")
    assert_equal(torch.load(target, weights_only=True), saved)
    convert(source, middle, layout="flax", axes={"conv.weight": (2, 3, 0, 1)})
    assert read_groups(middle)[0].arrays[2].shape == (3, 3, 16, 8)


def test_8bit_losses_are_printed_for_every_array(tmp_path, capsys):
    source, target = tmp_path / "run.pt", tmp_path / "run.safetensors"
    torch.save(run(3).state_dict(), source)
    assert main([str(source), str(target), "--layout", "flax"]) == 0
    told = capsys.readouterr().out
    assert "8-bit exp_avg is transposed and rounded again" in told
    # exp_avg and s.  The kernel's long statistic has one block, the adapter's keeps its order.
    assert "8-bit exp_avg_sq_col" not in told
    assert told.count("lora_A.default.weight") - 1 == told.count("conv.weight") == 2


def test_parameters_are_put_into_the_order_of_the_run_that_goes_on(tmp_path):
    other_order = ["conv.weight", NOT_TRAINED, "lora_A.default.weight", "wte.weight", "conv.bias"]
    source, like, target = (tmp_path / name for name in ("run.pt", "like.pt", "ordered.pt"))
    saved = run(3).state_dict()
    torch.save(saved, source)
    torch.save(run(0, other_order).state_dict(), like)
    assert main([str(source), str(target), "--like", str(like)]) == 0
    ordered = torch.load(target, weights_only=True)
    assert ordered["param_groups"][0]["param_names"] == other_order[:4]
    run(0, other_order).load_state_dict(ordered)
    assert torch.equal(ordered["state"][3]["exp_avg"], saved["state"][0]["exp_avg"])
    torch.save(AutomagicCameAMP8bit([torch.nn.Parameter(torch.ones(3))]).state_dict(), like)
    with pytest.raises(ValueError, match="has 1 groups, the run 2"):
        convert(source, target, like=like)


class Evil:
    """Runs code where a pickle is read without care."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


MISFITS = {
    "as weights alone": lambda saved: {"optimizer": saved, "extra": Evil()},
    "the state dict has no 'state'": lambda saved: {"model": {}},
    "holds list": lambda saved: [1],
    "the state of conv.weight lacks age": lambda saved: saved["state"][2].pop("age") and saved,
    "states for unknown parameters": lambda saved: {**saved, "state": {**saved["state"], 99: {}}},
    "list as 'state'": lambda saved: {**saved, "state": [1]},
    "parameter group 0 is a int": lambda saved: {**saved, "param_groups": [1, 2]},
    "parameter group 0 has params = 3": lambda saved: saved["param_groups"][0].update(params=3) or saved,
    "param_names = ['a']; valid: one for each": lambda saved: (
        saved["param_groups"][0].update(param_names=["a"]) or saved
    ),
    "the state of conv.weight is no dict of tensors": lambda saved: saved["state"].update({2: [1]}) or saved,
    "exp_avg of conv.weight has no values": lambda saved: (
        saved["state"][2].update(exp_avg=torch.ones(1, device="meta")) or saved
    ),
    "conv.weight has exp_avg_absmax with values from nan to nan": lambda saved: (
        saved["state"][2]["exp_avg_absmax"].fill_(torch.nan) is not None and saved
    ),
    "conv.weight has exp_avg of shape": lambda saved: (
        saved["state"][2].update(exp_avg=torch.ones(16, 8, 3, 3)) or saved
    ),
}


@pytest.mark.parametrize("message", MISFITS)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, capsys, monkeypatch, message):
    monkeypatch.chdir(tmp_path)
    source, target = tmp_path / "run.bin", tmp_path / "run.safetensors"
    torch.save(MISFITS[message](run(3).state_dict()), source)
    assert main([str(source), str(target)]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run.bin"]


def test_a_flipped_bit_in_a_checkpoint_is_refused_or_has_no_effect(tmp_path, capsys):
    source, damaged, target = (tmp_path / name for name in ("run.pt", "damaged.pt", "run.safetensors"))
    saved = run(3).state_dict()
    torch.save(saved, source)
    whole = source.read_bytes()
    places = random.Random(0).choices(range(8 * len(whole)), k=200)
    refused = 0
    for place in places:
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        damaged.write_bytes(data)
        target.unlink(missing_ok=True)
        if main([str(damaged), str(target)]) == 0:
            # Padding, or what nobody reads.  torch takes an entry with attributes for a folder, without its bytes.
            if not any(entry.external_attr for entry in zipfile.ZipFile(damaged).infolist()):
                assert_equal(torch.load(damaged, weights_only=True), saved)
        else:
            assert not target.exists()
            refused += 1
    assert refused > 100
    assert "does not have the checksum" in capsys.readouterr().err


def test_files_that_are_none(tmp_path, capsys):
    source = tmp_path / "run.pt"
    source.write_bytes(pickle.dumps({"state": {}})[:7])
    target = str(tmp_path / "run.safetensors")
    nested = tmp_path / "nested.safetensors"
    nested.write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5)
    for arguments, message in (
        ([str(source), target], "cannot be read as weights alone"),
        ([str(tmp_path / "nowhere.pt"), target], "nowhere.pt does not exist"),
        ([str(nested), str(source)], "its header cannot be read"),
        ([str(source), "out.h5"], "out.h5 ends in '.h5'; valid: .safetensors, .pt, .pth, .bin"),
        ([str(source), target, "--axes", "conv"], "--axes conv is not valid; valid: NAME=2,3,0,1"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_a_file_that_holds_more_than_an_optimizer_is_not_replaced(tmp_path, capsys):
    source, middle = tmp_path / "run.pt", tmp_path / "run.safetensors"
    state = run(3).state_dict()
    whole = {"model": {"w": torch.ones(3)}, "optimizer": state, "epoch": 2}
    torch.save(whole, source)
    assert main([str(source), str(middle)]) == 0
    for held, named in ((whole, "'model', 'optimizer', 'epoch'"), (torch.nn.Linear(2, 2), "what cannot be read")):
        torch.save(held, source)
        before = source.read_bytes()
        assert main([str(middle), str(source)]) == 2
        assert named in capsys.readouterr().err
        assert source.read_bytes() == before
    for held in (state, {"optimizer": state}):
        torch.save(held, source)
        assert main([str(middle), str(source)]) == 0
        assert torch.load(source, weights_only=True)["param_groups"]


def test_neutral_files_change_their_layout_without_any_framework(tmp_path):
    source, middle, target = (tmp_path / name for name in ("run.pt", "run.safetensors", "flax.safetensors"))
    torch.save(run(3).state_dict(), source)
    convert(source, middle)
    code = """
import sys
import zipfile
for name in ("torch", "jax", "jaxlib", "optax", "flax", "bitsandbytes", "automagic_torch", "automagic_optax"):
    sys.modules[name] = None
from automagic_core.convert import main
assert main([sys.argv[1], sys.argv[2], "--layout", "flax"]) == 0
sys.exit(main([sys.argv[1], sys.argv[2] + ".pt"]))
"""
    command = [sys.executable, "-c", code, str(middle), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3])
    assert done.returncode == 2
    assert "a PyTorch checkpoint needs torch, which is not installed" in done.stderr
    assert read_groups(target)[0].layout == "flax"


def test_nothing_but_a_state_is_replaced(tmp_path):
    state_dict = run(3).state_dict()
    checkpoint, neutral = tmp_path / "x.pt", tmp_path / "x.safetensors"
    torch.save(state_dict, checkpoint)
    convert(checkpoint, neutral)
    convert(checkpoint, neutral)  # itself it may replace
    weights, both = tmp_path / "model.safetensors", tmp_path / "both.pt"
    save_file({"model": torch.ones(3)}, weights)
    torch.save({**state_dict, "model": {"w": torch.ones(3)}}, both)
    for source, target in ((checkpoint, weights), (neutral, both)):
        before = target.read_bytes()
        with pytest.raises(ValueError, match=r"is there and .* lost"):
            convert(source, target)
        assert target.read_bytes() == before


def test_links_stay_links_and_what_is_read_only_stays(tmp_path):
    checkpoint, other, link = tmp_path / "x.pt", tmp_path / "other.safetensors", tmp_path / "latest.safetensors"
    torch.save(run(3).state_dict(), checkpoint)
    convert(checkpoint, other)
    link.symlink_to(other)
    torch.save(run(5).state_dict(), checkpoint)
    convert(checkpoint, link)
    assert link.is_symlink()
    assert read_groups(other)[0].step == 5
    other.chmod(0o444)
    with pytest.raises(PermissionError):
        convert(checkpoint, other)
