"""Adapters and embeddings are found in the modules that real libraries make."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from automagic_torch import AutomagicCameAMP8bit, found_marks, mark_embeddings, mark_lora

ATTENTION = "base_model.model.model.layers.0.self_attn.q_proj"
MLP = "base_model.model.model.layers.0.mlp.down_proj"
TABLE = "base_model.model.model.embed_tokens"


def llama(tied: bool = False) -> LlamaForCausalLM:
    """A language model of 32 tokens and width 16 with random weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=tied, eos_token_id=1))


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(8, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(x)


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def within(module: str, *names: str) -> set[str]:
    return {f"{module}.{name}" for name in names}


LORA = within(ATTENTION, "lora_A.default.weight", "lora_B.default.weight")
LORA_OF_TABLE = within(TABLE, "lora_embedding_A.default", "lora_embedding_B.default")
LOHA = ("hada_w1_a.default", "hada_w1_b.default", "hada_w2_a.default", "hada_w2_b.default")
both: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "embed_tokens"]}
one: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}

# config, LoRA matrices, other parameters that are trained
ADAPTERS: dict[str, tuple[Any, set[str], set[str]]] = {
    "LoRA": (peft.LoraConfig(**both), LORA | LORA_OF_TABLE, set()),
    "DoRA": (
        peft.LoraConfig(**both, use_dora=True),
        LORA | LORA_OF_TABLE,
        within(ATTENTION, "lora_magnitude_vector.default.weight")
        | within(TABLE, "lora_magnitude_vector.default.weight"),
    ),
    "AdaLoRA": (
        peft.AdaLoraConfig(init_r=2, target_r=1, total_step=10, target_modules=["q_proj"]),
        within(ATTENTION, "lora_A.default", "lora_B.default"),
        within(ATTENTION, "lora_E.default"),  # singular values, (rank, 1)
    ),
    "LoHa": (peft.LoHaConfig(**one), within(ATTENTION, *LOHA), set()),
    "LoKr": (
        peft.LoKrConfig(r=2, target_modules=["q_proj", "down_proj"]),
        within(ATTENTION, "lokr_w1.default", "lokr_w2.default")
        | within(MLP, "lokr_w1.default", "lokr_w2_a.default", "lokr_w2_b.default"),
        set(),
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_that_peft_makes(kind: str) -> None:
    config, matrices, others = ADAPTERS[kind]
    model = peft.get_peft_model(llama(), config)
    found = mark_lora(model)
    assert set(found) == matrices
    assert trained(model) == matrices | others
    # Nothing but these has the mark, and a parameter that is no adapter has none at all.
    assert {name for name, p in model.named_parameters() if hasattr(p, "_is_lora_layer")} == matrices
    assert mark_lora(model) == found


@pytest.mark.parametrize(
    ("config", "matrices"),
    [
        (peft.LoraConfig(r=2, target_modules=["c"], use_dora=True), ()),  # 4-D
        (peft.LoHaConfig(r=2, target_modules=["c"], use_effective_conv2d=True), LOHA),
        (peft.LoKrConfig(r=2, target_modules=["c"]), ("lokr_w1.default",)),  # its w2 is 4-D
    ],
)
def test_only_matrices_of_a_convolutions_adapter_count(config: Any, matrices: tuple[str, ...]) -> None:
    model = peft.get_peft_model(Picture(), config)
    expected = within("base_model.model.c", *matrices)
    assert set(mark_lora(model)) == expected
    assert {name for name, p in model.named_parameters() if hasattr(p, "_is_lora_layer")} == expected
    assert trained(model) > expected


def test_names_of_kohya_and_a_second_adapter() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_down, self.lora_up = nn.Linear(8, 2, bias=True), nn.Linear(2, 8, bias=False)
            self.alpha = nn.Parameter(torch.ones(()))
            self.flora_downs = nn.Linear(8, 2, bias=False)

    assert mark_lora(nn.ModuleDict({"a": Adapted()})) == ["a.lora_down.weight", "a.lora_up.weight"]

    model = peft.get_peft_model(llama(), peft.LoraConfig(**one))
    model.add_adapter("style", peft.LoraConfig(**one))
    assert set(mark_lora(model)) == LORA | within(ATTENTION, "lora_A.style.weight", "lora_B.style.weight")


def test_an_adapter_of_an_embedding_is_a_matrix_and_no_embedding() -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(**both))
    assert mark_embeddings(model) == [f"{TABLE}.base_layer.weight"]
    # (rank, num) and (features, rank): dense kernels in PyTorch's layout, not (num, features).
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name in LORA_OF_TABLE}
    assert sorted(shapes.values()) == [(2, 32), (16, 2)]


