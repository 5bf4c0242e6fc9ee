"""Every block of docs/recipes.md and docs/maintainers is read as its trainer reads it, and makes an optimizer."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import enum
import importlib
import inspect
import json
import shlex
import sys
import textwrap
import tomllib
from types import ModuleType, SimpleNamespace
from typing import Any

import jax.numpy as jnp
import optax
import pytest
import torch

from automagic_torch import AutomagicCameAMP8bit
from tests.whole.doc_blocks import DOCS, blocks, run

PAGES = ["recipes.md", *(f"maintainers/{path.name}" for path in sorted((DOCS / "maintainers").glob("*.md")))]
SEARCHING = {"profile": "balanced", "max_lr": 1.0, "warmup_steps": 400}

pytestmark = pytest.mark.compiled_quickly


BLOCKS = {(page, place): text for page in PAGES for place, text in blocks(page).items()}


def block(page: str, place: str) -> str:
    return BLOCKS[page, place]


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(8, 16))]


def assert_searches(optimizer: Any, lr: float = 1e-5, **fields: Any) -> None:
    assert isinstance(optimizer, AutomagicCameAMP8bit)
    config = optimizer.config
    assert {name: getattr(config, name) for name in SEARCHING} == SEARCHING
    assert {name: getattr(config, name) for name in fields} == fields
    assert config.lr == lr
    assert config.searches
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


def first_rate(tx: optax.GradientTransformation) -> float:
    """How far the first step goes."""
    params = {"kernel": jnp.ones((8, 16))}
    updates, _ = tx.update(params, tx.init(params), params)
    return float(jnp.abs(updates["kernel"]).mean())


def of_kohya(optimizer_type: str, optimizer_args: list[str], learning_rate: float) -> Any:
    """What its `get_optimizer` does with a dotted name."""
    fields = {}
    for argument in optimizer_args:
        key, value = argument.split("=")
        fields[key] = ast.literal_eval(value)
    module, _, name = optimizer_type.rpartition(".")
    return getattr(importlib.import_module(module), name)(parameters(), lr=learning_rate, **fields)


def test_kohya() -> None:
    parser = argparse.ArgumentParser()
    for name, kind in (("optimizer_type", str), ("learning_rate", float), ("lr_scheduler", str)):
        parser.add_argument(f"--{name}", type=kind)
    for name in ("lr_warmup_steps", "max_train_steps"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--optimizer_args", nargs="*")
    line = block("recipes.md", "kohya sd-scripts, bash").replace("\\\n", " ")
    given = vars(parser.parse_args(shlex.split(line)))
    assert given["max_train_steps"] * 0.4 == SEARCHING["warmup_steps"]
    of_file = tomllib.loads(block("recipes.md", "kohya sd-scripts, toml"))
    assert of_file.items() <= given.items()
    used = ("optimizer_type", "optimizer_args", "learning_rate")
    assert_searches(of_kohya(**{name: of_file[name] for name in used}))

    branch = block("maintainers/kohya.md", "kohya sd-scripts, python")
    short = run(
        branch,
        optimizer_type="automagiccameamp8bit",
        logger=SimpleNamespace(info=lambda text: None),
        trainable_params=parameters(),
        lr=1e-5,
        optimizer_kwargs=dict(SEARCHING),
    )
    assert_searches(short["optimizer"])


def test_onetrainer() -> None:
    page, place = "maintainers/onetrainer.md", "OneTrainer, python"
    body = textwrap.indent(block(page, place), "    ")
    kinds = run(f"class Optimizer(enum.Enum):\n{body}", enum=enum)["Optimizer"]
    shown, defaults = (
        run(f"table = {{{block(page, f'{place} {number}')}}}", Optimizer=kinds)["table"] for number in (2, 3)
    )
    (kind,) = kinds
    assert shown.keys() == defaults.keys() == {kind}
    config = json.loads(block("recipes.md", "OneTrainer, json"))
    chosen = config["optimizer"]
    assert chosen.pop("optimizer") == kind.value
    assert chosen.keys() <= defaults[kind].keys()
    case = run(
        block(page, f"{place} 4"),
        kind=kind,
        Optimizer=kinds,
        parameters=[{"params": parameters(), "name": "unet", "lr": 1e-5, "initial_lr": 1e-5}],
        config=SimpleNamespace(learning_rate=config["learning_rate"]),
        optimizer_config=SimpleNamespace(**defaults[kind] | chosen | {"min_8bit_size": 2048}),
    )
    assert_searches(case["optimizer"], weight_decay=5e-4, min_8bit_size=2048, betas=(0.9, 0.99, 0.999))
    assert case["optimizer"].param_groups[0]["name"] == "unet"


def test_ai_toolkit() -> None:
    yaml = pytest.importorskip("yaml")
    train = yaml.safe_load(block("recipes.md", "ai-toolkit, yaml"))["train"]
    assert train["steps"] * 0.4 == SEARCHING["warmup_steps"]
    assert not train["optimizer"].endswith("8bit"), "a name that goes to bitsandbytes"
    branch = run(
        block("recipes.md", "ai-toolkit, python"),
        lower_type=train["optimizer"].lower(),
        params=parameters(),
        learning_rate=train["lr"],
        optimizer_params=train["optimizer_params"],
    )
    assert_searches(branch["optimizer"])


def test_diffusers() -> None:
    args = SimpleNamespace(learning_rate=1e-5, adam_weight_decay=1e-4)
    made = run(block("recipes.md", "diffusers, python"), params_to_optimize=parameters(), args=args)
    assert_searches(made["optimizer"], weight_decay=1e-4)


def test_transformers() -> None:
    handlers = pytest.importorskip("transformers.trainer_optimizer")
    from transformers.training_args import OptimizerNames

    trainer = run(
        block("recipes.md", "transformers, PEFT, python"),
        Trainer=lambda *positional, **keywords: SimpleNamespace(**keywords),
        **dict.fromkeys(("model", "args", "train_dataset")),
    )["trainer"]
    kind, fields = trainer.optimizer_cls_and_kwargs
    assert_searches(kind(parameters(), **fields))

    page, place = "maintainers/transformers.md", "transformers, python"
    names = run(block(page, place))
    name = names["AUTOMAGIC_CAMEAMP_8BIT"]
    assert name not in {known.value for known in OptimizerNames}
    table: dict[str, Any] = {}
    run(block(page, f"{place} 2"), OptimizerNames=SimpleNamespace(**names), _OPTIMIZER_HANDLERS=table)
    assert isinstance(handlers._OPTIMIZER_HANDLERS, dict)
    written = handlers._parse_optim_args("profile='balanced', max_lr=1.0, warmup_steps=400")
    known = {field.name for field in dataclasses.fields(handlers.OptimizerContext)}
    context = SimpleNamespace(optim_args=written, optimizer_kwargs={"lr": 1e-5})
    assert vars(context).keys() <= known
    kind, fields = table[name](context)
    assert_searches(kind([{"params": parameters(), "weight_decay": 0.0}], **fields))


def test_lightning_cli() -> None:
    """LightningCLI gives a class the arguments that its signature names."""
    kind = run(block("recipes.md", "LightningCLI, python"), AutomagicCameAMP8bit=AutomagicCameAMP8bit)["Automagic"]
    assert set(inspect.signature(kind).parameters) == {"params", "lr", *SEARCHING}
    assert_searches(kind(parameters(), warmup_steps=400))


def test_tunix() -> None:
    made = run(
        block("recipes.md", "Tunix, python"),
        peft_trainer=SimpleNamespace(PeftTrainer=lambda model, tx, config: tx),
        model=None,
        config=None,
    )
    assert made["trainer"] is made["tx"]
    state = made["tx"].init({"kernel": jnp.ones((8, 16))})
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(1e-5)
    assert first_rate(made["tx"]) == pytest.approx(1e-5, rel=0.5)


def test_maxtext() -> None:
    page, place = "maintainers/maxtext.md", "MaxText, python"
    words = dict(word.split("=") for word in shlex.split(block("recipes.md", "MaxText, bash")))
    name = run(block(page, place))["AUTOMAGIC_8BIT"]
    assert words["opt_type"] == name
    config = SimpleNamespace(opt_type=name, adam_weight_decay=0.1, adam_b1=0.9, adam_b2=0.95)
    made = run(
        block(page, f"{place} 2"),
        config=config,
        learning_rate_schedule=optax.constant_schedule(float(words["learning_rate"])),
        get_adamw_mask=lambda config: None,
    )
    assert first_rate(made["base_opt"]) == pytest.approx(float(words["learning_rate"]), rel=0.6)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A module, and the packages above it, with these members."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:length]), ModuleType(".".join(parts[:length])))
    vars(sys.modules[name]).update(members)


def test_easydel(monkeypatch: pytest.MonkeyPatch) -> None:
    builders: dict[str, Any] = {}

    def register_optimizer(name: str) -> Any:
        return lambda kind: builders.setdefault(name, kind)

    @dataclasses.dataclass
    class OptimizerBuilder:
        config: Any

    stand_in(
        monkeypatch,
        "eformer.optimizers._base",
        register_optimizer=register_optimizer,
        OptimizerBuilder=OptimizerBuilder,
    )
    monkeypatch.setitem(sys.modules, "block", ModuleType("block"))
    run(block("maintainers/easydel.md", "EasyDeL, python"), __name__="block")
    arguments = run(block("recipes.md", "EasyDeL, python"), TrainingArguments=SimpleNamespace)["arguments"]
    builder = builders[arguments.optimizer]
    (config_type,) = (field.type for field in dataclasses.fields(builder) if field.name == "config")
    assert isinstance(config_type, type), "the registry makes it"
    schedule = optax.constant_schedule(arguments.learning_rate)
    tx = builder(config=config_type(**arguments.extra_optimizer_kwargs)).build(schedule)
    assert first_rate(tx) == pytest.approx(arguments.learning_rate, rel=0.6)
    searching = builder(config=config_type(search_steps=400, search_gain=0.3)).build(schedule)
    assert first_rate(searching) == pytest.approx(1e-5, rel=0.6)


def test_levanter(monkeypatch: pytest.MonkeyPatch) -> None:
    yaml = pytest.importorskip("yaml")

    @dataclasses.dataclass(frozen=True)
    class OptimizerConfig:
        learning_rate: float = 6e-4
        weight_decay: float = 0.0
        kinds = {}  # noqa: RUF012

        @classmethod
        def register_subclass(cls, name: str) -> Any:
            return lambda kind: cls.kinds.setdefault(name, kind)

        def build_weight_decay_mask(self) -> Any:
            return None

        def lr_scheduler(self, steps: int) -> Any:
            return optax.constant_schedule(self.learning_rate)

    stand_in(monkeypatch, "levanter.optim.config", OptimizerConfig=OptimizerConfig)
    monkeypatch.setitem(sys.modules, "block", ModuleType("block"))
    run(block("maintainers/levanter.md", "Levanter, python"), __name__="block")
    given = yaml.safe_load(block("recipes.md", "Levanter, yaml"))["optimizer"]
    kind = OptimizerConfig.kinds[given.pop("type")]
    assert first_rate(kind(**given).build(1000)) == pytest.approx(given["learning_rate"], rel=0.6)
    assert first_rate(kind(**given, search_steps=400).build(1000)) == pytest.approx(1e-5, rel=0.6)


def test_a_new_block_wants_a_test() -> None:
    """These are read above."""
    read = {"easydel": 1, "kohya": 1, "levanter": 1, "maxtext": 2, "onetrainer": 4, "transformers": 2}
    assert {page: len(blocks(page)) for page in PAGES} == {
        "recipes.md": 12,
        **{f"maintainers/{name}.md": number for name, number in read.items()},
    }
