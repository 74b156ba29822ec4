"""What `inspect_adapter` says of an adapter, against a loop over the words; the page; the command."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from peft import (
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

from adapters import adapted, config
from device import DEVICE
from families import ALL, FAMILIES, VOCAB, build
from oracles import encoder_of, transform
from parsed_page import Page
from peft_input_tuning import from_prompt_tuning, inspect_adapter
from peft_input_tuning.inspection.page import inspection_page
from peft_input_tuning.output.words import shown
from tokenizers_of_families import tokenizer_of

LLAMA = FAMILIES["llama"]


@pytest.mark.parametrize("family", ALL, ids=str)
def test_figures_against_a_loop(family):
    model, base, weights = adapted(family)
    found = inspect_adapter(model, nearest=3, most=4)
    embedding, prompt = encoder_of(base).get_input_embeddings(), weights["prompt.weight"]
    shifts, cosines, norms = [], [], []
    with torch.no_grad():
        for word in range(VOCAB):
            e = embedding(torch.tensor([word], device=DEVICE))[0]
            norms.append(float(e.norm()))
            shift = float((transform(weights, e) - e).norm() / e.norm()) if norms[-1] else 0.0
            shifts.append(shift)
            cosines.append([float(p @ e / p.norm() / (e.norm() or 1.0)) for p in prompt])
    assert found.shifts == pytest.approx(shifts, rel=1e-3, abs=1e-5)
    words = [word for word in range(VOCAB) if norms[word]]
    order = sorted(words, key=lambda word: shifts[word])
    assert [word.token_id for word in found.moved_least] == order[:4]
    assert [word.token_id for word in found.moved_most] == order[::-1][:4]
    assert found.moved_most[0].value == pytest.approx(max(shifts), rel=1e-3)
    assert (found.shift_quantiles[0], found.shift_quantiles[-1]) == pytest.approx(
        (shifts[order[0]], shifts[order[-1]]), rel=1e-3
    )
    assert found.embedding_norms[-1] == pytest.approx(max(norms), rel=1e-4)
    for i, token in enumerate(found.virtual_tokens):
        assert token.norm == pytest.approx(float(prompt[i].norm()), rel=1e-4)
        best = sorted(range(VOCAB), key=lambda word: -cosines[word][i])[:3]
        assert [word.token_id for word in token.nearest] == best
        assert token.nearest[0].value == pytest.approx(cosines[best[0]][i], abs=1e-4)
    assert len(found.virtual_tokens) == 4
    assert found.prompt_cosines[0][1] == pytest.approx(
        float(torch.nn.functional.cosine_similarity(prompt[0], prompt[1], dim=0)), abs=1e-5
    )


def test_sizes_facts_and_norms():
    model, base, weights = adapted(LLAMA, modules_to_save=["lm_head"])
    found = inspect_adapter(model)
    own = {"prompt": 4 * 32, "input_adapter": 2 * 24 * 32, "other": VOCAB * 32}
    assert {key: getattr(found.sizes, key) for key in own} == own
    assert found.sizes.base_model == sum(p.numel() for p in base.parameters())
    assert found.sizes.share == pytest.approx(sum(own.values()) / (sum(own.values()) + found.sizes.base_model))
    assert found.sizes.bytes == 4 * sum(own.values())
    assert found.facts["num_virtual_tokens"] == 4
    assert found.facts["modules_to_save"] == ["lm_head"]
    assert found.weight_norms == pytest.approx(
        {key: float(weights[key].norm()) for key in ("fc1.weight", "fc2.weight")}, rel=1e-5
    )


def test_only_a_prompt_or_only_an_adapter():
    prompt = inspect_adapter(adapted(LLAMA, adapter_hidden_dim=0)[0])
    assert (prompt.shifts, prompt.moved_most, prompt.shift_quantiles, prompt.weight_norms) == ((), (), (), {})
    assert len(prompt.virtual_tokens) == 4
    adapter = inspect_adapter(adapted(LLAMA, num_virtual_tokens=0)[0])
    assert (adapter.virtual_tokens, adapter.prompt_cosines) == ((), ())
    assert len(adapter.shifts) == VOCAB
    for found in (prompt, adapter):
        assert inspection_page(found).endswith("</html>\n")


def test_rows_that_are_no_words_are_left_out():
    tokenizer = tokenizer_of(LLAMA)
    base = build(LLAMA)
    base.resize_token_embeddings(VOCAB + 31)
    model = get_peft_model(base, config(LLAMA)).eval()
    known = set(tokenizer.get_vocab().values())
    found = inspect_adapter(model, tokenizer, nearest=len(known), most=len(known))
    assert {word.token_id for word in found.virtual_tokens[0].nearest} == known
    assert found.moved_most[0].text == tokenizer.decode([found.moved_most[0].token_id])


def test_a_merged_adapter_is_seen_from_the_base_embeddings():
    model, _, _ = adapted(LLAMA, num_virtual_tokens=0)
    before = inspect_adapter(model)
    model.merge_adapter()
    assert inspect_adapter(model).shifts == before.shifts


def test_what_is_refused():
    model, _, _ = adapted(LLAMA)
    with pytest.raises(ValueError, match=r"`adapter_name` is 'x'.*\['default'\]"):
        inspect_adapter(model, adapter_name="x")
    with pytest.raises(ValueError, match="`nearest` must be >= 1, got 0"):
        inspect_adapter(model, nearest=0)
    with pytest.raises(ValueError, match="no input-tuning adapter"):
        inspect_adapter(build(LLAMA))


# ---- the page and the command ---------------------------------------------------------------------------------------


class Hostile:
    """A tokenizer whose words are markup."""

    def get_vocab(self):
        return {str(i): i for i in range(VOCAB)}

    def decode(self, ids):
        return f"<script>alert({ids[0]})</script>\n"


def test_the_page_stands_alone_and_escapes_words():
    model, _, _ = adapted(LLAMA)
    found = inspect_adapter(model, Hostile())
    page = Page(inspection_page(found))
    assert "script" not in page.tags
    assert f"<script>alert({found.moved_most[0].token_id})</script>\\n" in page.text
    assert {"svg", "rect", "table"} <= set(page.tags)
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert not [value for key, value in page.attributes if key in ("src", "href", "xlink:href")]
    assert "url(" not in inspection_page(found)


def test_the_histogram_counts_every_word():
    model, base, _ = adapted(LLAMA, num_virtual_tokens=0)
    html = inspection_page(inspect_adapter(model))
    bars = html.split('class="bar"')[1:]
    assert sum(float(bar.split("<title>")[1].split("<")[0]) for bar in bars) == int(
        base.get_input_embeddings().weight.any(dim=1).sum()  # the padding's row is zero and is left out
    )


def test_the_command(tmp_path):
    model, base, _ = adapted(LLAMA)
    base.save_pretrained(tmp_path / "base")
    tokenizer_of(LLAMA).save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    command = [sys.executable, "-m", "peft_input_tuning", "inspect", str(tmp_path / "adapter")]
    options = ["--html", str(tmp_path / "page.html"), "--nearest", "2", "--most", "3"]
    done = subprocess.run(command + options, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for part in ("Virtual tokens", "started from", "moved most", "num_virtual_tokens", "Wrote "):
        assert part in done.stdout
    assert "Virtual tokens" in Page((tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "page.html"]
    wrong = [*command, "--html", str(tmp_path / "nowhere" / "page.html")]
    done = subprocess.run(wrong, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "--html" in done.stderr
    assert "Traceback" not in done.stderr


# ---- where the prompt started ---------------------------------------------------------------------------------------


def starts_of(model, name=None):
    return [token.started_from for token in inspect_adapter(model, adapter_name=name).virtual_tokens]


@pytest.mark.parametrize("family", ALL, ids=str)
def test_how_far_each_virtual_token_moved(family):
    base = build(family)
    words = encoder_of(base).get_input_embeddings()
    model = get_peft_model(base, config(family, num_virtual_tokens=3))
    found = starts_of(model)
    assert [start.value for start in found] == pytest.approx([0, 0, 0], abs=1e-6)
    prompt = model.base_model.layer.input_tuning_prompt["default"]
    prompt.start_from(prompt() + torch.tensor([[0.0], [0.5], [2.0]], device=DEVICE))
    e = words(torch.tensor([start.token_id for start in found], device=DEVICE))
    want = [far * e.shape[1] ** 0.5 / float(row.norm()) for far, row in zip((0, 0.5, 2), e, strict=True)]
    assert [start.value for start in starts_of(model)] == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_the_start_is_saved_and_stays_with_its_weights(tmp_path):
    own = config(LLAMA)
    models = [get_peft_model(build(LLAMA), own) for _ in range(2)]  # one object for both
    first, second = map(starts_of, models)
    assert first != second
    assert own.prompt_start is None
    models[0].save_pretrained(tmp_path)
    assert starts_of(PeftModel.from_pretrained(build(LLAMA), tmp_path)) == first
    models[1].load_adapter(tmp_path, "default")  # a run that goes on: the words drawn before do not count any more
    assert starts_of(models[1]) == first
    set_peft_model_state_dict(models[1], get_peft_model_state_dict(models[0]))
    assert starts_of(models[1]) == [None] * 4
    assert "is not recorded" in inspect_adapter(models[1]).start


def test_starts_that_are_no_words(tmp_path):
    assert starts_of(get_peft_model(build(LLAMA), config(LLAMA, prompt_tuning_init="RANDOM"))) == [None] * 4
    tuned = get_peft_model(build(LLAMA), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert starts_of(from_prompt_tuning(tuned, prompt_tuning_init="SAMPLE_VOCAB")) == [None] * 4
    model = get_peft_model(build(LLAMA), config(LLAMA))
    model.base_model.add_weighted_adapter(["default"], [0.5], "sum", "cat")
    assert starts_of(model, "sum") == [None] * 4
    for start in ([5, 6, 7], [0, 1, 2, VOCAB], [0, 1, 2, -1]):  # another base's, or somebody's
        model.base_model.layer.record_start("default", start)
        assert starts_of(model, "default") == [None] * 4
    with pytest.raises(ValueError, match="`prompt_start` must be a list of ids, got 'a'"):
        config(LLAMA, prompt_start="a")


def test_the_start_is_shown_on_the_page():
    model = get_peft_model(build(LLAMA), config(LLAMA))
    found = inspect_adapter(model, tokenizer_of(LLAMA))
    text = Page(inspection_page(found)).text
    assert "started from" in text
    for token in found.virtual_tokens:
        assert f"{shown(token.started_from)}{token.started_from.value:.3f}" in text
    random = adapted(LLAMA, prompt_tuning_init="RANDOM")[0]
    assert "started from no words" in Page(inspection_page(inspect_adapter(random))).text
