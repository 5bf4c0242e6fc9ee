"""Keeps small constant tensors from call to call."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, wraps

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def kept_tensor(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes each of its last 256 tensors once.

    A tensor that was made under a mode, such as that of fake tensors, is of no use outside of it and is not kept.
    """
    kept = lru_cache(maxsize=256)(make)

    @wraps(make)
    def get(*arguments: Hashable) -> Tensor:
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return make(*arguments)
        return kept(*arguments)

    return get
