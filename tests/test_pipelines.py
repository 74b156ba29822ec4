"""Pipelines of transformers: what they say with an adapter is what the formula says, put into their form by hand.

With a `PeftModel`; the two most usual also with a model of transformers that manages its adapter itself.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as t
from peft import get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast, T5EncoderModel, pipeline

from adapters import SIZES, config, randomize
from device import DEVICE
from families import ALL, DECODERS, ENCODERS, FAMILIES, PAD, build
from oracles import adapter_weights, greedy, grown, head_output, likeliest, row_output

TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}  # of the formula in another order of sums
LLAMA = FAMILIES["llama"]
END, UNKNOWN, MASK = 1, 2, 96
WORDS = {"<pad>": PAD, "</s>": END, "<unk>": UNKNOWN, **{f"w{i}": i for i in range(3, MASK)}, "<mask>": MASK}
TEXTS = ["w5 w6 w7", "w8 w9 w10 w11 w12"]
ENDED = [f"{text} </s>" for text in TEXTS]  # T5's and BART's classifiers read the end

each_way = pytest.mark.parametrize("way", ["transformers", "PEFT"])


def tokenizer_of_words(side: str = "right", special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A word a token, its number the id; nothing is put around a text. Special words need no space between them."""
    made = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        mask_token="<mask>",
        padding_side=side,
        extra_special_tokens=list(special),
        model_input_names=["input_ids", "attention_mask"],
    )


def as_ids(text: str) -> torch.Tensor:
    return torch.tensor([WORDS[word] for word in text.split()], device=DEVICE)


def with_adapter(
    base: torch.nn.Module, way: str, task_type: str | None, **changes: Any
) -> tuple[torch.nn.Module, dict]:
    """The model with an adapter that matters, and the adapter's weights for the oracles."""
    if way == "PEFT":
        model = get_peft_model(base, config(task_type=task_type, **changes))
    else:
        model = base
        model.add_adapter(config(task_type=task_type, **changes))
    randomize(model)
    return model.eval(), adapter_weights(model)


def pipe_of(task: str, model: torch.nn.Module, side: str = "right", **options):
    return pipeline(task, model=model, tokenizer=tokenizer_of_words(side), device=DEVICE, **options)


def families_with(head: str, but: tuple[str, ...] = ()) -> list:
    return [family for family in ALL if head in family.heads and family.name not in but]


# ---- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.feature("pipeline")
@each_way
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("family", DECODERS, ids=str)
def test_text_generation(family, way, batch_size):
    model, weights = with_adapter(build(family), way, "CAUSAL_LM")
    pipe = pipe_of("text-generation", model, "left")
    out = pipe(TEXTS, max_new_tokens=4, do_sample=False, return_full_text=False, batch_size=batch_size)
    for text, answers in zip(TEXTS, out, strict=True):
        want = greedy(build(family), weights, as_ids(text), 4)
        assert answers[0]["generated_text"].strip() == pipe.tokenizer.decode(want, skip_special_tokens=True)


def test_a_chat():
    model, weights = with_adapter(build(LLAMA), "PEFT", "CAUSAL_LM")
    pipe = pipe_of("text-generation", model, "left")
    pipe.tokenizer.chat_template = "{% for m in messages %}w90 {{ m['content'] }} {% endfor %}w91"
    said = pipe([{"role": "user", "content": TEXTS[0]}], max_new_tokens=4, do_sample=False)[0]["generated_text"]
    want = greedy(build(LLAMA), weights, as_ids(f"w90 {TEXTS[0]} w91"), 4)
    assert said[-1]["role"] == "assistant"
    assert said[-1]["content"].strip() == pipe.tokenizer.decode(want, skip_special_tokens=True)


def test_from_an_adapter_folder(tmp_path):
    """What a user of the hub writes: the folder's name, nothing else. The tokenizer is the base's."""
    base = build(LLAMA)
    base.config.eos_token_id = None  # an end that comes by chance would make the comparison vacuous
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(LLAMA.heads["lm"].from_pretrained(tmp_path / "base").to(DEVICE), config(LLAMA))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer_of_words("left").save_pretrained(tmp_path / "base")
    pipe = pipeline("text-generation", model=str(tmp_path / "adapter"), device=DEVICE)
    out = pipe(TEXTS[0], max_new_tokens=4, do_sample=False, return_full_text=False)
    base = LLAMA.heads["lm"].from_pretrained(tmp_path / "base").to(DEVICE)
    want = greedy(base, adapter_weights(model), as_ids(TEXTS[0]), 4)
    assert out[0]["generated_text"].strip() == pipe.tokenizer.decode(want, skip_special_tokens=True)


