"""A Bitune model for engines that know nothing of it."""

from __future__ import annotations

from pathlib import Path

from ..folders import check_new, whole_folder
from .adapters import CAUSAL, CausalMerge
from .model import BituneModel

_CARD = """
`{base_model}` with the adapter "causal" of a [Bitune](https://arxiv.org/abs/2405.14862) model merged. It decodes the
key/value cache that the Bitune model in the folder `bitune` has made of a prompt. An engine that prefills by itself
reads prompts causally, and answers as another, untrained model would.
"""


def export_merged(model: BituneModel, folder: str | Path) -> None:
    """Write the base model with the adapter "causal" merged, and beside it the Bitune model's own files.

    ``folder``, new or empty, then holds an ordinary causal LM, which decodes what a Bitune prefill has mixed: any
    engine can go on from the cache of ``model(input_ids, logits_to_keep=1)``. It can't read prompts in both directions.
    ``folder/bitune`` is the folder of ``save_pretrained``, for the base model that was adapted. ``model`` is unloaded,
    and no Bitune model any more.

    Raises:
        TypeError, ValueError: naming what was expected and what came; the model is then as it was.
    """
    if not isinstance(model, BituneModel):
        raise TypeError(f"model: expected a BituneModel, got {type(model).__name__}")
    folder = Path(folder)
    check_new("folder", folder)
    CausalMerge(model)  # refuses weights that can't be merged
    with whole_folder(folder) as unfinished:
        model.save_pretrained(unfinished / "bitune")
        model._detach()
        merged = model.base_model.merge_and_unload(adapter_names=[CAUSAL])
        merged.generation_config = model.generation_config  # with the end tokens of training
        merged.save_pretrained(unfinished)
        card = _CARD.format(base_model=merged.config._name_or_path or "A causal language model")
        (unfinished / "README.md").write_text(card.lstrip())
