"""Programs and libraries around a model: lm-eval, captum, value heads. Oracles are the formula on the base by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedTokenizerBase

from adapters import adapted
from device import DEVICE
from families import DECODERS, FAMILIES, ids, padded
from oracles import embed, greedy, row_output, transform
from tokenizers_of_families import tokenizer_of

LLAMA = FAMILIES["llama"]
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}


def log_probabilities(base: nn.Module, weights: dict[str, Tensor], context: list[int], target: list[int]) -> Tensor:
    """Of each token of the target, after the context."""
    logits = row_output(base, weights, torch.tensor(context + target, device=DEVICE))
    return logits.log_softmax(-1)[len(context) - 1 : -1].gather(-1, logits.new_tensor(target).long()[:, None])[:, 0]


# ---- value heads ----------------------------------------------------------------------------------------------------


class WithValues(nn.Module):
    """A model and a value for each token, out of its last hidden states, as PPO's critics are made."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(model.config.hidden_size, 1).to(DEVICE)

    def forward(self, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(**inputs, output_hidden_states=True)
        return out.logits, self.head(out.hidden_states[-1])[..., 0]


@pytest.mark.parametrize("family", [f for f in DECODERS if f.name != "opt"], ids=str)  # its last state is projected
def test_a_value_for_each_token(family):
    model, base, weights = adapted(family)
    critic = WithValues(model)
    rows = [ids(7), ids(4, seed=1)]
    batch, mask = padded(rows, "right")
    logits, values = critic(input_ids=batch, attention_mask=mask)
    assert logits.shape[:2] == values.shape == batch.shape
    for row, found, at in zip(rows, values, mask.bool(), strict=True):
        with torch.no_grad():
            hidden = base.base_model(inputs_embeds=embed(base, weights, row)).last_hidden_state[0, 4:]
        assert_close(found[at], critic.head(hidden)[:, 0], **TOLERANCE)
    values[mask.bool()].sum().backward()
    assert all(one.grad.abs().sum() > 0 for key, one in model.named_parameters() if "input_tuning_" in key)


# ---- captum ---------------------------------------------------------------------------------------------------------


def test_integrated_gradients_of_the_words():
    """The path from a row of padding to the row, as a sum by hand. The prompt's places come first, and have none."""
    captum = pytest.importorskip("captum.attr")
    model, base, weights = adapted(LLAMA)
    row, target, steps = ids(6), 5, 8

    def logit(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens).logits[:, -1, target]

    method = captum.LayerIntegratedGradients(logit, model.get_input_embeddings())
    found = method.attribute(row[None], baselines=torch.zeros_like(row)[None], n_steps=steps, method="riemann_middle")
    start, end = (embed(base, weights, tokens).detach() for tokens in (torch.zeros_like(row), row))
    want = torch.zeros_like(end)
    for step in range(steps):
        x = (start + (step + 0.5) / steps * (end - start)).requires_grad_()
        (gradient,) = torch.autograd.grad(base(inputs_embeds=x).logits[0, -1, target], x)
        want += gradient * (end - start) / steps
    assert_close(found, want, **TOLERANCE)
    assert found.shape[1] == 4 + len(row)
    assert not found[:, :4].any()
    through_embeddings = captum.IntegratedGradients(lambda x: model(inputs_embeds=x).logits[:, -1, target]).attribute(
        end[:, 4:], baselines=start[:, 4:], n_steps=steps, method="riemann_middle"
    )
    assert_close(through_embeddings, want[:, 4:], **TOLERANCE)


def test_each_word_s_part_in_a_text():
    captum = pytest.importorskip("captum.attr")
    model, base, weights = adapted(LLAMA)
    tokenizer = tokenizer_of(LLAMA)
    text = captum.TextTokenInput("a b c", tokenizer, skip_tokens=[tokenizer.bos_token_id])
    of_texts = captum.LLMAttribution(captum.FeatureAblation(model), tokenizer)
    found = of_texts.attribute(text, target=" d e", use_cached_outputs=False)
    context, target = tokenizer("a b c").input_ids, tokenizer(" d e", add_special_tokens=False).input_ids
    whole = log_probabilities(base, weights, context, target)
    without = [[0 if place == left_out else token for place, token in enumerate(context)] for left_out in (1, 2, 3)]
    parts = torch.stack([whole - log_probabilities(base, weights, one, target) for one in without], dim=1)
    assert_close(found.token_attr, parts, **TOLERANCE)
    assert_close(found.seq_attr, parts.sum(0), **TOLERANCE)


def test_captum_s_other_embedding_is_refused():
    captum = pytest.importorskip("captum.attr")
    model, _, _ = adapted(LLAMA)
    embedding = captum.configure_interpretable_embedding_layer(model.get_base_model(), "model.embed_tokens")
    with pytest.raises(ValueError, match="it is a InterpretableEmbeddingBase now, and the input-adapter"):
        model(inputs_embeds=embedding.indices_to_embeddings(ids(1, 6)))


# ---- lm-eval --------------------------------------------------------------------------------------------------------

CHOICES = [("a b c", [" d e", " f"]), ("d", [" a", " b c"]), ("e f a b", [" c d", " e f"])]
TEXTS, NEW = ["a b", "c d e f"], 5
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
target_delimiter: ""
"""
CHOOSING = """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: 0
metric_list: [{metric: acc}]
"""
GENERATING = f"""
output_type: generate_until
doc_to_target: ""
generation_kwargs: {{until: ["filler"], max_gen_toks: {NEW}, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm-eval")
    model, base, weights = adapted(LLAMA)
    tokenizer = tokenizer_of(LLAMA)
    for one in (base, tokenizer):
        one.save_pretrained(folder / "base")
    model.save_pretrained(folder / "adapter")
    rows = {
        "choosing": [{"text": text, "choices": choices} for text, choices in CHOICES],
        "generating": [{"text": text} for text in TEXTS],
    }
    for (name, its_rows), kind in zip(rows.items(), (CHOOSING, GENERATING), strict=True):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, its_rows)))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=folder / f"{name}.jsonl") + kind)
    return folder, base, weights, tokenizer


