"""`python -m automagic_core.convert IN OUT` turns a PyTorch checkpoint into the neutral file and back.

docs/algorithm.md, section 11, describes the neutral file.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from automagic_core.arrays.adapter_names import is_lora_name
from automagic_core.arrays.embedding_names import is_embedding_name
from automagic_core.arrays.layout import Layout
from automagic_core.moving.neutral import Axes, NeutralArray, NeutralGroup, check_group, in_layout
from automagic_core.moving.notes import Notes
from automagic_core.moving.state_file import read_groups, refuse_to_replace, write_groups
from automagic_core.moving.torch_checkpoint import SUFFIXES, read_checkpoint, refuse_to_lose, write_checkpoint

LOGGER = "automagic_core"
NEUTRAL = ".safetensors"
_WITHOUT_NAMES = "without names 0 is the first of every group, 1/0 the first of group 1"


def convert(
    source: str | Path,
    target: str | Path,
    *,
    layout: Layout | None = None,
    axes: Axes | None = None,
    embedding: Sequence[str] | None = None,
    lora: Sequence[str] | None = None,
    like: str | Path | None = None,
) -> list[str]:
    """Turns a PyTorch checkpoint of this optimizer into the neutral file, or back, or changes its layout.

    Args:
        source, target: files; ``.safetensors`` is the neutral form, ``.pt``, ``.pth`` and ``.bin`` are PyTorch's.
            `target` is replaced as a whole, or stays as it was if this fails.  A file that holds anything but an
            optimizer state, such as a model, is not replaced.
        layout: ``"torch"`` or ``"flax"`` for all arrays; None keeps their layout.
        axes: with `layout`, permutations of single arrays by name, for arrays that are no dense or convolution kernels.
        embedding, lora: which parameters are embeddings and adapters: names, or positions in their group.  Where no
            parameter has just this name, ``*`` and ``?`` mean what they mean in file names.  ``"1/NAME"`` is the one in
            group 1 alone, a name without it the one in every group; so in `axes`.  A list replaces the marks of a
            neutral file.  A checkpoint has no marks: there None decides by the usual names.
        like: a checkpoint or neutral file of the optimizer that goes on.  Parameters get its order, by their names,
            since PyTorch loads them by position.

    Returns:
        What the state is and what was lost, one sentence each; losses are also logged to ``automagic_core``.

    Raises:
        FileNotFoundError, IsADirectoryError, ValueError: a file is missing, damaged or does not fit; the message says
            where.
        PermissionError: `target` is there and may not be written.
        ImportError: PyTorch or safetensors is needed for a file and missing.
    """
    write = write_groups if _suffix(target) == NEUTRAL else write_checkpoint
    groups = _marked(_read(source), embedding, lora, has_marks=_suffix(source) == NEUTRAL)
    for index, group in enumerate(groups):
        check_group(group, f"group {index} of {source}")
    notes = Notes()
    if layout is not None:
        of_groups = [_of_group(axes or {}, group, index) for index, group in enumerate(groups)]
        groups = [in_layout(group, layout, own, notes)[0] for group, own in zip(groups, of_groups, strict=True)]
    _refuse_unknown(axes, groups, layout)
    if like is not None:
        groups = _ordered(groups, _read(like), str(like))
    (refuse_to_lose if write is write_checkpoint else refuse_to_replace)(target)
    write(target, groups)
    return [*_described(groups), *notes.tell(LOGGER)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m automagic_core.convert",
        description="Converts an optimizer state between a PyTorch checkpoint and the neutral .safetensors form.",
    )
    parser.add_argument("source", metavar="IN", help=f"a file ending in {NEUTRAL} or {', '.join(SUFFIXES)}")
    parser.add_argument("target", metavar="OUT", help="likewise; an optimizer state that is there is replaced")
    parser.add_argument("--layout", choices=("torch", "flax"), help="of the arrays in OUT; by default that of IN")
    parser.add_argument(
        "--axes",
        action="append",
        default=[],
        metavar="NAME=2,3,0,1",
        help=f"order of one parameter's axes in OUT; {_WITHOUT_NAMES}",
    )
    for mark, what in (("embedding", "an embedding"), ("lora", "an adapter")):
        help_text = (
            f"which parameter is {what}; * and ? as in file names, '' for none; by default the usual names; "
            + _WITHOUT_NAMES
        )
        parser.add_argument(f"--{mark}", action="append", metavar="NAME", help=help_text)
    parser.add_argument("--like", metavar="FILE", help="put the parameters into the order of this file, by name")
    options = parser.parse_args(arguments)
    try:
        told = convert(
            options.source,
            options.target,
            layout=options.layout,
            axes=dict(map(_parsed_axes, options.axes)),
            embedding=_given(options.embedding),
            lora=_given(options.lora),
            like=options.like,
        )
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(told))
    return 0


def _read(path: str | Path) -> list[NeutralGroup]:
    return read_groups(path) if _suffix(path) == NEUTRAL else read_checkpoint(path)


def _suffix(path: str | Path) -> str:
    suffix = Path(path).suffix
    if suffix not in (NEUTRAL, *SUFFIXES):
        raise ValueError(f"{path} ends in {suffix!r}; valid: {', '.join((NEUTRAL, *SUFFIXES))}")
    return suffix


def _marked(
    groups: Sequence[NeutralGroup], embedding: Sequence[str] | None, lora: Sequence[str] | None, *, has_marks: bool
) -> list[NeutralGroup]:
    """The groups with the marks that the caller gives, or that follow from names."""
    embeddings, adapters = (
        None if patterns is None else {place for pattern in patterns for place in _called(groups, pattern)}
        for patterns in (embedding, lora)
    )

    def mark(
        index: int,
        array: NeutralArray,
        given: set[tuple[int, str]] | None,
        known: bool,
        by_name: Callable[[list[str]], bool],
    ) -> bool:
        if given is not None:
            return (index, array.name) in given
        return known if has_marks else len(array.shape or ()) == 2 and by_name(array.name.split("."))

    return [
        dataclasses.replace(
            group,
            arrays=tuple(
                dataclasses.replace(
                    array,
                    embedding=mark(index, array, embeddings, array.embedding, is_embedding_name),
                    lora=mark(index, array, adapters, array.lora, is_lora_name),
                )
                for array in group.arrays
            ),
        )
        for index, group in enumerate(groups)
    ]


def _called(groups: Sequence[NeutralGroup], pattern: str) -> set[tuple[int, str]]:
    """The parameters with a name, or whose names fit a pattern: the index of the group and the name of each."""
    places = [(index, array.name) for index, group in enumerate(groups) for array in group.arrays]
    # A name may have brackets, which mean something in a pattern.
    just = {(index, name) for index, name in places if pattern in (name, f"{index}/{name}")}
    found = just or {(index, name) for index, name in places if fnmatchcase(name, pattern)}
    if not found:
        raise ValueError(f"no parameter is called {pattern!r}")
    return found


def _of_group(axes: Axes, group: NeutralGroup, index: int) -> Axes:
    """The axes given for arrays of a group, by their names there; those for this group alone win."""
    given = {array.name: axes.get(f"{index}/{array.name}", axes.get(array.name)) for array in group.arrays}
    return {name: order for name, order in given.items() if order is not None}


def _refuse_unknown(axes: Axes | None, groups: Sequence[NeutralGroup], layout: str | None) -> None:
    names = [(index, array.name) for index, group in enumerate(groups) for array in group.arrays]
    unknown = set(axes or {}) - {called for index, name in names for called in (name, f"{index}/{name}")}
    if unknown:
        raise ValueError(f"axes are given for {', '.join(sorted(unknown))}, which the run does not have")
    if axes and layout is None:
        raise ValueError("axes are given but no layout, so no array is transposed")


def _ordered(groups: Sequence[NeutralGroup], like: Sequence[NeutralGroup], label: str) -> list[NeutralGroup]:
    """The groups with their arrays in the order of `like`."""
    if len(groups) != len(like):
        raise ValueError(f"{label} has {len(like)} groups, the run {len(groups)}")
    ordered = []
    for group, model in zip(groups, like, strict=True):
        arrays = {array.name: array for array in group.arrays}
        names = [array.name for array in model.arrays]
        if not (group.named and model.named):
            raise ValueError(f"parameters cannot be put into the order of {label}: both need names")
        if differing := sorted(arrays.keys() ^ set(names)):
            listed = ", ".join(f"{name} ({'only in ' + label if name in names else 'not there'})" for name in differing)
            raise ValueError(f"{label} has other parameters: {listed}")
        ordered.append(dataclasses.replace(group, arrays=tuple(arrays[name] for name in names)))
    return ordered


def _described(groups: Sequence[NeutralGroup]) -> list[str]:
    told = []
    for index, group in enumerate(groups):
        known: Mapping[str, list[str]] = {
            what: [array.name for array in group.arrays if getattr(array, mark)]
            for what, mark in (("embeddings", "embedding"), ("adapters", "lora"))
        }
        marks = "; ".join(f"{what}: {', '.join(names) or 'none'}" for what, names in known.items())
        told.append(f"group {index}: {len(group.arrays)} arrays, layout {group.layout}, step {group.step}; {marks}")
    return told


def _given(patterns: list[str] | None) -> list[str] | None:
    """The names that are not empty; a single empty one means an empty list."""
    return None if patterns is None else [pattern for pattern in patterns if pattern]


def _parsed_axes(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, order = text.rpartition("=")
    try:
        return name, tuple(int(axis) for axis in order.split(","))
    except ValueError:
        raise ValueError(f"--axes {text} is not valid; valid: NAME=2,3,0,1") from None


if __name__ == "__main__":
    sys.exit(main())
