"""generate(): every mode of decoding against three passes over the prompt and plain steps after it.

The reference shares nothing with the hooks on the backbone but the three passes: it fills a cache by them, drops
the last prompt token from it again, and lets transformers decode from there with an ordinary PEFT model, which has the
causal adapter alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import torch
import transformers
import transformers.modeling_flash_attention_utils as flash_attention
from packaging.version import parse
from peft import IA3Config
from peft.tuners.lora import layer as lora_layer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.functional import scaled_dot_product_attention
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.generation.configuration_utils import GenerationMode

from tests.families import BY_ID
from tests.test_families import attach, randomize
from tests.tiny import base_model, bitune_model, lora, ragged_batch

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
        ours: options of our call alone, which must make no difference; called with the model and the prompts.
        samples: draws random numbers, so that a batch can't give the tokens of its samples one by one.
        single: transformers takes no batch.
        merged: inside ``merged_decoding``.
        cache: makes the cache of our call; the reference gets the same kind.
        lossy: that cache changes the tokens.
    """

    id: str
    options: dict = field(default_factory=dict)
    ours: Callable[[object, torch.Tensor], dict] = lambda model, ids: {}
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
    Mode("logits_to_keep", ours=lambda model, ids: dict(logits_to_keep=2)),
    Mode("embeds", ours=lambda model, ids: dict(inputs_embeds=model.get_input_embeddings()(ids))),
    Mode("sample", SAMPLE, samples=True),
    Mode("sample_returned", SAMPLE | dict(num_return_sequences=3), samples=True, merged=True),
    Mode("beams", dict(num_beams=3)),
    Mode("beams_returned_merged", dict(num_beams=4, num_return_sequences=2), merged=True),
    Mode("beam_sample", SAMPLE | dict(num_beams=2), samples=True),
    Mode("static", ours=lambda model, ids: STATIC),
    Mode("static_beams", dict(num_beams=3), ours=lambda model, ids: STATIC),
    Mode("dynamic_given", dict(num_beams=2), cache=lambda model: DynamicCache(config=model.config)),
    Mode("static_given", cache=lambda model: StaticCache(config=model.config, max_cache_len=20)),
    Mode("quantized", cache=quantized, lossy=True),
    Mode("lookup", ours=lambda model, ids: dict(prompt_lookup_num_tokens=3, max_matching_ngram_size=1), single=True),
    Mode("assistant", ours=lambda model, ids: dict(assistant_model=model.assistant), single=True),
    Mode("bitune_assistant", ours=lambda model, ids: dict(assistant_model=model), single=True),
    Mode("early_exit", ours=lambda model, ids: dict(assistant_early_exit=2), single=True),
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
    if (
        mode.id == "early_exit"
        and any(model._hooks.structure.windows)
        and parse(transformers.__version__) < parse("5.23")
    ):
        pytest.skip("needs transformers 5.23: before, early exit fails in plain models with windows too")
    ids, mask = prompts()
    singles = [ids[b : b + 1, WIDTH - p :] for b, p in enumerate(PROMPTS)]
    one_by_one = mode.single or mode.samples
    expected = [by_hand(model, x, mode) for x in (singles[:1] if one_by_one else singles)]

    def ours(ids, **options):
        cache = {} if mode.cache is None else {"past_key_values": mode.cache(model)}
        with model.merged_decoding() if mode.merged else nullcontext():
            return generate(model, ids, **mode.options, **mode.ours(model, ids), **cache, **options)

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


class Rows:
    """The shapes of what the first layer was given."""

    def __init__(self, model):
        self.seen = []
        layer = model._hooks.structure.layers[0]
        self.handle = layer.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, layer, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        self.seen.append(tuple(hidden.shape[:2]))

    def __enter__(self):
        return self.seen

    def __exit__(self, *error):
        self.handle.remove()


@pytest.fixture(scope="module")
def tiny():
    return bitune_model().eval()


