"""sentence-transformers: its models with an input-tuning adapter, against the formula and pooling by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentence_transformers
import torch
import transformers as t
from datasets import Dataset
from packaging.version import Version
from peft import PeftModel, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.nn.functional import normalize
from torch.testing import assert_close

from adapters import config, randomize
from device import DEVICE
from families import FAMILIES, build
from oracles import adapter_weights, grown, row_output
from test_pipelines import PICTURE, as_ids, tokenizer_of_words, two_towers

pytestmark = pytest.mark.skipif(DEVICE.type == "emulated", reason="the library looks for devices of its own")
TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}
TEXTS = ["a short one", "a somewhat longer sentence about frozen language models", "x"]
WORDS = ["w5 w6 w7", "w8 w9 w10 w11 w12", "w4"]
PAIRS = {"anchor": ["cat", "dog", "sun", "sea"] * 4, "positive": ["kitten", "puppy", "star", "ocean"] * 4}
each_way = pytest.mark.parametrize("way", ["add_adapter", "PEFT"])


def adapt(model, way: str, scale: float = 0.3, **changes) -> dict:
    """Puts an adapter that matters into a model of the library; its weights for the oracles."""
    settings = config(**{"task_type": "FEATURE_EXTRACTION", **changes})
    if way == "PEFT":
        model[0].model = get_peft_model(model[0].model, settings)
    else:
        model.add_adapter(settings)
    randomize(model[0].model, scale=scale)
    model.eval()
    return adapter_weights(model[0].model)


def embedded(model, texts: list[str], **options) -> torch.Tensor:
    return torch.as_tensor(model.encode(texts, convert_to_tensor=True, **options)).to(DEVICE)


def by_hand(folder: str, weights: dict, texts: list[str], skipped: int = 0) -> torch.Tensor:
    """The plain MiniLM on [prompt; T(E)], a text at a time; the mean over the text's places, of length 1."""
    plain = t.AutoModel.from_pretrained(folder).eval().to(DEVICE)
    tokenizer = t.AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text, return_tensors="pt").input_ids[0].to(DEVICE) for text in texts]
    return torch.stack([normalize(row_output(plain, weights, row)[skipped:].mean(0), dim=0) for row in rows])


def saved(folder: Path, model: torch.nn.Module, side: str = "right") -> str:
    """A tiny model and its tokenizer in a folder, from which the library loads them."""
    model.save_pretrained(folder)
    tokenizer_of_words(side).save_pretrained(folder)
    return str(folder)


# ---- SentenceTransformer --------------------------------------------------------------------------------------------


@each_way
def test_encode_is_the_mean_over_the_texts_places(minilm, way):
    """Of a batch of different lengths; virtual tokens have no part in the mean."""
    model = SentenceTransformer(minilm, device=str(DEVICE))
    before = embedded(model, TEXTS)
    weights = adapt(model, way, scale=0.05, num_virtual_tokens=8)
    got = embedded(model, TEXTS)
    assert_close(got, by_hand(minilm, weights, TEXTS), **TOLERANCE)
    assert (got - before).abs().max() > 0.02
    asked = embedded(model, TEXTS, prompt="query: ")
    assert_close(asked, by_hand(minilm, weights, [f"query: {text}" for text in TEXTS]), **TOLERANCE)
    model.set_pooling_include_prompt(False)  # the library's prompt, words in front of a text
    skipped = len(t.AutoTokenizer.from_pretrained(minilm)("query: ").input_ids) - 1
    asked = embedded(model, TEXTS, prompt="query: ")
    want = by_hand(minilm, weights, [f"query: {text}" for text in TEXTS], skipped)
    assert_close(asked, want, **TOLERANCE)


def test_adapters_are_switched_off_and_on(minilm):
    model = SentenceTransformer(minilm, device=str(DEVICE))
    before = embedded(model, TEXTS)
    adapt(model, "add_adapter", scale=0.05)
    after = embedded(model, TEXTS)
    model.disable_adapters()
    assert torch.equal(embedded(model, TEXTS), before)
    model.enable_adapters()
    assert torch.equal(embedded(model, TEXTS), after)
    assert model.active_adapters() == ["default"]


