"""The neutral file: every bit comes back, and whatever does not fit is refused by name."""

import dataclasses
import hashlib
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from automagic_core.convert import convert
from automagic_core.moving import whole_file
from automagic_core.moving.sealed_tensors import write_sealed
from automagic_core.moving.state_file import FILE_FORMAT, FILE_VERSION, read_groups, write_groups
from tests.core_side.neutral_samples import assert_same_states, random_group

SHAPES = {"conv": (6, 5, 3, 3), "lora_A": (8, 40), "wte": (30, 7), "scalar": (), "empty": (0, 3)}


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "run.safetensors"
    groups = [random_group(SHAPES, embeddings=("wte",), percentile_clipping=90), random_group({"b": (9,)}, step=50)]
    write_groups(path, groups)
    return path, groups


def test_everything_comes_back(written):
    path, groups = written
    found = read_groups(path)
    for ours, theirs in zip(found, groups, strict=True):
        assert dataclasses.replace(ours, arrays=(), shared={}) == dataclasses.replace(theirs, arrays=(), shared={})
        assert ours.config == theirs.config
        assert_same_states(ours.shared, theirs.shared)
        for a, b in zip(ours.arrays, theirs.arrays, strict=True):
            assert dataclasses.replace(a, states={}) == dataclasses.replace(b, states={})
            assert_same_states(a.states, b.states)
    assert [array.name for array in found[0].arrays if array.embedding or array.lora] == ["lora_A", "wte"]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(0, 5).flatmap(lambda n: st.tuples(*[st.integers(0, 6)] * n)),
    st.sampled_from(["none", "second_moment", "all"]),
    st.sampled_from(["torch", "flax"]),
    st.sampled_from([4, 12]),
)
def test_every_form_of_state_comes_back(tmp_path_factory, shape, factored, layout, step):
    path = tmp_path_factory.getbasetemp() / "forms.safetensors"
    group = random_group({"a": shape}, layout, step, factored=factored, min_8bit_size=20)
    write_groups(path, [group])
    assert_same_states(read_groups(path)[0].arrays[0].states, group.arrays[0].states)


def test_every_flipped_byte_is_noticed(written):
    path, _ = written
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    # The length, the header's beginning and end with its padding, and samples of the rest and of the data.
    places = [*range(8), *range(8, 60), *range(header - 12, header), len(whole) - 1]
    places += [*rng.integers(60, header, 60), *rng.integers(header, len(whole), 40)]
    for place in places:
        for value in {whole[place] ^ 1, whole[place] ^ 0x80, ord("\n")} - {whole[place]}:
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            with pytest.raises(ValueError, match=r"run\.safetensors"):
                read_groups(path)


@pytest.mark.parametrize("length", [0, 5, 8, 200, -1, -500])
def test_a_file_that_is_cut_short_is_refused(written, length):
    path, _ = written
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="cut short"):
        read_groups(path)


def test_a_file_with_more_at_its_end_is_refused(written):
    path, _ = written
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        read_groups(path)


def _rewritten(path, change):
    """The file with other contents under a checksum that is right."""
    import safetensors.numpy

    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    tensors, description = safetensors.numpy.load(data), json.loads(metadata["description"])
    change(tensors, description["groups"][0])
    write_sealed(path, tensors, description, file_format=FILE_FORMAT, version=FILE_VERSION)


MISFITS = {
    "the file has no tensor '0/conv/exp_avg_res_row'": lambda t, g: t.pop("0/conv/exp_avg_res_row"),
    "tensors that its description does not name: 0/conv/nose": lambda t, g: t.update({"0/conv/nose": np.zeros(1)}),
    r"conv has exp_avg of shape \(6, 5, 3, 3\) and int8; expected": lambda t, g: t.update(
        {"0/conv/exp_avg": t["0/conv/exp_avg"].view(np.int8)}
    ),
    r"conv has lr_mask of shape \(6, 1, 1\) and float32; expected \(6, 1, 1, 1\)": lambda t, g: t.update(
        {"0/conv/lr_mask": t["0/conv/lr_mask"][0:6, 0]}
    ),
    r"conv has exp_avg of shape \(6, 5, 3, 3\) and uint8; expected \(5, 6, 3, 3\)": lambda t, g: g["parameters"][
        0
    ].update(shape=[5, 6, 3, 3]),
    "the state of wte lacks age": lambda t, g: (t.pop("0/wte/age"), g["parameters"][2]["states"].remove("age")),
    "group 0 lacks norm_position": lambda t, g: (t.pop("0/norm_position"), g["shared"].remove("norm_position")),
    r"group 0 does not fit: layout \(missing\), nose \(unknown\)": lambda t, g: g.update(nose=g.pop("layout")),
    "group 0: layout = 'keras'": lambda t, g: g.update(layout="keras"),
    "group 0: block_size = 100": lambda t, g: g["fields"].update(block_size=100),
    "group 0: unknown field nose": lambda t, g: g["fields"].update(nose=1),
    "group 0 lacks betas": lambda t, g: g["fields"].pop("betas"),
    "group 0 has step = 1.5": lambda t, g: g.update(step=1.5),
    "lora_A has lora = 1": lambda t, g: g["parameters"][1].update(lora=1),
    r"lora_A has the shape \[8, -1\]": lambda t, g: g["parameters"][1].update(shape=[8, -1]),
    "description that does not fit": lambda t, g: g.update(parameters=3),
}