TINY = dict(max_new_tokens=4, eos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    "options", [dict(num_beams=3), SAMPLE | dict(num_return_sequences=3)], ids=["beams", "returned"]
)
def test_a_prompt_that_repeats_is_prefilled_once(tiny, options, cache):
    ids, mask, _ = ragged_batch("left", prompts=(5, 1, 9, 2), answers=(0, 0, 0, 0))
    options = options | cache | TINY
    with Rows(tiny) as fused:
        tiny.generate(input_ids=ids, attention_mask=mask, **options)
    with Rows(tiny) as three, tiny.use_schedule(use_fused=False):
        tiny.generate(input_ids=ids, attention_mask=mask, **options)
    assert fused[:2] == [(1, 2 * (4 + 0 + 8 + 1) + 4), (12, 1)]
    assert three[:4] == [(4, 8), (4, 8), (4, 1), (12, 1)]


def test_candidates_behind_a_padded_prompt_are_no_part_of_it(tiny):
    ids, mask = torch.tensor([[0, 0, 5, 6, 7, 5, 6]]), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    lookup = TINY | dict(prompt_lookup_num_tokens=3, max_matching_ngram_size=1, do_sample=False)
    with Rows(tiny) as rows:
        found = tiny.generate(input_ids=ids, attention_mask=mask, **lookup)
    assert rows[0][1] > 2 * 4 + 1, "candidates came with the prompt"
    with tiny.use_schedule(use_fused=False):
        expected = tiny.generate(input_ids=ids[:, 2:], do_sample=False, **TINY)
    assert torch.equal(found[:, 2:], expected)


def test_repeats_in_a_batch_are_found_where_they_stand(tiny):
    ids, mask, _ = ragged_batch("left", prompts=(5, 6, 9, 2), answers=(0, 0, 0, 0))
    order = torch.tensor([0, 0, 2, 0, 1, 1, 1])
    alone = tiny.generate(input_ids=ids, attention_mask=mask, **TINY)
    with Rows(tiny) as seen:
        found = tiny.generate(input_ids=ids[order], attention_mask=mask[order], **TINY)
    assert seen[0] == (1, 2 * (4 + 8 + 4 + 5) + 4)
    assert torch.equal(found, alone[order])
    # the same tokens behind other padding are another prompt
    ids, mask = ids[:1].repeat(2, 1), mask[:1].repeat(2, 1)
    mask[1, -6] = 1
    with Rows(tiny) as seen:
        tiny.generate(input_ids=ids, attention_mask=mask, **TINY)
    assert seen[0] == (1, 2 * (4 + 5) + 2)


def test_padding_that_transformers_infers_reaches_every_cache(tiny):
    ids, mask, _ = ragged_batch("left", answers=(0, 0, 0, 0))
    expected = tiny.generate(input_ids=ids, attention_mask=mask, **TINY)
    assert torch.equal(tiny.generate(ids, **TINY), expected)
    assert torch.equal(tiny.generate(ids, **TINY, **STATIC), expected)


def test_guidance_reads_its_negative_prompt_in_both_directions(tiny):
    ids, negative = torch.randint(3, 96, (1, 6)), torch.randint(3, 96, (1, 9))
    options = dict(guidance_scale=1.7, negative_prompt_ids=negative, output_logits=True, return_dict_in_generate=True)
    out = tiny.generate(ids, **TINY, **options)
    with torch.no_grad(), tiny.use_schedule(use_fused=False):
        outs = [tiny(input_ids=x) for x in (ids, negative)]
    for t in range(4):
        logits, other = (o.logits[:, -1].log_softmax(-1) for o in outs)
        torch.testing.assert_close(out.logits[t].log_softmax(-1), logits, atol=1e-5, rtol=1e-5)
        token = (1.7 * (logits - other) + other).argmax(-1, keepdim=True)
        assert token.item() == out.sequences[0, 6 + t].item()
        with torch.no_grad(), tiny.disable_bitune():
            outs = [tiny(input_ids=token, past_key_values=o.past_key_values) for o in outs]


