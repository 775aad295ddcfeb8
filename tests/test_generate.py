"""generate(): every mode of decoding against three passes over the prompt and plain steps after it.

The reference shares nothing with the hooks on the backbone but the three passes: it fills a cache by them, drops the last
prompt token from it again, and lets transformers decode from there with the causal adapter of an ordinary PEFT model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import torch
from families import BY_ID
from test_families import attach, randomize
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tests.tiny import base_model, bitune_model, lora

FAMILIES = ("llama", "gemma", "gemma3_text", "phi", "qwen3", "mistral")
PROMPTS = (7, 2)
WIDTH, NEW = max(PROMPTS), 4
COMMON = dict(max_new_tokens=NEW, pad_token_id=0)
VOCAB = 101


class RoundedLayer(QuantizedLayer):
    """A quantized layer of the cache that needs no library: 16 values per row."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 7  # padding is zero
        return (tensor / scale).round(), scale

    def _dequantize(self, q_tensor):
        return q_tensor[0] * q_tensor[1]


def quantized(model):
    return Cache(layers=[RoundedLayer(residual_length=2) for _ in range(model.config.num_hidden_layers)])


@dataclass(frozen=True)
class Mode:
    """A way to call generate().

    Attributes:
        options: of both calls, ours and the reference's.
        ours: options of our call alone, which must make no difference; called with the model.
        samples: draws random numbers, so that a batch can't give the tokens of its samples one by one.
        single: transformers takes no batch.
        merged: inside ``merged_decoding``.
        cache: makes the cache of our call; the reference gets the same kind.
        lossy: that cache changes the tokens.
    """

    id: str
    options: dict = field(default_factory=dict)
    ours: Callable[[object], dict] = lambda model: {}
    samples: bool = False
    single: bool = False
    merged: bool = False
    cache: Callable[[object], Cache] | None = None
    lossy: bool = False


SAMPLE = dict(do_sample=True, temperature=2.0, top_k=20)
STATIC = dict(cache_implementation="static")
MODES = (
    Mode("greedy"),
    Mode("greedy_merged", merged=True),
    Mode("stopped", dict(eos_token_id=list(range(4, VOCAB, 4)), repetition_penalty=1.3)),
    Mode("logits_to_keep", ours=lambda model: dict(logits_to_keep=2)),
    Mode("sample", SAMPLE, samples=True),
    Mode("sample_returned", SAMPLE | dict(num_return_sequences=3), samples=True, merged=True),
    Mode("beams", dict(num_beams=3)),
    Mode("beams_returned_merged", dict(num_beams=4, num_return_sequences=2), merged=True),
    Mode("beam_sample", SAMPLE | dict(num_beams=2), samples=True),
    Mode("static", ours=lambda model: STATIC),
    Mode("static_beams", dict(num_beams=3), ours=lambda model: STATIC),
    Mode("dynamic_given", dict(num_beams=2), cache=lambda model: DynamicCache(config=model.config)),
    Mode("static_given", cache=lambda model: StaticCache(config=model.config, max_cache_len=20)),
    Mode("quantized", cache=quantized, lossy=True),
    Mode("lookup", ours=lambda model: dict(prompt_lookup_num_tokens=3, max_matching_ngram_size=1), single=True),
    Mode("assistant", ours=lambda model: dict(assistant_model=model.assistant), single=True),
    Mode("bitune_assistant", ours=lambda model: dict(assistant_model=model), single=True),
    Mode("early_exit", ours=lambda model: dict(assistant_early_exit=2), single=True),
)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    model = attach(BY_ID[request.param], True)
    randomize(model)
    model.assistant = BY_ID[request.param].build(seed=3)
    return model.eval()


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Padded on the left, with tokens that come again, so that lookups find candidates."""
    ids = torch.randint(1, 12, (len(PROMPTS), WIDTH), generator=torch.Generator().manual_seed(3))
    mask = torch.stack([(torch.arange(WIDTH) >= WIDTH - p).long() for p in PROMPTS])
    return ids * mask, mask


@dataclass
class Answer:
    """tokens int64 [rows, at most NEW] and the logits behind them, [rows or beams, NEW, vocab].

    Random models repeat themselves, so that tokens can agree by chance; the logits can't.
    """

    tokens: torch.Tensor
    logits: torch.Tensor

    def check(self, expected: Answer) -> None:
        assert self.tokens.tolist() == expected.tokens.tolist()
        torch.testing.assert_close(self.logits, expected.logits, atol=2e-5, rtol=2e-5)

    @classmethod
    def join(cls, answers: list[Answer]) -> Answer:
        """Answers that ended before others are padded, as in a batch."""
        steps = max(x.logits.shape[1] for x in answers)
        tokens = [torch.nn.functional.pad(x.tokens, (0, steps - x.tokens.shape[1])) for x in answers]
        logits = [torch.nn.functional.pad(x.logits, (0, 0, 0, steps - x.logits.shape[1])) for x in answers]
        return cls(torch.cat(tokens), torch.cat(logits))


def generate(model, ids, **options) -> Answer:
    torch.manual_seed(5)
    out = model.generate(input_ids=ids, **COMMON, **options, output_logits=True, return_dict_in_generate=True)
    tokens, logits = out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)
    if "eos_token_id" in options:  # transformers goes on computing rows that have ended
        logits = logits * tokens.ne(0)[..., None]
    return Answer(tokens, logits)


def by_hand(model, ids, mode: Mode) -> Answer:
    """The reference, for one prompt [1, seq]."""
    options = mode.options
    cache = mode.cache(model) if mode.lossy else DynamicCache()
    with torch.no_grad(), model.use_schedule(use_fused=False):
        out = model(input_ids=ids, past_key_values=cache)
    if not mode.lossy:
        cache.crop(-1) if ids.shape[1] > 1 else cache.layers.clear()
        cache.batch_repeat_interleave(max(options.get("num_beams", 1), options.get("num_return_sequences", 1)))
        with model.disable_bitune():
            return generate(model, ids, past_key_values=cache, **options)
    logits, tokens = [], []  # such a cache can't drop a token again: greedy steps
    with torch.no_grad(), model.disable_bitune():
        for _ in range(NEW):
            logits.append(out.logits[:, -1:])
            tokens.append(logits[-1].argmax(-1))
            out = model(input_ids=tokens[-1], past_key_values=cache)
    return Answer(torch.cat(tokens, 1), torch.cat(logits, 1))


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.id)
@pytest.mark.filterwarnings("ignore")
def test_every_mode_gives_the_tokens_of_three_passes(model, mode):
    ids, mask = prompts()
    singles = [ids[b : b + 1, WIDTH - p :] for b, p in enumerate(PROMPTS)]
    one_by_one = mode.single or mode.samples
    expected = [by_hand(model, x, mode) for x in (singles[:1] if one_by_one else singles)]

    def ours(ids, **options):
        cache = {} if mode.cache is None else {"past_key_values": mode.cache(model)}
        with model.merged_decoding() if mode.merged else nullcontext():
            return generate(model, ids, **mode.options, **mode.ours(model), **cache, **options)

    batches = []
    for fused in (True, False):
        with model.use_schedule(use_fused=fused):
            if one_by_one:
                ours(singles[0]).check(expected[0])
            if not mode.single:
                batches.append(ours(ids, attention_mask=mask))
    if mode.samples:  # a batch draws other numbers than its samples one by one
        batches[0].check(batches[1])
    else:
        for batch in batches:
            batch.check(Answer.join(expected))
