"""`LightningModule`: a scheduler, accumulation, clipping, bfloat16; resumed from its checkpoint; a backbone unfrozen"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.torch_runs import network, optimizer_for
from tests.torch_side.torch_helpers import same, snapshot

lightning = pytest.importorskip("lightning")

DISTRIBUTIONS = ("lightning",)
EPOCHS = 3


class Module(lightning.LightningModule):
    def __init__(self, seed: int, **fields: Any) -> None:
        super().__init__()
        self.net = network(seed)
        self.fields = fields

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss = (self.net(batch) - batch.flip(-1)).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_for(self.net.named_parameters(), **self.fields)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def trainer_of(folder: Path, *callbacks: Any, **options: Any) -> Any:
    return lightning.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def data() -> torch.utils.data.DataLoader:
    """Three batches."""
    return torch.utils.data.DataLoader(torch.randn(24, 16, generator=torch.Generator().manual_seed(0)), batch_size=8)


def fit(folder: Path, options: Any, checkpoint: Path | None = None, seed: int = 0, **fields: Any) -> Any:
    keep_all = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = trainer_of(folder, keep_all, max_epochs=EPOCHS, **options)
    # Our states are tensors and plain numbers, so the file needs no trust.
    trainer.fit(Module(seed, **fields), data(), ckpt_path=checkpoint, weights_only=True)
    return trainer.optimizers[0]


WAYS = {
    "plain": {},
    "accumulation and clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    "bfloat16 autocast": {"precision": "bf16-mixed"},
}


pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own advice: workers, the last batch


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_fit_is_the_undisturbed_one(tmp_path: Path, way: str) -> None:
    undisturbed = fit(tmp_path, WAYS[way])
    assert undisturbed.state_dict()["state"][0]["exp_avg"].dtype == torch.uint8
    for epoch in (0, 1):  # in the mask's warm-up and behind it
        saved = tmp_path / f"epoch={epoch}.ckpt"
        resumed = fit(tmp_path / "again", WAYS[way], saved, seed=1, lr=2e-3, warmup_steps=1)
        assert same(snapshot(resumed), snapshot(undisturbed))


def test_an_unfrozen_backbone_is_a_new_group(tmp_path: Path) -> None:
    """`BackboneFinetuning` adds the backbone's parameters in mid-run."""

    class Finetuned(Module):
        def __init__(self) -> None:
            super().__init__(0)
            self.backbone = self.net[0]

        def configure_optimizers(self) -> Any:
            return optimizer_for([p for p in self.net.parameters() if p.requires_grad])

    module = Finetuned()
    before = module.backbone.weight.detach().clone()
    unfreeze = lightning.pytorch.callbacks.BackboneFinetuning(1, lambda epoch: 1.0, backbone_initial_lr=1e-3)
    trainer = trainer_of(tmp_path, unfreeze, max_epochs=2, enable_checkpointing=False)
    trainer.fit(module, data())
    _, added = trainer.optimizers[0].param_groups
    assert any(p is module.backbone.weight for p in added["params"])
    assert not torch.equal(module.backbone.weight, before)