def test_a_family_that_reads_everything_again_reads_the_answer_as_an_answer():
    # phi3 does so where it goes over to the rotary embedding of long texts
    longrope = dict(short_factor=[1.0] * 4, long_factor=[3.0] * 4, original_max_position_embeddings=8)
    rope = dict(rope_type="longrope", rope_theta=10000.0, **longrope)
    model = bitune_model(base=BY_ID["phi3"].build(original_max_position_embeddings=8, rope_parameters=rope)).eval()
    ids, mask = prompts()
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, pad_token_id=0, eos_token_id=None)
    for width in range(WIDTH, WIDTH + 5):
        seen = torch.nn.functional.pad(mask, (0, width - WIDTH), value=1)
        with torch.no_grad():
            logits = model(input_ids=out[:, :width], attention_mask=seen, prompt_lengths=mask.sum(1)).logits
        assert logits[:, -1].argmax(-1).tolist() == out[:, width].tolist(), width


def test_a_logits_processor_may_call_the_model_on_its_own_prompt(tiny):
    other, found = torch.randint(3, 96, (2, 9)), []
    mask = torch.ones_like(other)
    mask[1, -2:] = 0  # padding on the right, which generate() would refuse
    with torch.no_grad():
        expected = tiny(input_ids=other, attention_mask=mask).logits

    def call(tokens, scores):
        found.append(tiny(input_ids=other, attention_mask=mask).logits)
        return scores

    ids = torch.randint(3, 96, (1, 6))
    whole = tiny.generate(ids, **TINY)
    assert torch.equal(tiny.generate(ids, **TINY, logits_processor=[call]), whole)
    assert len(found) == 4 and all(torch.equal(x, expected) for x in found)


def test_streamer_and_stopping_criteria_see_the_answer(tiny):
    class Stream:
        tokens, ended = [], False

        def put(self, tokens):
            self.tokens += tokens.flatten().tolist()

        def end(self):
            self.ended = True

    ids, stream = torch.randint(3, 96, (1, 6)), Stream()
    whole = tiny.generate(ids, **TINY)
    stop = [lambda tokens, scores, **kwargs: torch.tensor([tokens.shape[1] >= 8])]
    found = tiny.generate(ids, **TINY, streamer=stream, stopping_criteria=stop)
    assert found.tolist() == whole[:, :8].tolist() == [stream.tokens] and stream.ended


class FlashAttention:
    """The functions of flash-attn that transformers calls, on a CPU, for what that takes: two bytes, no dense mask."""

    def __init__(self):
        self.samples = 0

    def padded(self, q, k, v, softmax_scale=None, causal=False):  # [batch, length, heads, head_dim]
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        self.samples += len(q)
        see = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        see = see.tril(k.shape[1] - q.shape[1]) if causal else see
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, see, scale=softmax_scale, enable_gqa=True).transpose(1, 2)

    def varlen(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        lengths = [cu.diff().tolist() for cu in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)]
        samples = zip(*(x[None].split(n, 1) for x, n in zip((q, k, v), lengths, strict=True)), strict=True)
        return torch.cat([self.padded(*qkv, softmax_scale, causal)[0] for qkv in samples])


@pytest.mark.parametrize("fused", [True, False])
def test_a_model_that_was_loaded_with_flash_attention_decodes_with_it(fused, monkeypatch):
    flash = FlashAttention()
    functions = flash.padded, flash.varlen, None, flash_attention._pad_input, flash_attention._unpad_input
    monkeypatch.setattr(flash_attention, "_lazy_imports", lambda *args, **options: functions)
    monkeypatch.setattr(flash_attention, "_loaded_implementation", None)
    ids, mask, _ = ragged_batch("left", answers=(0, 0, 0, 0))
    options = dict(output_logits=True, return_dict_in_generate=True)
    found = []
    for implementation in ("sdpa", "flash_attention_2"):
        base = base_model(dtype=torch.bfloat16)
        base.config._attn_implementation = implementation  # loading with it looks for the package
        model = bitune_model(base=base, use_fused=fused).eval()
        assert flash.samples == 0
        found.append(torch.stack(model.generate(ids, attention_mask=mask, **TINY, **options).logits))
    assert flash.samples == (TINY["max_new_tokens"] - 1) * len(ids) * base.config.num_hidden_layers
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 2**-6


graphs = []


def count_graphs(graph, inputs):
    graphs.append(graph)
    return graph.forward


