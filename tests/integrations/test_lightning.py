"""`LightningModule`: a schedule, accumulated, clipped, bfloat16; resumed from its checkpoint; a callback; unfreezing"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from automagic_torch import mark_lora
from automagic_torch.arrays.marks import is_lora
from tests.integrations.torch_runs import network, optimizer_for
from tests.torch_side.torch_helpers import same, snapshot

lightning = pytest.importorskip("lightning")
peft = pytest.importorskip("peft")
from automagic_torch.integrations import LightningRateCallback  # noqa: E402

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
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False} | options,
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


class Adapted(Module):
    """A network with LoRA, whose adapters nobody marked."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.net = peft.get_peft_model(self.net, peft.LoraConfig(r=4, target_modules=["0", "3"]))
        for adapter in (p for p in self.net.parameters() if p.requires_grad):
            torch.nn.init.normal_(adapter, generator=torch.Generator().manual_seed(seed))


def test_the_callback_marks_logs_and_resumes(tmp_path: Path) -> None:
    class Recorder(lightning.Callback):
        def __init__(self) -> None:
            self.found: list[float] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.found += trainer.optimizers[0].get_learning_rates()

    def begin(name: str, marked: bool, checkpoint: Path | None = None) -> tuple[Any, list[float]]:
        module, recorder = Adapted(0 if checkpoint is None else 1), Recorder()
        keep_all = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path / name, "{epoch}", save_top_k=-1)
        logger = lightning.pytorch.loggers.CSVLogger(tmp_path, name)
        callbacks = [recorder, keep_all] if marked else [LightningRateCallback(), recorder, keep_all]
        if marked:
            mark_lora(module)
        trainer = trainer_of(tmp_path, *callbacks, max_epochs=EPOCHS, logger=logger, log_every_n_steps=1)
        trainer.fit(module, data(), ckpt_path=checkpoint, weights_only=True)
        if not marked:
            with open(Path(logger.log_dir) / "metrics.csv") as file:
                logged = [float(row["effective_lr"]) for row in csv.DictReader(file)]
            assert logged == pytest.approx(recorder.found)  # a logger writes fewer digits
        return trainer.optimizers[0], recorder.found

    by_hand, _ = begin("by hand", marked=True)
    undisturbed, found = begin("undisturbed", marked=False)
    assert same(snapshot(undisturbed), snapshot(by_hand)), "marked before the first step"
    assert any(is_lora(p) for group in undisturbed.param_groups for p in group["params"])
    resumed, again = begin("resumed", False, tmp_path / "undisturbed" / "epoch=0.ckpt")
    assert same(snapshot(resumed), snapshot(undisturbed))
    assert again == found[-len(again) :]
    assert len(again) == 3 * (EPOCHS - 1)


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
