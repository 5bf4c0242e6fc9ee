"""The sentence encoder of the evidence runs against the libraries that its weights were made for."""

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.implementations import BertWordPieceTokenizer
from transformers.models.bert import BertConfig, BertModel

from benchmarks.evidence.jobs.minilm import HEADS, LAYERS, WIDTH, MiniLM, mean_pooled, read_safetensors
from benchmarks.evidence.jobs.wordpiece import WordPiece

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "creme", "the", "##s", "a", "_", "."]
PIECES += ["(", ")", "日", "run", "##ning", "##n"]


def test_ids_are_those_of_the_reference_tokenizer(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    ours = WordPiece(vocabulary)
    theirs = BertWordPieceTokenizer(str(vocabulary), lowercase=True, strip_accents=True)
    for text in (
        "The unaffable  run",
        "Crème_(a).\n\tRUNNING",
        "日the日 runs",
        "zebra unaff" + "x" * 200,
        "a\u200bb\x00.",
        "",
    ):
        assert ours(text, 1000) == theirs.encode(text).ids, text
    assert ours("the the the the", 4) == [2, 9, 9, 3]


def test_layers_and_mean_are_those_of_the_reference_encoder(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = BertConfig(vocab_size=50, intermediate_size=4 * WIDTH, layer_norm_eps=1e-12, **sizes)
    model = BertModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # its own start has zero biases and norms of one, which would hide mistakes
            p.add_(0.02 * torch.randn_like(p))
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    ids = torch.randint(1, 50, (3, 10))
    ids[1, 6:] = 0
    present = ids != 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=present.long()).last_hidden_state
        encoder = MiniLM(read_safetensors(tmp_path / "model.safetensors"))
        x = encoder.embed(ids)
        for index in range(LAYERS):
            x = encoder.layer(index)(x, present)
    # Six float32 layers of activations around 1.
    torch.testing.assert_close(x[present], expected[present], atol=1e-4, rtol=0)
    assert mean_pooled(x, present)[1] == pytest.approx(expected[1, :6].mean(dim=0), abs=1e-4)