@pytest.mark.parametrize("message", MISFITS)
def test_contents_that_do_not_fit_are_refused_by_name(written, message):
    path, _ = written
    _rewritten(path, MISFITS[message])
    with pytest.raises(ValueError, match=message):
        read_groups(path)


def test_another_format_and_another_version_are_refused(written, tmp_path):
    path, _ = written
    weights = tmp_path / "weights.safetensors"
    import safetensors.numpy

    safetensors.numpy.save_file({"w": np.zeros(3)}, weights)
    with pytest.raises(ValueError, match="has the format None; valid: 'automagic-cameamp-state'"):
        read_groups(weights)
    write_sealed(path, {}, {"groups": []}, file_format=FILE_FORMAT, version="2")
    with pytest.raises(ValueError, match="has version '2' of its format; valid: '1'"):
        read_groups(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_groups(tmp_path / "nowhere.safetensors")


def test_a_folder_in_place_of_a_file(written, tmp_path):
    path, groups = written
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder.safetensors is a folder"):
        read_groups(folder)
    with pytest.raises(IsADirectoryError, match=r"folder.safetensors'$"):
        convert(path, folder)
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere'$"):
        write_groups(tmp_path / "nowhere" / "run.safetensors", groups)


def test_a_name_means_every_group_with_its_index_one_and_brackets_are_names_first(tmp_path):
    source, target = tmp_path / "run.safetensors", tmp_path / "marked.safetensors"
    first, second = {"0": (20, 4), "a[0].w": (8, 5), "a0.w": (8, 5)}, {"0": (20, 4)}
    write_groups(source, [random_group(first), random_group(second)])

    def marked(*names):
        convert(source, target, embedding=names, lora=[])
        return [[array.name for array in group.arrays if array.embedding] for group in read_groups(target)]

    assert marked("0") == [["0"], ["0"]]
    assert marked("1/0", "a[0].w") == [["a[0].w"], ["0"]]
    assert marked("a[0]*") == [["a0.w"], []]
    with pytest.raises(ValueError, match="no parameter is called '2/0'"):
        marked("2/0")
    convert(source, target, layout="flax", axes={"0": (1, 0), "1/0": (0, 1)}, embedding=[], lora=[])
    assert [group.arrays[0].shape for group in read_groups(target)] == [(4, 20), (20, 4)]
    with pytest.raises(ValueError, match="axes are given for 2/0, which"):
        convert(source, target, layout="flax", axes={"2/0": (1, 0)})


def test_the_checksum_can_be_computed_by_hand(written):
    data = written[0].read_bytes()
    length = int.from_bytes(data[:8], "little")
    digest = json.loads(data[8 : 8 + length])["__metadata__"]["sha256"].encode()
    assert data.count(digest) == 1
    assert hashlib.sha256(data.replace(digest, b"0" * 64)).hexdigest().encode() == digest


def test_a_write_that_fails_leaves_the_old_file(written, monkeypatch):
    path, groups = written
    before = path.read_bytes()

    def no_space(source, target):
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(whole_file.os, "replace", no_space)
        with pytest.raises(OSError, match="no space"):
            write_groups(path, groups[:1])
    other = dataclasses.replace(groups[0], others={"hook": object()})
    with pytest.raises(ValueError, match="group 0 has hook = <object"):
        write_groups(path, [other])
    for value in (np.inf, [{"a": np.nan}]):
        with pytest.raises(ValueError, match=r"group 0 has best = .*only finite numbers"):
            write_groups(path, [dataclasses.replace(groups[0], others={"best": value})])
    for lr in (np.nan, -np.inf):
        without = dataclasses.replace(groups[0], fields={**groups[0].fields, "lr": lr})
        with pytest.raises(ValueError, match=r"group 0 has lr = .*; valid: a finite number"):
            write_groups(path, [without])
    states = dict(groups[1].arrays[0].states)
    states.pop("age")
    lacking = dataclasses.replace(groups[1].arrays[0], states=states)
    with pytest.raises(ValueError, match="the state of b lacks age"):
        write_groups(path, [dataclasses.replace(groups[1], arrays=(lacking,))])
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_without_safetensors_the_error_says_how_to_get_it(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"needs safetensors.*'automagic-cameamp\[files\]' brings it"):
        read_groups(written[0])
