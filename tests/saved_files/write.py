"""``python -m tests.saved_files.write``: writes the files of this folder, runs as one version saved them.

The files here were written by version 0.1.0, whose modules stood side by side; pickles name those modules.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

import automagic_optax
from tests.saved_files.runs import FIELDS, gradients, jax_params, torch_model

HERE = Path(__file__).parent


def main() -> None:
    """Three steps of every run, saved in every form; the fourth step's parameters beside them."""
    params = jax_params()
    runs = {
        "whole": automagic_optax.automagic_8bit(1e-3, **FIELDS),
        "moments": automagic_optax.quantize_state(optax.adamw(1e-3), min_8bit_size=256),
    }
    after = {}
    for name, tx in runs.items():
        w, state = params, tx.init(params)
        for number in range(1, 4):
            updates, state = tx.update(gradients(w, number), state, w)
            w = optax.apply_updates(w, updates)
        (HERE / f"{name}.pickle").write_bytes(pickle.dumps((w, state)))
        (HERE / f"{name}.msgpack").write_bytes(flax.serialization.to_bytes(jax.tree.map(np.asarray, (w, state))))
        if name == "whole":
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(HERE.resolve() / "whole.orbax", state)
        updates, state = tx.update(gradients(w, 4), state, w)
        after |= {f"{name}.{key}": value for key, value in optax.apply_updates(w, updates).items()}

    model, optimizer = torch_model()
    for number in range(1, 5):
        if number == 4:
            torch.save((model.state_dict(), optimizer.state_dict()), HERE / "torch.pt")
            (HERE / "torch_optimizer.pickle").write_bytes(pickle.dumps(optimizer))
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=HERE / "torch.dcp", no_dist=True)
        for key, gradient in gradients(jax_params(), number).items():
            getattr(model, key).grad = torch.from_numpy(np.array(gradient))
        optimizer.step()
    after |= {f"torch.{key}": p.detach().numpy() for key, p in model.named_parameters()}
    np.savez(HERE / "after.npz", **{key: np.asarray(jnp.asarray(value)) for key, value in after.items()})


if __name__ == "__main__":
    main()