@each_way
def test_saved_and_loaded(minilm, tmp_path, way):
    """By the folder's name, or into a model that is there; the folder holds the adapter, not the base."""
    model = SentenceTransformer(minilm, device=str(DEVICE))
    adapt(model, way, scale=0.05)
    want = embedded(model, TEXTS)
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(embedded(SentenceTransformer(str(tmp_path), device=str(DEVICE)), TEXTS), want)
    there = SentenceTransformer(minilm, device=str(DEVICE))
    there.load_adapter(str(tmp_path))
    assert torch.equal(embedded(there, TEXTS), want)
    there = SentenceTransformer(minilm, device=str(DEVICE))
    there[0].model = PeftModel.from_pretrained(there[0].model, tmp_path)
    assert torch.equal(embedded(there, TEXTS), want)


def test_a_text_of_all_positions_leaves_no_room_for_a_prompt(minilm):
    model = SentenceTransformer(minilm, device=str(DEVICE))
    adapt(model, "add_adapter")
    model.max_seq_length = 512
    with pytest.raises(ValueError, match=r"512 tokens and the prompt 4 virtual tokens.*Shorten the input to 508"):
        model.encode(["word " * 600])
    model.max_seq_length = 508
    assert model.encode(["word " * 600]).shape == (1, 384)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_token_of_a_decoder(tmp_path, side):
    module = Transformer(saved(tmp_path, build("llama", "base"), side))
    pooling = Pooling(module.get_embedding_dimension(), "lasttoken")
    model = SentenceTransformer(modules=[module, pooling], device=str(DEVICE))
    weights = adapt(model, "add_adapter")
    want = torch.stack([row_output(build("llama", "base"), weights, as_ids(text))[-1] for text in WORDS])
    assert_close(embedded(model, WORDS), want, **TOLERANCE)


def test_the_encoder_of_t5(tmp_path):
    module = Transformer(saved(tmp_path / "base", build("t5")))
    assert isinstance(module.model, t.T5EncoderModel)
    model = SentenceTransformer(modules=[module, Pooling(32, "mean")], device=str(DEVICE))
    weights = adapt(model, "add_adapter")
    encoder = build("t5").encoder
    want = torch.stack([row_output(encoder, weights, as_ids(text))[4:].mean(0) for text in WORDS])
    assert_close(embedded(model, WORDS), want, **TOLERANCE)
    model.save_pretrained(str(tmp_path / "adapter"))
    there = Transformer(str(tmp_path / "base"))
    loaded = SentenceTransformer(modules=[there, Pooling(32, "mean")], device=str(DEVICE))
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(embedded(loaded, WORDS), embedded(model, WORDS))
    if Version(sentence_transformers.__version__) >= Version("6"):  # 5.4 puts a T5 with decoder there, for LoRA too
        loaded = SentenceTransformer(str(tmp_path / "adapter"), device=str(DEVICE))
        assert torch.equal(embedded(loaded, WORDS), embedded(model, WORDS))


@torch.no_grad()
@pytest.mark.parametrize("slots", [0, 4])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_texts_and_images_in_one_space(tmp_path, name, slots):
    """The adapter changes texts, and leaves images where they were."""
    base = two_towers(name)
    if name == "clip":
        processor = t.CLIPProcessor(t.CLIPImageProcessor(), tokenizer_of_words())
    else:
        processor = t.SiglipProcessor(t.SiglipImageProcessor(), tokenizer_of_words())
    processor.image_processor.size = {"height": 28, "width": 28}
    processor.image_processor.do_center_crop = False
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model = SentenceTransformer(modules=[Transformer(str(tmp_path / "base"))], device=str(DEVICE))
    image, texts = embedded(model, [PICTURE]), ["w5 w6 w7 </s>", "w8 w9 w10 </s>"]
    weights = adapt(model, "add_adapter", num_virtual_tokens=slots)
    assert_close(embedded(model, [PICTURE]), image, rtol=1e-5, atol=1e-5)
    oracle, virtual = grown(base, weights, table=base.text_model.embeddings.token_embedding)
    want = [oracle.get_text_features(input_ids=torch.cat([virtual, as_ids(text)])[None]) for text in texts]
    want = torch.cat([one.pooler_output for one in want])
    assert_close(embedded(model, texts), want, **TOLERANCE)
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = SentenceTransformer(str(tmp_path / "adapter"), device=str(DEVICE))
    assert torch.equal(embedded(loaded, texts), embedded(model, texts))


