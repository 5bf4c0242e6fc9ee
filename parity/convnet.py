"""A small convolutional classifier with an adapter, as a torch module and as Flax functions of a parameter tree.

Kernels lie as each framework has them: (out, in, *spatial) and (out, in) in torch, (*spatial, in, out) and (in, out) in
Flax.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from automagic_core import axes_between

CHANNELS, WIDTH, RANK, CLASSES, BATCH = (16, 32), 64, 8, 10, 64
NAMES = {
    "conv1.kernel": "conv1.weight",
    "conv1.bias": "conv1.bias",
    "conv2.kernel": "conv2.weight",
    "conv2.bias": "conv2.bias",
    "dense.bias": "dense.bias",
    "dense.kernel": "dense.weight",
    "dense.lora_a": "lora_A.default.weight",
    "dense.lora_b": "lora_B.default.weight",
    "head.bias": "head.bias",
    "head.kernel": "head.weight",
}
"""Flax path and torch name of every parameter."""


class TorchConvNet(nn.Module):
    """Logits of ten digits from images of 8 × 8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, CHANNELS[0], 3, padding=1)
        self.conv2 = nn.Conv2d(CHANNELS[0], CHANNELS[1], 3, padding=1)
        self.dense = nn.Linear(4 * CHANNELS[1], WIDTH)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4 * CHANNELS[1], RANK, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(RANK, WIDTH, bias=False)})
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 8, 8) to (batch, 10)."""
        gelu = nn.functional.gelu
        x = gelu(self.conv1(images[:, None]), approximate="tanh")
        x = gelu(self.conv2(x), approximate="tanh")
        x = x.view(len(x), CHANNELS[1], 2, 4, 2, 4).mean(dim=(3, 5))
        # Channels last, as Flax has them: the rows of the dense kernel mean the same.
        x = x.permute(0, 2, 3, 1).flatten(1)
        x = self.dense(x) + self.lora_B["default"](self.lora_A["default"](x))
        return self.head(gelu(x, approximate="tanh"))

    def loss(self, images: np.ndarray, labels: np.ndarray) -> torch.Tensor:
        """Mean cross-entropy in nats."""
        return nn.functional.cross_entropy(self(torch.from_numpy(images)), torch.from_numpy(labels))


def torch_convnet(seed: int) -> TorchConvNet:
    """The torch model; its weights depend on the seed alone."""
    torch.manual_seed(seed)
    return TorchConvNet()


def flax_parameters(model: TorchConvNet) -> dict[str, dict[str, jax.Array]]:
    """The torch model's weights as a tree in Flax's layout."""
    theirs = dict(model.named_parameters())
    tree: dict[str, dict[str, jax.Array]] = {}
    for path, name in NAMES.items():
        module, leaf = path.split(".")
        array = theirs[name].detach().numpy()
        tree.setdefault(module, {})[leaf] = jnp.array(array.transpose(axes_between(array.ndim, "torch", "flax")))
    return tree


def torch_weights(params: Any) -> dict[str, torch.Tensor]:
    """The other way round: for ``model.load_state_dict``."""
    found = {}
    for path, name in NAMES.items():
        module, leaf = path.split(".")
        array = np.asarray(params[module][leaf])
        found[name] = torch.tensor(np.ascontiguousarray(array.transpose(axes_between(array.ndim, "flax", "torch"))))
    return found


def flax_loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """`TorchConvNet.loss` on Flax's parameters."""

    def conv(x: jax.Array, layer: Any) -> jax.Array:
        kernel = layer["kernel"]
        return (
            jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            + layer["bias"]
        )

    x = jax.nn.gelu(conv(images[..., None], params["conv1"]))
    x = jax.nn.gelu(conv(x, params["conv2"]))
    x = x.reshape(len(x), 2, 4, 2, 4, CHANNELS[1]).mean(axis=(2, 4)).reshape(len(x), -1)
    dense = params["dense"]
    x = x @ dense["kernel"] + dense["bias"] + x @ dense["lora_a"] @ dense["lora_b"]
    logits = jax.nn.gelu(x) @ params["head"]["kernel"] + params["head"]["bias"]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1))


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images.reshape(-1, 8, 8) / 8 - 1).astype(np.float32), labels.astype(np.int64)


def digit_batches(seed: int, steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random handwritten digits: float32 (batch, 8, 8) in [−1, 1] and their labels for every step."""
    images, labels = _digits()
    chosen = np.random.default_rng(seed).integers(0, len(images), size=(steps, BATCH))
    return [(images[rows], labels[rows]) for rows in chosen]
