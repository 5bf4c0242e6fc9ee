"""Finds and marks the adapters and embeddings of a module (docs/algorithm.md, section 1.4).

A mark is an attribute of a parameter, ``p._is_lora_layer`` or ``p._is_embedding``.  ``model.to(...)`` and
``model.half()`` keep it.  ``copy.deepcopy``, ``fully_shard`` and ``torch.utils.swap_tensors`` lose it, and so does
``model.to(...)`` after ``set_swap_module_params_on_conversion(True)``: mark the model that will be trained, after them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from automagic_core import is_lora_name

_TRAINED_ROWS = "trainable_tokens_delta"
"""PEFT's copy of the rows of an embedding that are trained, (tokens, features)."""


def mark_lora(model: nn.Module) -> list[str]:
    """Sets ``p._is_lora_layer = True`` on the low-rank matrices of adapters, on which stage 4 works.

    It knows the names of LoRA, DoRA, AdaLoRA, LoHa and LoKr in PEFT, LoRA of embeddings included, and those of kohya's
    scripts (`automagic_core.LORA_NAMES`).  Only parameters with two axes are marked.  An earlier mark, True or False,
    stays as it is, so other adapters can be marked by hand.

    Returns:
        The names in ``model.named_parameters()`` of all marked parameters with two axes, also of those marked by hand.

    Example:
        >>> model = peft.get_peft_model(model, peft.LoraConfig())
        >>> names = mark_lora(model)
    """
    for name, p in _every_name(model):
        if p.ndim == 2 and is_lora_name(name.split(".")):
            _mark(p, "_is_lora_layer")
    return found_marks(model)["lora"]


def mark_embeddings(model: nn.Module) -> list[str]:
    """Sets ``p._is_embedding = True`` on the weights of every `nn.Embedding` and `nn.EmbeddingBag`.

    This includes subclasses, frozen weights, the copies that PEFT trains for `modules_to_save`, and the rows that it
    trains for `trainable_token_indices`.  An output head that shares an embedding's tensor is that embedding.  An
    adapter of an embedding is no embedding.  An earlier mark, True or False, stays as it is.

    Returns:
        The names in ``model.named_parameters()`` of all marked parameters, also of those marked by hand.
    """
    embeddings = [module.weight for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    rows = [p for name, p in _every_name(model) if _TRAINED_ROWS in name.split(".")]
    for p in (*embeddings, *rows):
        _mark(p, "_is_embedding")
    return found_marks(model)["embedding"]


def found_marks(parameters: nn.Module | Iterable[tuple[str, Tensor]]) -> dict[str, list[str]]:
    """Lists the marked parameters.

    Args:
        parameters: a module, or names and parameters as in ``model.named_parameters()``.

    Returns:
        Names in their order: ``"lora"``, the marked parameters with two axes, since only these can be adapters;
        ``"embedding"``, all that are marked.
    """
    named = list(parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters)
    return {
        "lora": [name for name, p in named if is_lora(p)],
        "embedding": [name for name, p in named if is_embedding(p)],
    }


def _every_name(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    # A shared parameter appears under each of its names, and any of them may say what it is.
    return model.named_parameters(remove_duplicate=False)


def _mark(p: Tensor, mark: str) -> None:
    if not hasattr(p, mark):
        setattr(p, mark, True)


MARKS = ("_is_embedding", "_is_lora_layer")
"""The attributes of parameters that are marks."""


def is_embedding(p: Tensor) -> bool:
    """Whether the parameter was marked with ``p._is_embedding = True``."""
    return bool(getattr(p, "_is_embedding", False))


def is_lora(p: Tensor) -> bool:
    """Whether the parameter was marked with ``p._is_lora_layer = True``; only 2-D arrays can be adapters."""
    return p.ndim == 2 and bool(getattr(p, "_is_lora_layer", False))


def held_marks(groups: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, str, Any]]:
    """Lists every mark: index of the group, index of the parameter in it, name and value."""
    return [
        (i, j, mark, getattr(p, mark))
        for i, group in enumerate(groups)
        for j, p in enumerate(group["params"])
        for mark in MARKS
        if hasattr(p, mark)
    ]


def set_marks(groups: Sequence[Mapping[str, Any]], marks: Sequence[tuple[int, int, str, Any]]) -> None:
    """Sets the marks that `held_marks` returned."""
    for i, j, mark, value in marks:
        setattr(groups[i]["params"][j], mark, value)
