"""BituneModel: a PEFT model whose prompts run through both streams."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig, PeftModel, PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import pad
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from ..config import CONFIG_NAME, BituneConfig
from ..folders import existing
from ..mixing import MixingCoefficients
from ..plan import SegmentPlan
from .adapters import (
    BIDIR,
    CAUSAL,
    CausalMerge,
    adapter_configs,
    base_module,
    refuse_unsupported,
    restrict,
    route_rows,
)
from .backbone import BackboneHooks
from .generate import prepare
from .labels import PACKED, check_inputs, pack_labels, plan_batch, refuse_further_inputs
from .loss import chunked_loss, loss_per_sample
from .passes import evaluating, one_at_a_time
from .probe import find_structure
from .self_test import check_chunked_loss, check_one_pass
from .structure import Structure, gathers
from .weights import check_accelerate, check_weights

_CARD = """
Adapters and mixing coefficients of [Bitune](https://arxiv.org/abs/2405.14862) for `{base_model}`, which
reads its prompts in both directions with them. bitune_kernels loads them; PEFT alone would read prompts causally.

```python
from transformers import AutoModelForCausalLM

from bitune_kernels import BituneModel

base_model = AutoModelForCausalLM.from_pretrained("{base_model}")
model = BituneModel.from_pretrained(base_model, "this folder")
```
"""


def get_bitune_model(
    base_model: nn.Module,
    config: BituneConfig | None = None,
    *,
    self_test: bool = True,
    autocast_adapter_dtype: bool = True,
) -> BituneModel:
    """Turn a transformers causal LM into a Bitune model, ready to be trained.

    Args:
        base_model: a decoder in which attention alone looks from token to token, by transformers' attention interface,
            and positions begin at 0. Its weights are frozen and shared, not copied; its modules get adapters as with
            ``peft.get_peft_model``.
        config: the method and the adapters; default: the paper's.
        self_test: on a few tokens compare one pass with three passes (unless ``use_fused`` is False), and the loss in
            chunks with the whole one, and refuse the model where they disagree.
        autocast_adapter_dtype: as in PEFT: adapters of a float16 or bfloat16 model are kept in float32.

    Raises:
        ValueError, TypeError: naming what was expected and what came; ``base_model`` is left as it was.
    """
    config = BituneConfig() if config is None else config
    if not isinstance(config, BituneConfig):
        raise TypeError(f"config: expected a BituneConfig, got {type(config).__name__}")
    if not isinstance(base_model, nn.Module):
        raise TypeError(f"base_model: expected a transformers causal LM, got {type(base_model).__name__}")
    attached = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    if isinstance(base_model, PeftModel) or any(isinstance(m, attached) for m in base_model.modules()):
        raise ValueError(
            f"base_model: expected a plain causal LM, got {type(base_model).__name__} that has adapters already; "
            "merge or unload them first"
        )
    if config.peft is not None:
        refuse_unsupported(config.peft, config.variant, config.separate_adapters)
    check_weights(base_model)
    structure = find_structure(base_model)
    config.stream_masks(structure.num_layers)  # skip_bidir against the number of layers
    frozen = [(p, p.requires_grad) for p in base_model.parameters()]
    modules, attributes = set(base_model.modules()), set(vars(base_model))
    model = None
    try:
        model = BituneModel(base_model, config, structure, autocast_adapter_dtype=autocast_adapter_dtype)
        model._train_adapters(True)
        if self_test and config.use_fused:
            check_one_pass(model)
        if self_test and config.loss_chunk_rows is not None:
            check_chunked_loss(model)
    except BaseException:  # a KeyboardInterrupt too
        _restore(base_model, model, modules, frozen)
        for name in set(vars(base_model)) - attributes:  # PEFT's record of its adapters
            delattr(base_model, name)
        raise
    return model


def _restore(base_model, model, modules, frozen) -> None:
    # Adapters stand between a parent and its original child: put the child back.
    if model is not None:
        model._detach()
    for parent in [m for m in base_model.modules() if m in modules]:
        for name, child in parent.named_children():
            while child not in modules:
                child = getattr(child, "base_layer", None) or child.original_module
            setattr(parent, name, child)
    for parameter, requires_grad in frozen:
        parameter.requires_grad_(requires_grad)


_SCALES = ("lora_alpha", "alpha_pattern", "use_rslora")  # what weights of LoRA mean, beside their shapes


def _refuse_others(folder: str | Path, own: dict, saved: dict) -> None:
    """Raise ValueError where a folder's weights are of a model with other fields."""
    for name, value in own.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{folder}: expected weights of a model with {name}={value!r}, as this one is, got "
                f"{saved.get(name)!r}; BituneModel.from_pretrained makes the model of a folder"
            )


