"""sentence-transformers' other models with an adapter: CrossEncoder, SparseEncoder, MultiVectorEncoder."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import sentence_transformers
import torch
import transformers as t
from datasets import Dataset
from packaging.version import Version
from sentence_transformers import CrossEncoder, SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.cross_encoder.modules import LogitScore
from torch.nn.functional import normalize
from torch.testing import assert_close

from adapters import config
from device import DEVICE
from families import FAMILIES, build
from oracles import head_output, row_output
from test_pipelines import as_ids
from test_sentence_transformers import TEXTS, TOLERANCE, WORDS, adapt, each_way, saved

pytestmark = pytest.mark.skipif(DEVICE.type == "emulated", reason="the library looks for devices of its own")


def cross_encoder(folder: Path) -> tuple[CrossEncoder, torch.nn.Module]:
    """A classifier with one output, and the same for the oracle."""
    settings = FAMILIES["bert"].config()
    settings.num_labels = 1
    torch.manual_seed(0)
    base = t.BertForSequenceClassification(settings).eval().to(DEVICE)
    return CrossEncoder(saved(folder, base), device=str(DEVICE)), copy.deepcopy(base)


ASKED = [("w5 w6", "w7 w8 w9"), ("w3", "w4")]


@each_way
def test_a_cross_encoder(tmp_path, way):
    model, base = cross_encoder(tmp_path / "base")
    weights = adapt(model, way, task_type="SEQ_CLS")
    tokens = model.tokenizer([a for a, _ in ASKED], [b for _, b in ASKED], padding=True, return_tensors="pt")
    rows = [ids[mask == 1].to(DEVICE) for ids, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True)]
    want = torch.cat([head_output(base, weights, row, "seq_cls") for row in rows]).sigmoid()
    got = model.predict(ASKED, convert_to_tensor=True)
    assert_close(got, want, **TOLERANCE)
    model.save_pretrained(str(tmp_path / "adapter"))
    there, _ = cross_encoder(tmp_path / "base")
    there.load_adapter(str(tmp_path / "adapter"))
    assert_close(there.predict(ASKED, convert_to_tensor=True), got, rtol=1e-6, atol=1e-6)
    # 5.4 looks for the number of labels where no adapter of PEFT has it, LoRA neither
    loaded = CrossEncoder(str(tmp_path / "adapter"), num_labels=1, device=str(DEVICE))
    assert_close(loaded.predict(ASKED, convert_to_tensor=True), got, rtol=1e-6, atol=1e-6)


@pytest.mark.trains_with("sentence-transformers", "CrossEncoderTrainer: adapter and head move, and are loaded")
def test_a_cross_encoder_is_trained_with_its_head(tmp_path):
    """`add_adapter` freezes the head as it does for LoRA; `modules_to_save` names it."""
    model, _ = cross_encoder(tmp_path / "base")
    model.add_adapter(config(task_type="SEQ_CLS", modules_to_save=["classifier"], init_weights=True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = CrossEncoderTrainingArguments(
        str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, report_to="none", use_cpu=DEVICE.type == "cpu"
    )
    rows = {"query": ["w5", "w6"] * 4, "answer": ["w7 w8", "w9"] * 4, "label": [1.0, 0.0] * 4}
    rows = Dataset.from_dict(rows)
    CrossEncoderTrainer(model, arguments, train_dataset=rows, loss=BinaryCrossEntropyLoss(model)).train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".default")[0].rpartition(".")[2] for name in moved} == {
        "input_tuning_prompt",
        "input_tuning_fc1",
        "input_tuning_fc2",
        "modules_to_save",
    }
    model.save_pretrained(str(tmp_path / "adapter"))
    there, _ = cross_encoder(tmp_path / "base")
    there.load_adapter(str(tmp_path / "adapter"))
    want = model.predict(ASKED, convert_to_tensor=True)
    assert_close(there.predict(ASKED, convert_to_tensor=True), want, rtol=1e-5, atol=1e-6)


def test_a_cross_encoder_that_asks_a_language_model(tmp_path):
    """It reads the logits of two words at the last place, on the left of which rows are padded."""
    module = Transformer(saved(tmp_path, build("llama"), "left"), transformer_task="text-generation")
    score = LogitScore(true_token_id=5, false_token_id=6)
    model = CrossEncoder(modules=[module, score], device=str(DEVICE))
    weights = adapt(model, "add_adapter", task_type="CAUSAL_LM")
    given = module.preprocess(ASKED)
    rows = [ids[mask == 1].to(DEVICE) for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True)]
    logits = torch.stack([row_output(build("llama"), weights, row)[-1] for row in rows])
    got = model.predict(ASKED, convert_to_tensor=True, activation_fn=torch.nn.Identity())
    assert_close(got, logits[:, 5] - logits[:, 6], **TOLERANCE)


def test_a_sparse_encoder(tmp_path):
    """SPLADE: the largest logarithm of each word over the text's places."""
    model = SparseEncoder(saved(tmp_path / "base", build("bert")), device=str(DEVICE))
    weights = adapt(model, "add_adapter", task_type=None)
    rows = [row_output(build("bert"), weights, as_ids(text)) for text in WORDS]
    want = torch.stack([torch.log1p(row.relu()).amax(0) for row in rows])
    got = model.encode(WORDS).to_dense()
    assert_close(got, want, **TOLERANCE)
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = SparseEncoder(str(tmp_path / "adapter"), device=str(DEVICE))
    assert torch.equal(loaded.encode(WORDS).to_dense(), got)


@pytest.mark.skipif(Version(sentence_transformers.__version__) < Version("6"), reason="came with 6.0")
def test_a_multi_vector_encoder(minilm):
    """A vector for each place of a text, none for virtual tokens."""
    torch.manual_seed(0)
    model = sentence_transformers.MultiVectorEncoder(minilm, device=str(DEVICE))
    weights = adapt(model, "add_adapter", scale=0.05)
    plain = t.AutoModel.from_pretrained(minilm).eval().to(DEVICE)
    for text, got in zip(TEXTS, model.encode_document(TEXTS), strict=True):
        row = model.tokenizer(text, return_tensors="pt").input_ids[0].to(DEVICE)
        want = normalize(model[1].linear(row_output(plain, weights, row)), dim=-1)
        assert_close(got.to(DEVICE), want, **TOLERANCE)
