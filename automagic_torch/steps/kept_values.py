"""Keeps what compiled loops share in memory, so that no loop computes it again for each of its elements."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default}
_KEPT = aten.as_strided.default
"""Inductor writes into memory what it is told to look at by strides."""
_KEPT_ANYWAY = {aten.sum.dim_IntList, aten.sum.default, aten.amax.default, _KEPT}
_FREE = {aten.full.default, torch.ops.prims.iota.default, aten.scalar_tensor.default}


class KeepSharedValues(CustomGraphPass):
    """Keeps values of whole arrays, rows, columns and blocks that loops over elements read.

    Inductor writes an expression into each loop that reads it, and a C++ compiler cannot take it out of the loop, since
    the loop's stores may change what it reads.  `expm1` of an array's age is then computed for each vector of elements.
    """

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if any(_elements(user) > _elements(node) > 0 for user in node.users):
                _keep(graph, node)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _elements(node: Node) -> int:
    """How many elements a node has; 0 if it is no tensor."""
    value = node.meta.get("val")
    return value.numel() if isinstance(value, torch.Tensor) else 0


def _keep(graph: Graph, node: Node) -> None:
    """Replaces a node by itself in memory."""
    while node.target in _VIEWS:
        (node,) = node.all_input_nodes[:1]
    value = node.meta["val"]
    if node.op != "call_function" or node.target in _KEPT_ANYWAY | _FREE or not value.is_contiguous():
        return
    if any(user.target == _KEPT for user in node.users):
        return
    with graph.inserting_after(node):
        kept = graph.call_function(_KEPT, (node, list(value.shape), list(value.stride())))
    kept.meta["val"] = value
    node.replace_all_uses_with(kept, lambda user: user is not kept)