def _refuse_unequal_heads(config: BituneConfig, structure: Structure) -> None:
    of_weights = {"k": (structure.num_heads_kv, "key/value"), "beta": (structure.num_heads_q, "query")}
    for heads, kind in (of_weights[name] for name in of_weights if name in config.mixed):
        if config.mixing_granularity == "head" and len(set(heads)) > 1:
            raise ValueError(
                f"mixing_granularity: expected 'layer' or 'global' for layers with different numbers of {kind} heads "
                f"({sorted(set(heads))}), got 'head'"
            )


def check_streams_on(model) -> None:
    """Refuse what isn't a Bitune model, or is one that is an ordinary model now (TypeError, ValueError)."""
    if not isinstance(model, BituneModel):
        raise TypeError(f"model: expected a BituneModel, got {type(model).__name__}")
    if not model._hooks.enabled:
        raise ValueError(
            "model: expected its streams to be on, got a model inside of disable_bitune or disable_adapter"
        )


@contextmanager
def _trainable_kept(model: nn.Module):
    """Behind it the same parameters are trained as before: PEFT freezes all but those of the adapter it activates."""
    trainable = [(name, p, p.requires_grad) for name, p in model.named_parameters()]
    try:
        yield
    finally:
        # a call in between may leave whole parameters in the place of those that FSDP2 shards
        present = dict(model.named_parameters())
        for name, parameter, requires_grad in trainable:
            for p in (parameter, present[name]):
                p.requires_grad_(requires_grad)