@pytest.mark.filterwarnings("ignore")
def test_compiled_decoding_is_one_graph_for_all_steps_prompts_and_caches():
    tiny = bitune_model(base=base_model(num_hidden_layers=2)).eval()
    torch._dynamo.reset()
    graphs.clear()
    settings = CompileConfig(backend=count_graphs, fullgraph=True, mode=None)
    settings._compile_all_devices = True
    for seed in (0, 1):
        ids, mask, _ = ragged_batch("left", seed=seed, answers=(0, 0, 0, 0))
        expected = tiny.generate(ids, attention_mask=mask, **TINY)
        found = tiny.generate(ids, attention_mask=mask, **TINY, **STATIC, compile_config=settings)
        assert torch.equal(found, expected)
    assert len(graphs) == 1


class Unread(torch.Tensor):
    def __int__(self):
        raise AssertionError("a decoding step waited for the length of its cache")

    __bool__ = __index__ = __int__


class UnreadCache(StaticCache):
    def get_seq_length(self, layer_idx=0):
        length = super().get_seq_length(layer_idx)
        return length.as_subclass(Unread) if isinstance(length, torch.Tensor) else length


def test_decoding_steps_never_read_the_length_of_a_static_cache(tiny):
    cache = UnreadCache(config=tiny.config, max_cache_len=16)
    assert torch.equal(tiny.generate(IDS, past_key_values=cache, **TINY), tiny.generate(IDS, **TINY))