@pytest.mark.parametrize("family", [FAMILIES["t5"], FAMILIES["bart"]], ids=str)
def test_table_question_answering(family):
    """The pipeline of today that generates with an encoder-decoder: of tables that are written out, as TAPEX's are."""
    import pandas

    base = build(family)
    base.generation_config.max_new_tokens = 4
    model, weights = with_adapter(base, "PEFT", "SEQ_2_SEQ_LM")
    pipe = pipe_of("table-question-answering", model)
    write_out = pipe.tokenizer

    class Flat(type(write_out)):
        def __call__(self, table, query, **options):
            options.pop("truncation")
            return super().__call__(" ".join([query, *table.columns, *table.to_numpy().ravel()]), **options)

    write_out.__class__ = Flat
    table = pandas.DataFrame({"w20": ["w21", "w22"], "w30": ["w31", "w32"]})
    said = pipe(table=table, query="w5 w6")
    want = greedy(build(family), weights, as_ids("w5 w6 w20 w30 w21 w31 w22 w32"), 4)
    assert said["answer"].strip() == pipe.tokenizer.decode(want, skip_special_tokens=True)


# ---- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.feature("pipeline")
@each_way
@pytest.mark.parametrize("family", families_with("seq_cls"), ids=str)
def test_text_classification(family, way):
    model, weights = with_adapter(build(family, "seq_cls"), way, "SEQ_CLS")
    pipe = pipe_of("text-classification", model, top_k=None)
    for text, answers in zip(ENDED, pipe(ENDED, batch_size=2), strict=True):
        scores = {answer["label"]: answer["score"] for answer in answers}
        got = torch.tensor([scores[f"LABEL_{i}"] for i in range(3)], device=DEVICE)
        assert_close(
            got, head_output(build(family, "seq_cls"), weights, as_ids(text), "seq_cls").softmax(-1), **TOLERANCE
        )


@pytest.mark.feature("pipeline")
@pytest.mark.parametrize("family", families_with("seq_cls"), ids=str)
def test_zero_shot_classification(family):
    model, weights = with_adapter(build(family, "seq_cls"), "PEFT", "SEQ_CLS")
    model.config.label2id = {"contradiction": 0, "neutral": 1, "entailment": 2}
    pipe = pipe_of("zero-shot-classification", model)
    labels = ["w20", "w21", "w22"]
    for text in TEXTS:
        said = pipe(text, candidate_labels=labels, hypothesis_template="w13 {} w14 </s>")
        rows = [as_ids(f"{text} w13 {label} w14 </s>") for label in labels]
        logits = torch.stack([head_output(build(family, "seq_cls"), weights, row, "seq_cls") for row in rows])
        got = torch.tensor([said["scores"][said["labels"].index(label)] for label in labels], device=DEVICE)
        assert_close(got, logits[:, 2].softmax(0), **TOLERANCE)


@pytest.mark.feature("pipeline")
@pytest.mark.parametrize("family", families_with("token_cls"), ids=str)
def test_token_classification(family):
    model, weights = with_adapter(build(family, "token_cls"), "PEFT", "TOKEN_CLS")
    pipe = pipe_of("token-classification", model, ignore_labels=[])
    for text, answers in zip(TEXTS, pipe(TEXTS, batch_size=2), strict=True):
        assert [answer["word"] for answer in answers] == text.split()
        scores, labels = (
            head_output(build(family, "token_cls"), weights, as_ids(text), "token_cls").softmax(-1).max(-1)
        )
        assert_close(torch.tensor([float(a["score"]) for a in answers], device=DEVICE), scores, **TOLERANCE)
        assert [answer["entity"] for answer in answers] == [f"LABEL_{i}" for i in labels.tolist()]