class BituneModel(PeftModelForCausalLM):
    """A PEFT model with the adapters "causal" and (for most variants) "bidir", and trained mixing coefficients.

    Made by ``get_bitune_model`` or ``BituneModel.from_pretrained``. Trainers, ``generate()``, ``save_pretrained()``
    and ``disable_adapter()`` work as for any PEFT model.
    """

    def __init__(
        self, base_model: nn.Module, config: BituneConfig, structure: Structure, autocast_adapter_dtype: bool = True
    ):
        causal, bidir = adapter_configs(config.peft, base_model)
        super().__init__(base_model, causal, adapter_name=CAUSAL, autocast_adapter_dtype=autocast_adapter_dtype)
        if config.doubles_rows:
            if any(p.exit is None for p in structure.projections):
                raise ValueError(
                    f"variant: expected another one than {config.variant!r} for a family without a module behind its "
                    "attention function"
                )
            bidir = restrict(bidir, base_model, set().union(*(p.before for p in structure.projections)))
        if config.separate_adapters:
            super().add_adapter(BIDIR, bidir, autocast_adapter_dtype=autocast_adapter_dtype)
        device = next(structure.backbone.parameters()).device
        self.mixing = None
        if config.mixed:
            _refuse_unequal_heads(config, structure)
            values = zip(structure.num_heads_kv, structure.value_dims, strict=True)
            self.mixing = MixingCoefficients.from_config(
                config,
                structure.num_layers,
                structure.num_heads_kv[0],
                num_heads_q=structure.num_heads_q[0],
                gate_features=[2 * heads * dim for heads, dim in values] if config.dynamic_mixing else None,
                device=device,
            )
        structure.adapted = route_rows(base_model, structure.attentions)
        self._hooks = BackboneHooks(structure, config, self.mixing, base_model.get_output_embeddings())
        if config.loss == "sample":
            # The Trainer would hand on the number of tokens in all accumulated batches, and divide by nothing; so it
            # divides by the number of batches, as for every model that says this.
            base_model.accepts_loss_kwargs = False

    def _detach(self) -> None:
        self._hooks.remove()
        if self.bitune_config.loss == "sample":
            del self.get_base_model().accepts_loss_kwargs

    @property
    def bitune_config(self) -> BituneConfig:
        """The method, its adapters and its schedule."""
        return self._hooks.config

    def _train_adapters(self, trainable: bool) -> None:
        # PEFT trains one adapter at a time; both streams and the thetas learn together here. What the bidirectional
        # stream never runs through (the last layer behind its keys and values) is frozen, so that distributed
        # training meets no parameter without a gradient.
        for name in self.peft_config:
            super().set_requires_grad(name, trainable)
        if self.mixing is not None:
            self.mixing.requires_grad_(trainable)
            for layer, source in enumerate(self._hooks.structure.kv_layers):
                if self.mixing.gate is not None and layer != source:  # it takes the other layer's mix
                    self.mixing.gate[layer].requires_grad_(False)
        if not trainable or BIDIR not in self.peft_config:
            return
        used, unused = set(), set()  # some tuners have parameters that several layers share
        for module in self._hooks.structure.adapted:
            own = {p for name, p in module.named_parameters() if BIDIR in name.split(".")}
            leaves = {m for m in base_module(module).modules() if not any(True for _ in m.children())}
            (unused if leaves <= self._hooks.structure.unused_bidir else used).update(own)
        for parameter in unused - used:
            parameter.requires_grad_(False)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Only "causal" can be active: it decodes, and each stream finds its own adapter by itself."""
        if adapter_name != CAUSAL:
            raise ValueError(f"adapter_name: expected {CAUSAL!r} (streams choose their adapters), got {adapter_name!r}")
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._train_adapters(not inference_mode)

    def add_adapter(self, adapter_name: str, *args, **kwargs) -> None:
        """Refused: no stream would run through another adapter."""
        raise ValueError(f"adapter_name: expected those of the streams and no other, got {adapter_name!r}")

    def add_weighted_adapter(self, adapters, weights, adapter_name: str, **kwargs) -> None:
        """Refused, as ``add_adapter``."""
        self.add_adapter(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Refused: each adapter belongs to a stream; ``unload()`` removes all."""
        raise ValueError(
            f"adapter_name: expected the streams to keep theirs (unload() removes all), got {adapter_name!r}"
        )

    @contextmanager
    def disable_adapter(self):
        """Inside, the model is the base model: one causal stream, no adapter (a reference model, for example)."""
        with _trainable_kept(self), self._hooks.unmerged(), super().disable_adapter(), self._hooks.disabled():
            yield

    @contextmanager
    def disable_bitune(self):
        """Inside, this is an ordinary PEFT model with the adapter "causal": one causal stream, nothing mixed."""
        with self._hooks.disabled():
            yield

    @contextmanager
    def use_schedule(self, *, use_fused: bool | None = None, backend: str | None = None):
        """Inside, passes run by this schedule and on this backend: the same function, another way.

        The self-test of ``get_bitune_model`` covers the one-pass schedule only if the model was made with it.

        Args:
            use_fused, backend: as in ``BituneConfig``; None: as they are.
        """
        before = self.bitune_config
        changes = {"use_fused": use_fused, "backend": backend}
        self._hooks.config = replace(before, **{name: x for name, x in changes.items() if x is not None})
        try:
            yield
        finally:
            self._hooks.config = before

    def unload(self) -> nn.Module:
        """Remove adapters and hooks; returns the base model."""
        self._detach()
        for parent in list(self.base_model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, ModulesToSaveWrapper):  # PEFT would leave the trained copy there
                    setattr(parent, name, child.original_module)
        return self.base_model.unload()

    def merge_and_unload(self, *args, **kwargs):
        """Refused: what is left would read no prompt as a Bitune model does."""
        raise ValueError(
            "merge_and_unload: expected another call, since what is left reads no prompt as a Bitune model does: "
            "unload() for the base model, export_merged() for one that decodes from a Bitune prefill"
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        prompt_lengths: torch.Tensor | Sequence[int] | None = None,
        inputs_embeds: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ):
        """One training or evaluation step, or (without ``labels`` and ``prompt_lengths``) prefill and decoding.

        Args:
            input_ids: int64 [batch, seq], each row prompt then answer, padded left or right; or several samples
                packed into a row.
            attention_mask: [batch, seq], nonzero at real tokens. None: no padding.
            labels: integers [batch, seq], -100 at the prompt and at padding; the loss is the mean over answer tokens
                as in transformers, or over samples (``BituneConfig.loss``). The prompt of a sample is what stands
                before its first label that is not -100. A sample may lack an answer, and then trains nothing.
            prompt_lengths: prompt tokens of each sample, 1 to its real tokens; instead of, or beside, ``labels``.
            inputs_embeds: [batch, seq, hidden] instead of ``input_ids``.
            kwargs: of the causal LM's forward. With ``position_ids`` [batch, seq] a sample begins wherever they are
                0, as ``DataCollatorWithFlattening`` and TRL's packing make them; such a sample needs two tokens of
                prompt unless ``prompt_lengths`` are given.

        Returns:
            The causal LM's output. ``logits`` [batch, seq, vocab] are computed for the last prompt token and the
            answer, and zero elsewhere; with labels in training mode and ``loss_chunk_rows`` there are none. Without
            labels and lengths every token is prompt, and only the last one has logits; a warning says so, unless
            ``logits_to_keep=1`` spares the zeros.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came, before anything is computed.
        """
        if kwargs.get("adapter_names") is not None and self._hooks.enabled:
            raise ValueError(
                f"adapter_names: expected None, since each stream has its own adapter, got {kwargs['adapter_names']}"
            )
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if self._hooks.enabled and isinstance(tokens, torch.Tensor):
            refuse_further_inputs(kwargs, tokens.shape[:2])
        common = dict(attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        if (labels is None and prompt_lengths is None) or not self._hooks.enabled:
            # generate() calls the causal LM itself: a logits processor that calls this one has a prompt of its own
            with one_at_a_time, self._hooks.generating(None):
                return super().forward(input_ids, labels=labels, return_dict=return_dict, **common)
        if self.training:
            check_accelerate()
        check_inputs(input_ids, inputs_embeds)
        if not isinstance(kwargs.get("logits_to_keep", 0), int) or kwargs.get("logits_to_keep", 0):
            raise ValueError("logits_to_keep: expected 0 with labels or prompt_lengths, which already choose the rows")
        if kwargs.get("shift_labels") is not None:
            raise ValueError("shift_labels: expected None (labels are shifted by the model), got a tensor")
        packed = {name: common.pop(name) for name in PACKED if name in common}
        plan = plan_batch(
            tokens,
            labels,
            prompt_lengths,
            attention_mask=attention_mask,
            position_ids=kwargs.get("position_ids"),
            packed=packed,
            config=self.bitune_config,
        )
        if labels is not None:
            of_trainer = {name: kwargs.get(name) for name in ("num_items_in_batch", "fused_lm_head")}
            labels = pack_labels(labels, prompt_lengths, plan, self.bitune_config, **of_trainer)
        per_sample = labels is not None and self.bitune_config.loss == "sample"
        # TRL's trainers ask for their own fused head, which reads the backbone's rows and never has all logits either.
        chunk_rows = None if kwargs.get("fused_lm_head") else self.bitune_config.loss_chunk_rows
        with one_at_a_time:  # the mode is this thread's then, and not that of one which evaluates
            in_chunks = labels is not None and self.training and chunk_rows is not None
        if in_chunks:
            out = self._forward_in_chunks(plan, labels, chunk_rows, input_ids, common)
        else:
            with self._hooks.request(plan), loss_per_sample(self.get_base_model(), plan, per_sample):
                out = super().forward(input_ids, labels=labels, return_dict=True, **common)
            if getattr(out, "logits", None) is not None:
                out.logits = plan.unpack_answers(out.logits[0])
            for name, x in out.items() if kwargs.get("fused_lm_head") else ():
                if isinstance(x, torch.Tensor) and x.ndim == 2:  # of TRL's head, [1, A - 1]: of each row but the last
                    out[name] = plan.unpack_answers(pad(x[0], (0, 1)))[:, :-1]
        return out if return_dict is not False else out.to_tuple()

    def _forward_in_chunks(self, plan: SegmentPlan, labels: torch.Tensor, chunk_rows: int, input_ids, common: dict):
        # labels [1, A]. The causal LM runs as ever, but over the first answer row; its output has neither loss nor
        # logits of the others.
        with self._hooks.request(plan, holds=True) as request:
            out = super().forward(input_ids, return_dict=True, **common)
        tokens = {"attention_mask", "inputs_embeds", "position_ids", "past_key_values", "cache_position", "use_cache"}
        loss = chunked_loss(
            self.get_base_model(),
            self._hooks.structure.backbone,
            type(request.output),
            request.output.last_hidden_state[0],
            labels[0],
            chunk_rows,
            sample_lengths=plan.answer_lengths if self.bitune_config.loss == "sample" else None,
            **{name: x for name, x in common.items() if name not in tokens},
        )
        return type(out)(**{**out, "loss": loss, "logits": None})

    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, **kwargs):
        """``generate()`` of transformers: both streams prefill the prompt, answers are decoded causally.

        Prompts that repeat, as those of beams and returned sequences do, are prefilled once. See ``merged_decoding``
        for decoding without the cost of the adapter.

        Raises:
            ValueError: for what can't be right, before any work: a prompt in chunks or without a cache, modes that may
                run the prompt again, a cache that holds tokens already or can't hold these, padding on the right.
        """
        arguments = {"inputs": inputs, "generation_config": generation_config}
        kwargs |= {name: x for name, x in arguments.items() if x is not None}
        with one_at_a_time:
            if not self._hooks.enabled:
                return super().generate(**kwargs)
            turn = self._hooks.turn
            run = prepare(self._hooks.structure, self.generation_config, inputs, generation_config, kwargs, turn)
            with self._hooks.generating(run):
                return super().generate(**kwargs)

    def end_answers_with(self, tokens: Iterable[int]) -> None:
        """Let ``generate()`` stop at these token ids too, here and where the model is loaded from its folder.

        Those of the base model stay: chat templates may end answers with another token than the one that ends texts.
        """
        own = self.generation_config.eos_token_id
        ends = {*tokens, *(own if isinstance(own, list) else [own])} - {None}
        self.generation_config = copy.copy(self.generation_config)  # the base model keeps its own
        self.generation_config.eos_token_id = sorted(ends)

    def generate_batch(self, *args, **kwargs):
        """Continuous batching is refused: it computes prompts in parts, and packed with other requests."""
        raise ValueError(
            "generate_batch: expected generate(), since continuous batching runs prompts in parts and bidirectional "
            "attention needs the whole prompt at once"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    @contextmanager
    def merged_decoding(self):
        """Inside, answers are decoded with the adapter "causal" merged into the base weights: at the speed of a model
        without adapters.

        Prompts are still run with both adapters: each pass over prompts takes the merge back and makes it again. The
        base weights are kept meanwhile, which costs the memory of every adapted weight once more, and are the same to
        the bit afterwards. Tokens are those of unmerged decoding up to the rounding of the merged weights. A loss from
        before a merge has no gradient any more (a RuntimeError of PyTorch's): call ``backward()`` first.

        Raises:
            ValueError: base weights that are quantized, sharded or tied to a module without the adapter.
        """
        with self._hooks.merged(CausalMerge(self)):
            yield

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Write both adapters (as PEFT does, a folder each), the mixing coefficients and the config.

        After ``end_answers_with`` the end tokens too, as ``generation_config.json``; a model card where there is none.
        A model sharded by FSDP2 needs ``state_dict``, the full one of ``get_model_state_dict``.
        """
        folder = os.fspath(save_directory)  # str(None) would be a folder of that name
        state, writes = kwargs.get("state_dict"), kwargs.get("is_main_process", True)
        if state is None and any(gathers(module) for module in self.modules()):
            raise ValueError("state_dict: expected a full one for a model sharded by fully_shard, got None")
        with self._hooks.structure.unwrapped():
            if writes and state is not None:  # PEFT would write what it finds of them, or nothing
                for name, _ in self.named_parameters():
                    own = name.startswith("mixing.") or not self.peft_config.keys().isdisjoint(name.split("."))
                    if own and name not in state:
                        raise ValueError(f"state_dict: expected the model's own names, got none that is {name}")
            super().save_pretrained(folder, **kwargs)
        if writes:
            self.bitune_config.save(folder)
            if "generation_config" in vars(self):  # else it is the base model's
                GenerationConfig(eos_token_id=self.generation_config.eos_token_id).save_pretrained(folder)
            # empty: the Trainer's load_best_model_at_end takes a folder without it for no checkpoint
            save_file({}, Path(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
            if self.mixing is not None:
                own = (state or {}).items()
                of_mixing = {n.removeprefix("mixing."): x for n, x in own if n.startswith("mixing.")}
                self.mixing.save(folder, of_mixing)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write ``README.md``, which says how the model is loaded, unless there is one already."""
        path = Path(output_dir, "README.md")
        if path.exists():
            return
        name = self.get_base_model().config._name_or_path
        data = ModelCardData(
            base_model=name or None,
            library_name="bitune_kernels",
            pipeline_tag="text-generation",
            tags=["bitune"],
        )
        ModelCard(f"---\n{data.to_yaml()}\n---\n{_CARD.format(base_model=name or 'path/to/its-base-model')}").save(path)

    def load_adapter(self, model_id: str | Path, adapter_name: str, is_trainable: bool = False, **kwargs):
        """Load one adapter's weights from its own folder, and with "causal" the mixing coefficients beside it.

        From a folder of ``save_pretrained`` everything is loaded, as the Trainer asks for the best checkpoint.

        Raises:
            ValueError: weights of a model that is made in another way: another variant or scale of LoRA, for example.
            FileNotFoundError: no such folder.
        """
        if Path(model_id, CONFIG_NAME).is_file():
            saved = BituneConfig.load(model_id, self.bitune_config.peft).to_dict()
            own = {x: y for x, y in self.bitune_config.to_dict().items() if x not in ("loss", "turns", "beta_init")}
            _refuse_others(model_id, own, saved)
            folders = {name: Path(model_id, name) for name in self.peft_config}
            *_, result = (self.load_adapter(path, name, is_trainable, **kwargs) for name, path in folders.items())
            return result
        if adapter_name not in self.peft_config:
            raise ValueError(f"adapter_name: expected one of {', '.join(self.peft_config)}, got {adapter_name!r}")
        if not Path(model_id).is_dir():  # PEFT would ask the Hub for a repository of that name
            raise FileNotFoundError(f"{model_id}: not found; expected a folder of the adapter {adapter_name!r}")
        if not any(Path(model_id, name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
            existing(model_id, SAFETENSORS_WEIGHTS_NAME)
        own = {name: getattr(self.peft_config[adapter_name], name, None) for name in _SCALES}
        _refuse_others(model_id, own, vars(PeftConfig.from_pretrained(str(model_id))))
        kwargs = {"autocast_adapter_dtype": False} | kwargs  # adapters keep the dtype that they have
        with self._hooks.structure.unwrapped(), _trainable_kept(self), evaluating(self):
            result = super().load_adapter(str(model_id), adapter_name, is_trainable=is_trainable, **kwargs)
        missing = set(result.missing_keys)
        if missing:  # some tuners name one tensor many times
            tensors = self.state_dict(keep_vars=True)
            found = {id(x) for name, x in tensors.items() if name not in missing}
            missing = {name for name in missing if id(tensors.get(name)) not in found}
        for what, names in (("unexpected weights", result.unexpected_keys), ("no weights for", sorted(missing))):
            if names:
                raise ValueError(f"{model_id}: {what} {', '.join(names[:3])}{', ...' if names[3:] else ''}")
        if adapter_name == CAUSAL and self.mixing is not None:
            self.mixing.load(Path(model_id).parent)
        return result

    @classmethod
    def from_pretrained(
        cls,
        base_model: nn.Module,
        folder: str | Path,
        *,
        is_trainable: bool = False,
        revision: str | None = None,
        self_test: bool = True,
        autocast_adapter_dtype: bool = True,
        **changes,
    ) -> BituneModel:
        """Load what ``save_pretrained`` wrote.

        Args:
            base_model: the causal LM that was adapted.
            folder: a local folder or the id of a repository on the Hugging Face Hub.
            is_trainable: keep training, instead of inference with everything frozen.
            revision: a branch, tag or commit of the repository.
            self_test, autocast_adapter_dtype: as in ``get_bitune_model``.
            changes: fields of BituneConfig, such as ``use_fused``, ``backend`` and ``loss_chunk_rows``, which say how a
                model runs and are not saved with it, or others to override.

        Raises:
            FileNotFoundError, ValueError, TypeError: naming what was expected and what came.
        """
        if unknown := sorted(changes.keys() - BituneConfig.__dataclass_fields__.keys()):
            raise TypeError(f"{unknown[0]}: expected a field of BituneConfig, got a keyword that is none")
        if not Path(folder).is_dir():
            from huggingface_hub import snapshot_download

            try:
                folder = snapshot_download(
                    str(folder), revision=revision, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.md"]
                )
            except (OSError, ValueError) as error:
                raise FileNotFoundError(
                    f"folder: expected one of save_pretrained or the id of a repository, got {folder}; {error}"
                ) from error
        for name in (CONFIG_NAME, CAUSAL):
            existing(folder, name)
        peft_config = PeftConfig.from_pretrained(str(Path(folder, CAUSAL)))
        config = BituneConfig.load(folder, peft_config, **changes)
        if config.separate_adapters:
            existing(folder, BIDIR)
        model = get_bitune_model(base_model, config, self_test=self_test, autocast_adapter_dtype=autocast_adapter_dtype)
        for name in model.peft_config:
            model.load_adapter(Path(folder, name), name)
        if Path(folder, GENERATION_CONFIG_NAME).is_file():
            model.end_answers_with(GenerationConfig.from_pretrained(folder).eos_token_id)
        model._train_adapters(is_trainable)
        return model.train(is_trainable)