def test_embeddings_that_peft_wraps() -> None:
    saved = peft.get_peft_model(llama(), peft.LoraConfig(**one, modules_to_save=["embed_tokens", "lm_head"]))
    names = set(mark_embeddings(saved))
    assert names == within(TABLE, "original_module.weight", "modules_to_save.default.weight")
    assert trained(saved) - names - LORA == {"base_model.model.lm_head.modules_to_save.default.weight"}

    rows = peft.get_peft_model(llama(tied=True), peft.LoraConfig(**one, trainable_token_indices=[3, 5]))
    trained_rows = f"{TABLE}.token_adapter.trainable_tokens_delta.default"
    assert set(mark_embeddings(rows)) == {trained_rows, f"{TABLE}.token_adapter.base_layer.weight"}
    assert trained(rows) == LORA | {trained_rows}


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_the_embedding(tied: bool) -> None:
    model = llama(tied)
    assert mark_embeddings(model) == ["model.embed_tokens.weight"]
    assert getattr(model.lm_head.weight, "_is_embedding", False) is tied


def test_bags_and_subclasses_are_embeddings_and_a_tables_other_parameters_are_not() -> None:
    class Normed(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(6, 4)
            self.norm = nn.LayerNorm(4)

    model = nn.ModuleDict({"bag": nn.EmbeddingBag(5, 4), "table": Normed(), "embedding": nn.Linear(4, 4)})
    assert mark_embeddings(model) == ["bag.weight", "table.weight"]


def test_a_mark_set_by_hand_stays() -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(**one))
    model.add_module("mine", nn.Linear(4, 4))
    parameters = dict(model.named_parameters())
    not_this, table = min(LORA), f"{TABLE}.weight"
    parameters[not_this]._is_lora_layer = False
    parameters[table]._is_embedding = False
    parameters["mine.weight"]._is_lora_layer = True
    parameters["mine.bias"]._is_lora_layer = True  # one axis: no adapter to the optimizer
    assert set(mark_lora(model)) == LORA - {not_this} | {"mine.weight"}
    assert mark_embeddings(model) == []
    assert parameters[not_this]._is_lora_layer is False
    assert parameters[table]._is_embedding is False
    assert parameters["mine.bias"]._is_lora_layer is True


def test_what_was_found_can_be_listed_and_survives_a_move() -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(**one))
    assert found_marks(model) == {"lora": [], "embedding": []}
    marks = {"lora": mark_lora(model), "embedding": mark_embeddings(model)}
    assert found_marks(model.to(torch.bfloat16)) == marks
    assert found_marks(model.named_parameters()) == marks
    assert found_marks(list(model.named_parameters())[-1:])["embedding"] == []
    # As the module says: a copy has to be marked anew.
    assert found_marks(copy.deepcopy(model)) == {"lora": [], "embedding": []}


def test_the_marks_change_what_the_optimizer_does() -> None:
    def after_a_step(marked: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        model = peft.get_peft_model(llama(), peft.LoraConfig(**one, modules_to_save=["embed_tokens"]))
        torch.nn.init.normal_(dict(model.named_parameters())[max(LORA)], std=0.1)  # B is 0: nothing to decompose
        if marked:
            mark_lora(model)
            mark_embeddings(model)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        fields: dict[str, Any] = {"force_8bit": True, "min_8bit_size": 1, "stable_emb": True, "warmup_steps": 0}
        optimizer = AutomagicCameAMP8bit(named.items(), lr=1e-3, rank_penalty_strength=0.5, **fields)
        tokens = torch.arange(32)[None]
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        return named, {name: optimizer.state[p]["exp_avg"] for name, p in named.items()}

    (plain, _), (again, _), (changed, states) = (after_a_step(marked) for marked in (False, False, True))
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    table = f"{TABLE}.modules_to_save.default.weight"
    assert all(not torch.equal(plain[name], changed[name]) for name in LORA)
    assert states[table].dtype == torch.float32
    assert states[max(LORA)].dtype == torch.uint8


@pytest.mark.slow  # without bitsandbytes it is tested beside the groups
def test_peft_is_not_imported() -> None:
    code = "import sys, automagic_torch; print({'peft', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()", done.stderr