@pytest.mark.feature("pipeline")
@pytest.mark.parametrize("family", ENCODERS, ids=str)
def test_fill_mask(family):
    model, weights = with_adapter(build(family), "PEFT", None)
    pipe = pipe_of("fill-mask", model, top_k=3)
    masked = ["w5 <mask> w7", "w8 w9 w10 <mask> w12"]
    for text, answers in zip(masked, pipe(masked, batch_size=2), strict=True):
        row = as_ids(text)
        best = row_output(build(family), weights, row)[row == MASK].softmax(-1).topk(3)
        assert [answer["token"] for answer in answers] == best.indices[0].tolist()
        assert_close(torch.tensor([a["score"] for a in answers], device=DEVICE), best.values[0], **TOLERANCE)


@pytest.mark.feature("pipeline")
@pytest.mark.parametrize("family", families_with("base", but=("t5",)), ids=str)  # T5Model wants decoder ids
def test_feature_extraction(family):
    model, weights = with_adapter(build(family, "base"), "PEFT", "FEATURE_EXTRACTION")
    pipe = pipe_of("feature-extraction", model, return_tensors=True)
    for text, got in zip(TEXTS, pipe(TEXTS), strict=True):
        row, more = as_ids(text), {}
        if family.name == "bart":
            more["decoder_input_ids"] = torch.cat([row.new_tensor([2]), row[:-1]])[None]  # the shifted input
        assert_close(got[0].to(DEVICE), row_output(build(family, "base"), weights, row, **more), **TOLERANCE)


def test_features_of_t5s_encoder():
    encoder = T5EncoderModel(FAMILIES["t5"].config()).eval().to(DEVICE)
    encoder.load_state_dict(build("t5").state_dict(), strict=False)
    model, weights = with_adapter(encoder, "PEFT", "FEATURE_EXTRACTION")
    pipe = pipe_of("feature-extraction", model, return_tensors=True)
    for text, got in zip(TEXTS, pipe(TEXTS), strict=True):
        want = row_output(build("t5").encoder, weights, as_ids(text))[SIZES["num_virtual_tokens"] :]
        assert_close(got[0].to(DEVICE), want, **TOLERANCE)


@pytest.mark.parametrize("family", [LLAMA, FAMILIES["gpt2"]], ids=str)
def test_decision(family):
    """It asks for the logits at some places only, which are the caller's."""
    from transformers.pipelines import SUPPORTED_TASKS

    if "decision" not in SUPPORTED_TASKS:
        return  # transformers before 5.24 has no such pipeline
    from transformers.decision import DecisionConfig

    template = "w5 {{ state }} w9"
    settings = DecisionConfig(labels={"noul": ["w20", "w21"]}, chat_template=template)
    model, weights = with_adapter(build(family), "PEFT", "CAUSAL_LM")
    pipe = pipe_of("decision", model, decision_config=settings)
    asked = {"state": "w6 w7", "questions": {"refund": {"type": "noul", "instructions": "w8"}}}
    (given, (question,)), *_ = settings.prepare_inputs(asked, pipe.tokenizer)
    row = given["input_ids"][0].to(DEVICE)
    logits = row_output(build(family), weights, row)[int(given["marks"][0]) - 1]
    want = question.answer(logits[[WORDS[label] for label in question.labels]].softmax(-1).tolist())
    assert pipe(asked)["refund"] == pytest.approx(want)


# ---- images ---------------------------------------------------------------------------------------------------------

IMAGE = 90
SPECIAL = ("w90", "w92", "w93")  # an image's words, what stands before and behind it
PICTURE = Image.effect_noise((28, 28), 60).convert("RGB")  # random, but the same for both
TEXT = {"vocab_size": 97, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": 3, "max_position_embeddings": 64}
TEXT |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
SIZE = {"size": {"height": 28, "width": 28}, "do_center_crop": False}


def built(kind: type, settings: t.PretrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = kind(settings).eval().to(DEVICE).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
    return model


def llava() -> tuple[torch.nn.Module, t.ProcessorMixin]:
    vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}
    settings = t.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config=vision,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    words = tokenizer_of_words("left", SPECIAL)
    processor = t.LlavaProcessor(
        image_processor=t.CLIPImageProcessor(**SIZE),
        tokenizer=words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="w90",
    )
    return built(t.LlavaForConditionalGeneration, settings), processor


def gemma3() -> tuple[torch.nn.Module, t.ProcessorMixin]:
    """The words of an image see each other: token types say which they are."""
    text = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
    settings = t.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_id=IMAGE)
    words = tokenizer_of_words("left", SPECIAL)
    words.image_token, words.image_token_id, words.boi_token, words.eoi_token = "w90", IMAGE, "w92", "w93"
    words.boi_token_id, words.eoi_token_id = 92, 93
    images = t.Gemma3ImageProcessor(size={"height": 28, "width": 28})
    processor = t.Gemma3Processor(images, words, image_seq_length=4)
    return built(t.Gemma3ForConditionalGeneration, settings), processor