def test_packed_texts_are_refused_by_an_encoder():
    """As the library packs them for flash attention. Bidirectional attention needs borders between them."""
    model = get_peft_model(build("bert", "base"), config(FAMILIES["bert"]))
    collate = t.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=True)
    batch = collate([{"input_ids": as_ids(text).tolist()} for text in WORDS])
    batch = {name: one.to(DEVICE) if torch.is_tensor(one) else one for name, one in batch.items() if name != "labels"}
    with pytest.raises(ValueError, match="several sequences are packed into a row"):
        model(**batch)


# ---- training -------------------------------------------------------------------------------------------------------


def trainer_of(model, folder: Path, **changes) -> sentence_transformers.SentenceTransformerTrainer:
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
    settings |= {"logging_steps": 1, "save_steps": 2, "use_cpu": DEVICE.type == "cpu", "disable_tqdm": True}
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(str(folder), **settings | changes)
    return sentence_transformers.SentenceTransformerTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict(PAIRS),
        eval_dataset=Dataset.from_dict(PAIRS),
        loss=MultipleNegativesRankingLoss(model),
    )


def new_model(minilm: str) -> SentenceTransformer:
    torch.manual_seed(0)
    model = SentenceTransformer(minilm, device=str(DEVICE))
    model.add_adapter(config(task_type="FEATURE_EXTRACTION", init_weights=True))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.trains_with("sentence-transformers", "SentenceTransformerTrainer: loss by hand; the adapter alone moves")
def test_the_trainers_first_loss(minilm, tmp_path):
    """Of four pairs: the cross entropy of 20 times the cosines, each text's own partner being right."""
    model = new_model(minilm)
    weights = adapter_weights(model[0].model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(model, tmp_path, max_steps=2)
    (batch,) = [next(iter(trainer.get_train_dataloader()))]
    tokenizer = model.tokenizer
    columns = [tokenizer.batch_decode(batch[f"{name}_input_ids"], skip_special_tokens=True) for name in PAIRS]
    anchors, positives = (by_hand(minilm, weights, column) for column in columns)
    want = torch.nn.functional.cross_entropy(20 * anchors @ positives.T, torch.arange(4, device=DEVICE))
    got, _ = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), return_outputs=True)
    assert float(got.detach()) == pytest.approx(float(want), rel=1e-3)
    trainer.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert len(moved) == 3
    assert all("input_tuning_" in name for name in moved)


@pytest.mark.slow
@pytest.mark.trains_with("sentence-transformers", "SentenceTransformerTrainer: best checkpoint, resuming")
def test_the_best_checkpoint_and_resuming(minilm, tmp_path, lowest_loss_at):
    lowest_loss_at(sentence_transformers.SentenceTransformerTrainer, 2)
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = trainer_of(new_model(minilm), tmp_path / "a", **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = SentenceTransformer(str(tmp_path / "a" / "checkpoint-2"), device=str(DEVICE))
    assert_close(embedded(trainer.model, TEXTS), embedded(best, TEXTS), rtol=1e-6, atol=1e-6)
    whole = SentenceTransformer(str(tmp_path / "a" / "checkpoint-4"), device=str(DEVICE))
    again = trainer_of(new_model(minilm), tmp_path / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_close(embedded(again.model, TEXTS), embedded(whole, TEXTS), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(embedded(whole, TEXTS), embedded(best, TEXTS), atol=1e-4)
