"""Finding the LoRA matrices and the embeddings of a module, and marking them for the optimizer.

A mark is an attribute of a parameter, ``p._is_lora_layer`` or ``p._is_embedding``.  It stays through
``model.to(...)`` and ``model.half()`` but not through ``copy.deepcopy``: mark the model that will be trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from automagic_core import is_lora_name

_TRAINED_ROWS = "trainable_tokens_delta"
"""PEFT's copy of the rows of an embedding that are trained, (tokens, features): laid out as the embedding is."""


def mark_lora(model: nn.Module) -> list[str]:
    """Sets ``p._is_lora_layer = True`` on the low-rank matrices of adapters, which stage 4 (section 4) works on.

    Known by name are LoRA, DoRA, AdaLoRA, LoHa and LoKr as PEFT makes them, LoRA of embeddings included, and the names
    of kohya's scripts (`automagic_core.LORA_NAMES`).  Only parameters of two axes are marked.  A mark that is already
    there, True or False, is left as it is; so other adapters are marked by hand.

    Returns:
        The names of all marked parameters of two axes, as ``model.named_parameters()`` has them, those marked by hand
        included.  None found is no error.

    Example:
        >>> model = peft.get_peft_model(model, peft.LoraConfig())
        >>> names = mark_lora(model)
    """
    for name, p in _every_name(model):
        if p.ndim == 2 and is_lora_name(name.split(".")):
            _mark(p, "_is_lora_layer")
    return found_marks(model)["lora"]


def mark_embeddings(model: nn.Module) -> list[str]:
    """Sets ``p._is_embedding = True`` on the weights of every `nn.Embedding` and `nn.EmbeddingBag` (section 1).

    Those of subclasses count, frozen ones, the copies that PEFT trains for `modules_to_save`, and the rows that it
    trains for `trainable_token_indices`.  An output head that shares an embedding's tensor is that embedding.
    An adapter of an embedding is none: PEFT keeps it as (rank, num) and (features, rank), two dense kernels in
    PyTorch's layout.  A mark that is already there, True or False, is left as it is.

    Returns:
        The names of all marked parameters, as ``model.named_parameters()`` has them, those marked by hand included.
    """
    tables = [module.weight for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    rows = [p for name, p in _every_name(model) if _TRAINED_ROWS in name.split(".")]
    for p in (*tables, *rows):
        _mark(p, "_is_embedding")
    return found_marks(model)["embedding"]


def found_marks(parameters: nn.Module | Iterable[tuple[str, Tensor]]) -> dict[str, list[str]]:
    """The marks that are set, for a report.

    Args:
        parameters: a module, or names and parameters as ``model.named_parameters()`` gives them.

    Returns:
        Names in their order, a parameter under its first name only: ``"lora"``, the marked parameters of two axes,
        since others are not adapters to the optimizer; ``"embedding"``, all that are marked.
    """
    named = list(parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters)
    return {
        "lora": [name for name, p in named if is_lora(p)],
        "embedding": [name for name, p in named if is_embedding(p)],
    }


def _every_name(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    # A shared parameter comes once under each name: any of them may say what it is.
    return model.named_parameters(remove_duplicate=False)


def _mark(p: Tensor, mark: str) -> None:
    if not hasattr(p, mark):
        setattr(p, mark, True)


MARKS = ("_is_embedding", "_is_lora_layer")
"""Attributes of parameters that say what they are."""


def is_embedding(p: Tensor) -> bool:
    """Whether the parameter was marked with ``p._is_embedding = True``."""
    return bool(getattr(p, "_is_embedding", False))


def is_lora(p: Tensor) -> bool:
    """Whether the parameter was marked with ``p._is_lora_layer = True``; only 2-D arrays are adapters."""
    return p.ndim == 2 and bool(getattr(p, "_is_lora_layer", False))


def held_marks(groups: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, str, Any]]:
    """Every mark: index of the group, index of the parameter in it, name and value."""
    return [
        (i, j, mark, getattr(p, mark))
        for i, group in enumerate(groups)
        for j, p in enumerate(group["params"])
        for mark in MARKS
        if hasattr(p, mark)
    ]


def set_marks(groups: Sequence[Mapping[str, Any]], marks: Sequence[tuple[int, int, str, Any]]) -> None:
    """Sets what `held_marks` gave."""
    for i, j, mark, value in marks:
        setattr(groups[i]["params"][j], mark, value)