@torch.no_grad()
@pytest.mark.parametrize("make", [llava, gemma3])
def test_an_image_and_text(make):
    """The oracle has a word more for each virtual token, and chooses the likeliest word step by step."""
    base, processor = make()
    base.generation_config.eos_token_id = None
    oracle = copy.deepcopy(base)
    model, weights = with_adapter(base, "PEFT", "CAUSAL_LM")
    text = f"{'w92' if make is gemma3 else 'w90'} w5 w6 w7"
    pipe = pipeline("image-text-to-text", model=model, processor=processor, device=DEVICE)
    out = pipe(images=PICTURE, text=text, max_new_tokens=4, do_sample=False, return_full_text=False)

    oracle, virtual = grown(oracle, weights)
    given = processor(images=PICTURE, text=text, return_tensors="pt").to(DEVICE)
    row = torch.cat([virtual, given.pop("input_ids")[0]])
    assert (row == IMAGE).sum() == 4
    more = {name: value for name, value in given.items() if "pixel" in name or "grid" in name}
    new: list[int] = []
    for _ in range(4):
        ids = torch.cat([row, row.new_tensor(new)])[None]
        types = {"mm_token_type_ids": (ids == IMAGE).int()} if "mm_token_type_ids" in given else {}
        new.append(
            likeliest(oracle(input_ids=ids, attention_mask=torch.ones_like(ids), **more, **types).logits[0, -1])
        )
    assert out[0]["generated_text"].strip() == processor.tokenizer.decode(new, skip_special_tokens=True)


def two_towers(name: str) -> torch.nn.Module:
    kinds = {"clip": (t.CLIPModel, t.CLIPConfig), "siglip": (t.SiglipModel, t.SiglipConfig)}
    kind, settings = kinds[name]
    more = {"projection_dim": 16} if name == "clip" else {}
    text = {**TEXT, **more} if name == "clip" else {**TEXT, "projection_size": 16, "max_position_embeddings": 80}
    return built(kind, settings(text_config=text, vision_config={**VISION, **more}, **more))


@torch.no_grad()
@each_way
@pytest.mark.parametrize("slots", [0, 4])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_zero_shot_image_classification(name, slots, way):
    """A model that compares texts with images names no word embedding; the adapter goes into the part that has one."""
    base = two_towers(name)
    oracle = copy.deepcopy(base)
    model, weights = with_adapter(base, way, None, num_virtual_tokens=slots)
    images = (t.CLIPImageProcessor if name == "clip" else t.SiglipImageProcessor)(**SIZE)
    words = tokenizer_of_words()
    pipe = pipeline(
        "zero-shot-image-classification", model=model.eval(), tokenizer=words, image_processor=images, device=DEVICE
    )
    labels = ["w5 w6 </s>", "w7 w8 w9 </s>"]
    padding = {"tokenizer_kwargs": {"padding": True}}  # SigLIP's default is its longest input
    said = {
        one["label"]: one["score"]
        for one in pipe(PICTURE, candidate_labels=labels, hypothesis_template="{}", **padding)
    }

    table = oracle.text_model.embeddings.token_embedding
    oracle, virtual = grown(oracle, weights, table=table)
    pixels = images(PICTURE, return_tensors="pt").pixel_values.to(DEVICE)
    logits = []
    for label in labels:
        pads = [PAD] * (0 if name == "clip" else 64 - len(label.split()))  # SigLIP reads the last place
        row = torch.cat([virtual, as_ids(label), virtual.new_tensor(pads)])[None]
        logits.append(
            oracle(input_ids=row, attention_mask=(row != PAD).long(), pixel_values=pixels).logits_per_image[0, 0]
        )
    logits = torch.stack(logits)
    want = logits.softmax(0) if name == "clip" else logits.sigmoid()
    assert_close(torch.tensor([said[label] for label in labels], device=DEVICE), want, **TOLERANCE)
