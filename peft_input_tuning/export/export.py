"""From an adapter to a plain checkpoint that costs nothing where it is served and needs neither PEFT nor this package.

    adapter + base ──► fold the table (`state.py`) ──► tokenizer with the prompt (`tokenizer.py`)
                   ──► a folder beside the target ──► reload and compare ──► move into place

The folder loads with `AutoModel*.from_pretrained` and `AutoTokenizer.from_pretrained`. The virtual tokens are words of
the vocabulary that the tokenizer puts in front; the input-adapter is in the embedding table; the head is untied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationMethod

from ..base_weights import is_quantized
from ..layer import InputTuningLayer, named_layer
from ..merging import Progress
from ..output.folders import unfinished_folder
from ..virtual_tokens.subclass import class_of
from .card import write_export_card
from .plain_model import empty_model, suppress, vocabulary_names
from .report import ExportReport
from .state import folded_table, grow_vocabulary, plain_state_dict
from .tokenizer import tokenizer_with_prompt

CHECKED_ROWS, CHECKED_LENGTH = 3, 12
# Of the largest output; what rounding makes of random weights, which are worse than trained ones.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def export_model(
    model: nn.Module,
    output_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter_name: str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes an adapter and its base model as one plain checkpoint.

    Args:
        model: a `PeftModel`, or a model of transformers with the adapter. It is not changed.
        output_dir: a folder that does not exist, or is empty.
        tokenizer: the base model's; None writes none, and the ids of the virtual tokens must be put in front by hand.
        adapter_name: the adapter; None is the active one.
        dtype: of the checkpoint; None is the base model's.
        progress: called with (rows done, rows in all) while the embedding table is folded.

    Returns:
        The ids of the virtual tokens, and the largest difference found when the folder was loaded again.

    Raises:
        ValueError: a model or an adapter that a plain checkpoint cannot hold, or a target that is in use; nothing is
            written.
        RuntimeError: the reloaded model gives other outputs; nothing is left at the target.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    path, layer = named_layer(base)
    name = _adapter_name(layer, adapter_name)
    layer.check_foldable(name)
    count = layer.prompt_length(name)
    _refuse_what_no_checkpoint_holds(base, layer, count)
    words = layer.num_embeddings
    exported_tokenizer, virtual_ids = None, list(range(words, words + count))
    if tokenizer is not None:
        exported_tokenizer, virtual_ids = tokenizer_with_prompt(tokenizer, count)
    rows = max([words, *(i + 1 for i in virtual_ids)])
    dtype = dtype or layer.weight.dtype

    with unfinished_folder("`output_dir`", output_dir, last="config.json") as scratch:
        state = plain_state_dict(base, name)
        table_name = f"{path}.weight"
        with _only_active(base, name):  # the head that it asks for may be one of `modules_to_save`
            vocabulary = vocabulary_names(base, state, table_name)
        if rows > words or virtual_ids:
            grow_vocabulary(state, vocabulary, rows, virtual_ids)
        state[table_name] = folded_table(layer, name, virtual_ids, rows, dtype, progress)
        plain = empty_model(base, rows)
        if plain.can_generate() and virtual_ids:
            suppress(plain.generation_config, virtual_ids)
        plain.to(dtype).save_pretrained(scratch, state_dict={key: _cast(value, dtype) for key, value in state.items()})
        del state
        if exported_tokenizer is not None:
            exported_tokenizer.save_pretrained(scratch)
        difference, largest = _compare(base, layer, name, scratch, virtual_ids, dtype)
        report = ExportReport(Path(output_dir), name, tuple(virtual_ids), difference, largest)
        write_export_card(scratch, base, report, has_tokenizer=exported_tokenizer is not None)
    return report


def _adapter_name(layer: InputTuningLayer, wanted: str | None) -> str:
    name = wanted or layer.enabled_adapter
    if name is None or not layer.has_adapter(name):
        raise ValueError(
            f"`adapter_name` is {wanted!r}, but no such adapter is there. Adapters: {layer.adapter_names}."
        )
    return name


def _refuse_what_no_checkpoint_holds(base: nn.Module, layer: InputTuningLayer, count: int) -> None:
    # transformers calls a model from a GGUF file quantized, but it has dequantized the weights while reading them.
    quantized = getattr(base, "is_quantized", False) and base.quantization_method != QuantizationMethod.GGUF
    if quantized or any(is_quantized(weight) for weight in base.parameters()):
        raise ValueError(
            "`model` is quantized: its weights are not those of a plain checkpoint. Load the adapter on the base "
            "model in bfloat16 or float32, export that, and quantize the result."
        )
    away = next((key for key, weight in base.named_parameters() if weight.is_meta), None)
    if away is not None:
        raise ValueError(
            f"`model` is offloaded: `{away}` is not in memory. Load the base model without offloading to export it."
        )
    refuse_words_for_prompt(base, count)


def refuse_words_for_prompt(base: nn.Module, count: int) -> None:
    """Raises ValueError for models in which virtual tokens cannot be words of the input like others."""
    if not count:
        return
    reads_first = getattr(base.base_model, "pooler", None) is not None
    if reads_first or type(base).__name__ == "RobertaForSequenceClassification":
        why = "whose head or pooler reads the first place of a row, where a plain checkpoint has a virtual token"
    elif base.config.is_encoder_decoder and (hasattr(base, "classification_head") or hasattr(base, "qa_outputs")):
        why = "which shows its input to the decoder too, virtual tokens and all in a plain checkpoint"
    else:
        return
    raise ValueError(
        f"`model` is a {type(base).__name__}, {why}. Export an adapter with num_virtual_tokens=0, or keep the adapter."
    )


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@contextmanager
def _only_active(base: nn.Module, name: str) -> Iterator[None]:
    """Puts a model in eval mode with one adapter and its `modules_to_save`, and back as it was.

    Leans on private names of PEFT (since 0.17): `set_adapter` would change what requires gradients.
    """
    wrappers = [m for m in base.modules() if isinstance(m, InputTuningLayer | AuxiliaryTrainingWrapper)]
    before = [(m, m._active_adapter, m._disable_adapters) for m in wrappers]
    modes = [(module, module.training) for module in base.modules()]
    try:
        base.eval()
        for module in wrappers:
            module._active_adapter, module._disable_adapters = [name], False
        yield
    finally:
        for module, active, disabled in before:
            module._active_adapter, module._disable_adapters = active, disabled
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def _compare(
    base: nn.Module, layer: InputTuningLayer, name: str, folder: Path, virtual_ids: list[int], dtype: torch.dtype
) -> tuple[float, float]:
    """Largest difference between the adapted model and the folder, loaded again, and the largest output."""
    plain = class_of(base).from_pretrained(folder, dtype=dtype).eval()
    device = layer.weight.device
    generator = torch.Generator().manual_seed(0)
    pad, end = (getattr(base.config, name, None) for name in ("pad_token_id", "eos_token_id"))
    special = [token for token in (pad, end) if isinstance(token, int)]
    taken = {*special, *virtual_ids}  # where the tokenizer has fewer words than the table, these are rows of the table
    words = [token for token in range(min(layer.num_embeddings, 10_000)) if token not in taken]
    ids = torch.tensor(words)[torch.randint(0, len(words), (CHECKED_ROWS, CHECKED_LENGTH), generator=generator)]
    if base.config.is_encoder_decoder and isinstance(end, int):
        ids[:, -1] = end  # T5 and BART classify by the place of the end token
    front = torch.tensor(virtual_ids, dtype=ids.dtype).expand(CHECKED_ROWS, -1)
    more = {}
    if base.config.is_encoder_decoder and not hasattr(base, "classification_head") and not hasattr(base, "qa_outputs"):
        more["decoder_input_ids"] = ids[:, :4]
    with _only_active(base, name):
        want = base(input_ids=ids.to(device), **{key: value.to(device) for key, value in more.items()})
    got = plain(input_ids=torch.cat([front, ids], dim=1), **more)
    key = next(key for key in ("logits", "start_logits", "last_hidden_state") if key in want)
    wanted, gotten = want[key].float().cpu(), got[key].float()
    if not base.config.is_encoder_decoder and gotten.ndim > 2 and gotten.shape[1] != wanted.shape[1]:
        gotten = gotten[:, len(virtual_ids) :]
    elif key == "start_logits":
        gotten = gotten[:, -wanted.shape[1] :]
    gotten = gotten[..., : wanted.shape[-1]] if gotten.ndim > 2 else gotten
    if key == "logits" and wanted.shape[-1] == layer.num_embeddings:  # nor are those rows words of the output any more
        for logits in (wanted, gotten):
            logits[..., [token for token in virtual_ids if token < layer.num_embeddings]] = 0.0
    difference, largest = float((gotten - wanted).abs().max()), float(wanted.abs().max())
    coarsest = max(TOLERANCE.get(one, TOLERANCE[torch.float16]) for one in (dtype, layer.weight.dtype))
    allowed = coarsest * max(1.0, largest)
    if not difference <= allowed:
        raise RuntimeError(
            f"The exported model gives other outputs than the adapter: they differ by up to {difference:.2g}, and "
            f"{allowed:.2g} is allowed for {dtype} from {layer.weight.dtype}. Nothing was left at the target. If "
            "`dtype` is narrower than the base model's, try the base model's."
        )
    return difference, largest