def likelihoods(base: nn.Module, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> list[list[float]]:
    """Of each choice, the sum over its tokens."""
    found = []
    for text, choices in CHOICES:
        context = tokenizer(text).input_ids
        targets = [tokenizer(text + choice).input_ids[len(context) :] for choice in choices]
        found.append([float(log_probabilities(base, weights, context, target).sum()) for target in targets])
    return found


def continuations(base: nn.Module, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    rows = [torch.tensor(tokenizer(text).input_ids, device=DEVICE) for text in TEXTS]
    texts = [tokenizer.decode(greedy(base, weights, row, NEW), skip_special_tokens=True) for row in rows]
    return [text.split("filler")[0] for text in texts]


def lm_eval(folder: Path) -> subprocess.CompletedProcess[str]:
    model = f"pretrained={folder / 'base'},peft={folder / 'adapter'},add_bos_token=True"
    options = ["--model", "hf", "--model_args", model, "--device", str(DEVICE), "--batch_size", "2", "--log_samples"]
    tasks = ["--include_path", str(folder), "--tasks", "choosing,generating", "--output_path", str(folder / "out")]
    return subprocess.run(
        [sys.executable, "-m", "peft_input_tuning", "run", "lm_eval", *options, *tasks],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")},
    )


@pytest.mark.slow
@pytest.mark.not_emulated("lm-eval takes no other devices")
def test_lm_eval_on_the_command_line(saved):
    pytest.importorskip("lm_eval")
    folder, base, weights, tokenizer = saved
    done = lm_eval(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = {}
    for name in ("choosing", "generating"):
        (file,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
        rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
        samples[name] = [row["resps"] for row in rows]
    found = [[float(choice[0][0]) for choice in row] for row in samples["choosing"]]
    want = likelihoods(base, weights, tokenizer)
    assert_close(torch.tensor(found), torch.tensor(want), **TOLERANCE)
    assert [row[0][0] for row in samples["generating"]] == continuations(base, weights, tokenizer)
    plain = likelihoods(base, {}, tokenizer)
    assert (torch.tensor(found) - torch.tensor(plain)).abs().min() > 0.01


@pytest.mark.slow
@pytest.mark.not_emulated("lm-eval takes no other devices")
@pytest.mark.parametrize("given", ["folders", "a model"])
def test_lm_eval_as_a_library(saved, given):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder, base, weights, tokenizer = saved
    options = {"add_bos_token": True, "batch_size": 2, "device": str(DEVICE)}
    if given == "folders":
        evaluated = HFLM(pretrained=str(folder / "base"), peft=str(folder / "adapter"), **options)
    else:
        evaluated = HFLM(pretrained=adapted(LLAMA)[0], tokenizer=tokenizer, **options)
    pairs = [(text, choice) for text, choices in CHOICES for choice in choices]
    asked = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
    found = [likelihood for likelihood, _ in evaluated.loglikelihood(asked)]
    assert_close(torch.tensor(found), torch.tensor(likelihoods(base, weights, tokenizer)).flatten(), **TOLERANCE)
    until = {"until": ["filler"], "max_gen_toks": NEW, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, until), place) for place, text in enumerate(TEXTS)]
    assert evaluated.generate_until(asked) == continuations(base, weights, tokenizer)


def test_the_oracle_of_a_likelihood():
    """By hand for one token, with the formula written out."""
    _, base, weights = adapted(LLAMA)
    row = ids(4)
    x = torch.cat([weights["prompt.weight"], transform(weights, base.get_input_embeddings()(row[:-1]))])
    want = base(inputs_embeds=x[None]).logits[0, -1].softmax(-1)[row[-1]].log()
    found = log_probabilities(base, weights, row[:-1].tolist(), row[-1:].tolist())
    assert_close(found, want[None], **TOLERANCE)
