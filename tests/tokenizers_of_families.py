"""Small tokenizers of the kinds that the families use, over a vocabulary of 97 words, built here."""

from __future__ import annotations

import string

import transformers as t
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from families import VOCAB, Family

SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]
LETTERS = list(string.ascii_lowercase)


def _words(space: str) -> dict[str, int]:
    """Special tokens, letters with and without the mark of a space, and fillers up to the vocabulary's size."""
    words = SPECIAL + [space + letter for letter in LETTERS] + LETTERS + [space]
    words += [f"filler{i}" for i in range(VOCAB - len(words))]
    return {word: i for i, word in enumerate(words)}


def _merges(space: str) -> list[tuple[str, str]]:
    return [(space, letter) for letter in LETTERS]


def _byte_level(start: bool = False) -> Tokenizer:
    """GPT-2's kind: bytes, the space as Ġ."""
    backend = Tokenizer(models.BPE(vocab=_words("Ġ"), merges=_merges("Ġ"), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if start:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 2)]
        )
    return backend


def _qwen() -> Tokenizer:
    backend = _byte_level()
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return backend


def _sentencepiece_bpe(start: bool = True) -> Tokenizer:
    """Llama's and Gemma's kind: the space as ▁, a start token."""
    backend = Tokenizer(models.BPE(vocab=_words("▁"), merges=_merges("▁"), unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    if start:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 2)]
        )
    return backend


def _unigram() -> Tokenizer:
    """T5's kind: unigram, an end token."""
    backend = Tokenizer(models.Unigram([(word, -float(i % 7)) for word, i in _words("▁").items()], unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", 1)]
    )
    return backend


def _bart() -> Tokenizer:
    backend = _byte_level()
    backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 2), add_prefix_space=False)
    return backend


_KINDS = {
    "llama": (_sentencepiece_bpe, "PreTrainedTokenizerFast"),
    "mistral": (_sentencepiece_bpe, "PreTrainedTokenizerFast"),
    "qwen2": (_qwen, "Qwen2Tokenizer"),
    "gemma2": (_sentencepiece_bpe, "PreTrainedTokenizerFast"),
    "gemma3": (_sentencepiece_bpe, "PreTrainedTokenizerFast"),
    "gpt2": (_byte_level, "GPT2Tokenizer"),
    "opt": (lambda: _byte_level(start=True), "PreTrainedTokenizerFast"),
    "bloom": (_byte_level, "PreTrainedTokenizerFast"),
    "gpt_neox": (_byte_level, "PreTrainedTokenizerFast"),
    "phi3": (_sentencepiece_bpe, "PreTrainedTokenizerFast"),
    "t5": (_unigram, "PreTrainedTokenizerFast"),
    "bart": (_bart, "PreTrainedTokenizerFast"),
}


def tokenizer_of(family: Family) -> t.PreTrainedTokenizerBase:
    """A fresh tokenizer of the kind that a family uses."""
    make, class_name = _KINDS[family.name]
    tokenizer = getattr(t, class_name)(
        tokenizer_object=make(), pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    if class_name != "PreTrainedTokenizerFast":  # such a class builds its own backend; give it the small vocabulary
        tokenizer = getattr(t, class_name)(
            vocab=_words("Ġ"),
            merges=_merges("Ġ"),
            pad_token="<pad>",
            eos_token="</s>",
            bos_token="<s>",
            unk_token="<unk>",
        )
    assert len(tokenizer) == VOCAB, (family.name, len(tokenizer))
    return tokenizer