MERGED = {
    "lora": {},
    "dora": dict(peft=lora(use_dora=True)),
    "ia3": dict(peft=IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "full": dict(peft=None),
    "naive_bidir": dict(variant="naive_bidir"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", MERGED)
def test_merged_decoding_leaves_no_trace(config, dtype):
    model = bitune_model(base=base_model(dtype=dtype), **MERGED[config]).eval()
    tuned = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    ids, mask, _ = ragged_batch("left", answers=(0, 0, 0, 0))
    before = {n: x.clone() for n, x in model.state_dict().items()}
    expected = model.generate(ids, attention_mask=mask, **TINY)

    def untouched():
        assert not any(m.merged for m in tuned)
        assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())

    merged = []
    with model.merged_decoding():
        stop = [lambda *args, **kwargs: merged.append([m.merged for m in tuned]) or torch.zeros(4, dtype=torch.bool)]
        found = model.generate(ids, attention_mask=mask, **TINY, stopping_criteria=stop)
        with model.disable_adapter():
            untouched()
        assert all(m.merged for m in tuned)
    assert merged == [[True] * len(tuned)] * 4
    untouched()
    if dtype == torch.float32:
        assert torch.equal(found, expected)
    with pytest.raises(ZeroDivisionError), model.merged_decoding():
        model.generate(ids, attention_mask=mask, **TINY, stopping_criteria=[lambda *args, **kwargs: 1 / 0])
    untouched()
    assert torch.equal(model.generate(ids, attention_mask=mask, **TINY), expected)


def test_merged_weights_are_put_back_in_spite_of_an_interrupt(monkeypatch):
    model = bitune_model().eval()
    before = {n: x.clone() for n, x in model.state_dict().items()}
    unmerge, layers = lora_layer.Linear.unmerge, []

    def interrupted(layer):
        layers.append(layer)
        if len(layers) == 4:
            raise KeyboardInterrupt
        unmerge(layer)

    with pytest.raises(KeyboardInterrupt), model.merged_decoding():
        monkeypatch.setattr(lora_layer.Linear, "unmerge", interrupted)
    assert not any(m.merged for m in model.modules() if isinstance(m, BaseTunerLayer))
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


@pytest.mark.parametrize("config", MERGED)
def test_merged_decoding_in_inference_mode_leaves_weights_that_gradients_reach(config):
    model, (ids, mask, labels) = bitune_model(**MERGED[config]).eval(), ragged_batch()
    with torch.inference_mode(), model.merged_decoding():
        model.generate(ids[:1, :5], **TINY)
    model.train()(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()


def test_merged_decoding_under_autocast_reads_no_weight_of_before():
    model, ids = bitune_model().eval().requires_grad_(True), ragged_batch()[0][:1, :5]
    options = TINY | dict(output_logits=True, return_dict_in_generate=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.stack(model.generate(ids, **options).logits)
        with model.merged_decoding():
            found = torch.stack(model.generate(ids, **options).logits)
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_gradient_never_goes_through_merged_weights():
    model, (ids, mask, labels) = bitune_model(), ragged_batch()
    with model.merged_decoding():
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        model.generate(ids[:1, :5], **TINY)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()


def test_merged_decoding_refuses_weights_that_it_could_not_restore():
    model = bitune_model()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged_decoding: expected unmerged"), model.merged_decoding():
        pass
    model.unmerge_adapter()
    with model.merged_decoding(), pytest.raises(ValueError, match="expected unmerged"), model.merged_decoding():
        pass
    tied = bitune_model(base=base_model(tie_word_embeddings=True), peft=lora(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="tied to a module"), tied.merged_decoding():
        pass
    biased = bitune_model(peft=lora(lora_bias=True))
    with pytest.raises(ValueError, match="expected base layers with a bias"), biased.merged_decoding():
        pass
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    weight.weight = torch.nn.Parameter(weight.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="floating-point base weights"), model.merged_decoding():
        pass


IDS = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(4))


def filled(model):
    with torch.no_grad():
        return model(input_ids=IDS).past_key_values


def static(rows=2, heads=2, head_dim=8, room=16, **changes):
    cache = StaticCache(config=base_model(**changes).config, max_cache_len=room)
    cache.early_initialization(rows, heads, head_dim, torch.float32, torch.device("cpu"))
    return cache


RIGHT = torch.tensor([[1] * 6, [1] * 5 + [0]])
GAP = torch.tensor([[1] * 6, [1, 0, 1, 1, 1, 1]])


PENALTY = dict(penalty_alpha=0.6, top_k=4)
# What the error says, and the options of a call that gets it.
BAD = {
    "use_cache: expected True": lambda model: dict(use_cache=False),
    "prefill_chunk_size: expected None": lambda model: dict(prefill_chunk_size=2),
    "cache_implementation: expected another": lambda model: dict(cache_implementation="paged"),
    "custom_generate: expected None": lambda model: dict(custom_generate=lambda model, input_ids, **kwargs: input_ids),
    "output_attentions: expected False": lambda model: dict(output_attentions=True),
    "output_hidden_states: expected False": lambda model: dict(output_hidden_states=True),
    "use_mtp: expected False": lambda model: dict(use_mtp=True),
    "speculation_type: expected None": lambda model: dict(speculation_type="dflash"),
    "token_healing: expected False": lambda model: dict(token_healing=True),
    "adapter_names: expected None": lambda model: dict(adapter_names=["nobody"] * 2),
    "got contrastive_search": lambda model: PENALTY,
    "got dola_generation": lambda model: dict(dola_layers="high"),
    "got group_beam_search": lambda model: dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.1),
    "got constrained_beam_search": lambda model: dict(num_beams=2, force_words_ids=[[5]]),
    "guidance_scale: expected None": lambda model: dict(guidance_scale=2.0, prompt_lookup_num_tokens=2),
    "input_ids: expected one prompt": lambda model: dict(inputs=IDS, prompt_lookup_num_tokens=2),
    "input_ids: expected [batch, seq] with at least one token": lambda model: dict(input_ids=IDS[:, :0]),
    "input_ids: expected a tensor": lambda model: dict(input_ids=IDS.tolist()),
    "attention_mask: expected padding on the left": lambda model: dict(attention_mask=RIGHT),
    "attention_mask: expected the real tokens": lambda model: dict(attention_mask=GAP),
    "attention_mask: expected shape": lambda model: dict(attention_mask=torch.ones(3, 6)),
    "position_ids: expected 0, 1, 2": lambda model: dict(position_ids=torch.arange(6)[None] % 3),
    "past_key_values: expected an empty cache": lambda model: dict(past_key_values=filled(model)),
    "past_key_values: expected batch": lambda model: dict(past_key_values=static(rows=1)),
    "heads and head dim (2, 2, 8) in layer 0, got (2, 1, 8)": lambda model: dict(past_key_values=static(heads=1)),
    "heads and head dim (2, 2, 8) in layer 0, got (2, 2, 4)": lambda model: dict(past_key_values=static(head_dim=4)),
    "past_key_values: expected a cache of 3 layers": lambda model: dict(past_key_values=static(num_hidden_layers=2)),
    "past_key_values: expected a cache with room for 9": lambda model: dict(past_key_values=static(room=8)),
    "`past_key_values` is not supported anymore": lambda model: dict(past_key_values=((IDS, IDS),)),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.filterwarnings("ignore")
def test_bad_calls_are_refused_before_any_work_and_leave_the_model_usable(tiny, message):
    options = dict(input_ids=IDS) | BAD[message](tiny) | TINY
    with Rows(tiny) as seen, pytest.raises((ValueError, TypeError), match=re.escape(message)):
        tiny.generate(**options)
    assert not seen
    with torch.no_grad(), tiny.use_schedule(use_fused=False):
        first = tiny(input_ids=IDS).logits[:, -1].argmax(-1)
    assert torch.equal(tiny.generate(IDS, **TINY)[:, 6], first)


def test_every_mode_of_transformers_is_decoded_or_refused():
    plain = [m for m in MODES if m.id in ("greedy", "sample", "beams", "beam_sample", "lookup")]
    configs = [GenerationConfig(**m.options | m.ours(None, None)) for m in plain]
    decoded = [c.get_generation_mode().value for c in configs]
    refused = [message.removeprefix("got ") for message in BAD if message.startswith("got ")]
    assert sorted(decoded + refused) == sorted(m.value for m in GenerationMode)


@pytest.mark.parametrize("option", [{"use_cache": False}, PENALTY], ids=["use_cache", "contrastive"])
def test_options_are_refused_from_every_source(tiny, option):
    with pytest.raises(ValueError, match=r"expected (True|a mode)"):
        tiny.generate(IDS, GenerationConfig(**option))
    before = tiny.generation_config
    try:
        tiny.generation_config = GenerationConfig(**option)
        with pytest.raises(ValueError, match=r"expected (True|a mode)"):
            tiny.generate(IDS)
        if "use_cache" in option:
            tiny.generate(IDS, use_cache=True, **TINY)
    finally:
        tiny.generation_config = before


def test_other_calls_are_refused_too(tiny):
    for call in (tiny.generate_batch, tiny.init_continuous_batching, tiny.continuous_batching_context_manager):
        with pytest.raises(ValueError, match="generate_batch: expected generate"):
            call(IDS.tolist())
    with pytest.raises(ValueError, match="adapter_names"):
        tiny(input_ids=IDS, adapter_names=["causal"] * 2)
    for options, match in (
        (dict(past_key_values=filled(tiny), prompt_lengths=[3, 3]), "past_key_values: expected an empty cache"),
        (dict(past_key_values=((IDS, IDS),)), "past_key_values: expected a Cache"),
        (dict(attention_mask=torch.ones(3, 6)), "attention_mask: expected shape"),
        (dict(position_ids=torch.arange(5)[None]), "position_ids: expected shape"),
    ):
        with torch.no_grad(), pytest.raises((ValueError, TypeError), match=match):
            tiny(input_ids=IDS, **options)
    with pytest.raises(ValueError, match="adapter_name: expected 'causal'"):
        tiny.set_adapter("nobody")


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
@pytest.mark.filterwarnings("ignore")
def test_only_learned_positions_end(name):
    model = attach(BY_ID[name], True).eval()  # of max_position_embeddings 64
    ids = torch.randint(1, VOCAB, (1, 65), generator=torch.Generator().manual_seed(3))
    ended = pytest.raises(ValueError, match=r"at most 64 tokens.*learned") if name != "llama" else nullcontext()
    assert model.generate(ids[:, :60], max_new_tokens=5, pad_token_id=0).shape[1] == 65
    with ended:
        model.generate(ids[:, :60], max_new_tokens=6, pad_token_id=0)
    with ended:
        model.generate(ids[:, :60], max_length=66, pad_token_id=0)
    mask = torch.ones_like(ids).index_fill(1, torch.arange(5), 0)
    model.generate(ids, attention_mask=mask, max_new_tokens=5, pad_token_id=0)
    with ended:
        model(input_ids=ids, prompt_lengths=[3])
