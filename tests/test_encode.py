"""Embeddings of texts and masked next-token prediction, against a Llama whose layers are run here one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call
from transformers import DataCollatorForLanguageModeling

from bitune_kernels.config import VARIANTS
from bitune_kernels.masks import visible_to_prompt
from bitune_kernels.modeling import encode, masked_next_token_loss
from tests.families import BY_ID
from tests.test_families import ragged
from tests.test_trainers import tokenizer
from tests.tiny import VOCAB, base_model, bitune_model, lora, ragged_batch

TWO_STREAMS = [name for name, variant in VARIANTS.items() if "beta" not in variant.mixed]


def model_of(**options):
    return bitune_model(base=base_model(dtype=torch.float64), **options).double().eval()


class ByHand:
    """The base model with one adapter added to its weights, called for one text at a time."""

    def __init__(self, model, adapter: str, others: str | None = None):
        """``others``: the adapter of all modules but those that make queries, keys and values."""
        self.model = copy.deepcopy(model).unload()
        self.leaves, self.weights = {}, dict(self.model.named_parameters())
        for name, _ in model.named_parameters():
            module, found, rest = name.partition(".lora_A.")
            if not found:
                continue
            used = adapter if others is None or module[-6:] in ("q_proj", "k_proj", "v_proj") else others
            if rest != f"{used}.weight":
                continue
            names = name, name.replace("lora_A", "lora_B")
            a, b = (model.get_parameter(n).detach().clone().requires_grad_() for n in names)
            self.leaves |= dict(zip(names, (a, b), strict=True))
            scale = model.get_submodule(module).scaling[used]
            target = module.removeprefix("base_model.model.") + ".weight"
            self.weights[target] = self.weights[target].detach() + scale * b @ a

    def hidden(self, tokens: torch.Tensor, masks: list[str]) -> torch.Tensor:
        """int64 [n] -> [n, hidden] behind the final norm, where layer i has the i-th mask."""

        def run(llama, tokens):
            x = llama.model.embed_tokens(tokens[None])
            positions = llama.model.rotary_emb(x, torch.arange(len(tokens))[None])
            for layer, mask in zip(llama.model.layers, masks, strict=True):
                see = visible_to_prompt(mask, len(tokens))[None, None]
                x = layer(x, attention_mask=see, position_embeddings=positions)
            return llama.model.norm(x)[0]

        return functional_call(_Call(self.model, run), {f"llama.{n}": w for n, w in self.weights.items()}, (tokens,))

    def logits(self, tokens: torch.Tensor, masks: list[str]) -> torch.Tensor:
        return self.hidden(tokens, masks) @ self.weights["lm_head.weight"].T


class _Call(torch.nn.Module):
    # functional_call exchanges the weights of a module during its forward
    def __init__(self, llama, run):
        super().__init__()
        self.llama, self.run = llama, run

    def forward(self, tokens):
        return self.run(self.llama, tokens)


def texts_of(ids, mask) -> list[torch.Tensor]:
    return [row[own.bool()] for row, own in zip(ids, mask, strict=True)]


def close(found, expected, tolerance=1e-6):
    # the norms of transformers are float32 inside, and so is its loss
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, check_dtype=False)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", [*TWO_STREAMS, "skip_bidir 1", "skip_bidir -1", "dynamic_mixing"])
def test_the_bidirectional_stream_by_hand(variant, fused):
    options = {"variant": variant} if variant in VARIANTS else {}
    if variant.startswith("skip"):
        options["skip_bidir"] = int(variant.split()[1])
    model = model_of(use_fused=fused, dynamic_mixing=variant == "dynamic_mixing", **options)
    mask = VARIANTS[model.bitune_config.variant].stream_mask
    skipped = {"skip_bidir 1": ["causal", mask, mask], "skip_bidir -1": [mask, "causal", "causal"]}
    masks = skipped.get(variant, [mask] * 3)
    hand = ByHand(model, "bidir" if "bidir" in model.peft_config else "causal")
    ids, real, _ = ragged_batch()
    expected = torch.stack([hand.hidden(tokens, masks).mean(0) for tokens in texts_of(ids, real)])
    close(encode(model, ids, real), expected)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_causal_stream_and_echo_by_hand(variant, fused):
    model = model_of(variant=variant, use_fused=fused)
    hand = ByHand(model, "causal")
    ids, real, _ = ragged_batch("left")
    texts = texts_of(ids, real)
    expected = torch.stack([hand.hidden(tokens, ["causal"] * 3).mean(0) for tokens in texts])
    close(encode(model, ids, real, stream="causal"), expected)
    twice = [hand.hidden(torch.cat([tokens, tokens]), ["causal"] * 3)[len(tokens) :].mean(0) for tokens in texts]
    close(encode(model, ids, real, stream="causal", repeat=True), torch.stack(twice))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", ["single_stream", "single_stream_dual"])
def test_a_single_stream_by_hand_where_beta_is_0_and_1(variant, fused):
    """Then it is one attention: the causal one with the adapter "causal", or the other one with its own."""
    model = model_of(variant=variant, use_fused=fused)
    second = "bidir" if variant == "single_stream_dual" else "causal"
    ids, real, _ = ragged_batch()
    between = encode(model, ids, real)
    for theta, adapter, mask in ((0.0, "causal", "causal"), (1e12, second, "full")):
        torch.nn.init.constant_(model.mixing.theta_beta, theta)
        hand = ByHand(model, adapter, others="causal")
        expected = torch.stack([hand.hidden(tokens, [mask] * 3).mean(0) for tokens in texts_of(ids, real)])
        close(encode(model, ids, real), expected)
        assert (between - expected).abs().max() > 1e-2


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("stream", ["bidir", "causal"])
def test_an_instruction_is_read_and_not_averaged(stream, repeat):
    """Nor is it repeated. What is averaged may lie anywhere in the text."""
    model = model_of()
    hand, masks = ByHand(model, stream), ["full" if stream == "bidir" else "causal"] * 3
    ids, real, _ = ragged_batch("left")
    chosen = real * (torch.arange(ids.numel()).view_as(ids) % 3 != 0)
    expected = []
    for tokens, own in zip(texts_of(ids, real), texts_of(chosen, real), strict=True):
        if repeat:
            tokens = torch.cat([tokens, tokens[own.bool()]])
            own = torch.cat([0 * own, torch.ones_like(own[own.bool()])])
        expected.append(hand.hidden(tokens, masks)[own.bool()].mean(0))
    close(encode(model, ids, real, embed_mask=chosen, stream=stream, repeat=repeat), torch.stack(expected))


@pytest.mark.parametrize("stream", ["bidir", "causal"])
def test_a_text_knows_nothing_of_its_padding_or_of_other_texts(stream):
    model = model_of()
    expected = encode(model, *ragged_batch()[:2], stream=stream, repeat=True)
    ids, mask, _ = ragged_batch("left")
    close(encode(model, ids, mask, stream=stream, repeat=True), expected)
    poisoned = ids.masked_fill(mask == 0, VOCAB - 1)
    poisoned[2] = poisoned[2].flip(0)
    found = encode(model, poisoned, mask, stream=stream, repeat=True)
    rows = torch.tensor([0, 1, 3])
    close(found[rows], expected[rows])
    assert (found[2] - expected[2]).abs().max() > 1e-3
    for i, tokens in enumerate(texts_of(ids, mask)):
        close(encode(model, tokens[None], stream=stream, repeat=True)[0], expected[i])


@pytest.mark.parametrize(
    ("fused", "checkpointing"),
    [(True, None), (True, False), (True, True), (False, None), (False, False), (False, True)],
)
def test_gradients_by_hand(fused, checkpointing):
    """Of every weight of the stream's adapter, those behind the last layer's keys and values included."""
    model = model_of(use_fused=fused)
    model.set_requires_grad("bidir")
    hand, (ids, real, labels) = ByHand(model, "bidir"), ragged_batch()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    weights = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = (encode(model.train(), ids, real) * weights).sum() + masked_next_token_loss(model, ids, labels, real)
    rows = [hand.hidden(tokens, ["full"] * 3) for tokens in texts_of(ids, real)]
    expected = (torch.stack([x.mean(0) for x in rows]) * weights).sum()
    expected = expected + by_hand_loss(hand, ids, real, labels)
    close(found, expected)
    found.backward()
    expected.backward()
    named = dict(model.named_parameters())
    assert len(hand.leaves) == 2 * 7 * 3
    for name, leaf in hand.leaves.items():
        error = (named[name].grad - leaf.grad).norm() / leaf.grad.norm()
        assert error < 1e-5, f"{name}: {error:.1e}"
    for name, p in named.items():
        assert name in hand.leaves or p.grad is None or not p.grad.any(), name


def by_hand_loss(hand, ids, real, labels) -> torch.Tensor:
    """Each masked token is predicted by the hidden state in front of it."""
    losses = []
    for tokens, targets in zip(texts_of(ids, real), texts_of(labels, real), strict=True):
        logp = hand.logits(tokens, ["full"] * 3).log_softmax(-1)
        losses += [-logp[i - 1, targets[i]] for i in range(1, len(tokens)) if targets[i] != -100]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_masked_next_tokens_by_hand(side, chunk):
    """As transformers' collator masks them; the label of a text's first token, which nothing predicts, is ignored."""
    tokens = tokenizer()
    tokens.padding_side, tokens.mask_token = side, tokens.convert_ids_to_tokens(5)
    collate = DataCollatorForLanguageModeling(
        tokens, mlm_probability=0.4, mask_replace_prob=1.0, random_replace_prob=0.0, seed=1
    )
    ids, real, _ = ragged_batch()
    batch = collate([{"input_ids": text.tolist()} for text in texts_of(ids, real)])
    assert batch["input_ids"][batch["labels"] != -100].unique().tolist() == [5]
    first = batch["attention_mask"].argmax(1)
    batch["labels"][0, first[0]] = 7
    model = model_of(variant="no_mixing", loss_chunk_rows=chunk)
    found = masked_next_token_loss(model, **batch)
    close(found, by_hand_loss(ByHand(model, "bidir"), batch["input_ids"], batch["attention_mask"], batch["labels"]))


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gemma4_text", "gpt_oss", "qwen3_moe", "phi"])
def test_families_in_one_pass_as_in_three(name):
    """Windows, softcaps, sinks, learned positions, shared keys and values, experts."""
    family = BY_ID[name]
    model = bitune_model(base=family.build(), peft=lora(target_modules=family.targets)).eval()
    ids, mask = ragged("left").input_ids, ragged("left").attention_mask
    labels = ids.masked_fill(mask == 0, -100)
    calls = [
        lambda: encode(model, ids, mask),
        lambda: encode(model, ids, mask, stream="causal", repeat=True),
        lambda: masked_next_token_loss(model, ids, labels, mask),
    ]
    with torch.no_grad():
        for call in calls:
            found = call()
            with model.use_schedule(use_fused=False):
                close(found, call(), 1e-4)


def test_low_precision_is_averaged_in_float32():
    model = bitune_model(base=base_model().to(torch.bfloat16)).eval()
    ids, mask, _ = ragged_batch()
    found = encode(model, ids, mask)
    assert found.dtype == torch.float32
    close(found, encode(bitune_model().eval(), ids, mask), 0.1)


IDS = torch.arange(3, 11).view(2, 4)
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("input_ids", dict(input_ids=[3, 4])),
        ("input_ids", dict(input_ids=IDS.float())),
        ("input_ids", dict(input_ids=IDS[0])),
        ("input_ids", dict(input_ids=IDS[:, :0])),
        ("attention_mask", dict(attention_mask=MASK[:, :3])),
        ("attention_mask", dict(attention_mask=MASK.tolist())),
        ("attention_mask", dict(attention_mask=MASK * torch.tensor([[0], [1]]))),
        ("attention_mask", dict(attention_mask=torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]))),
        ("stream", dict(stream="both")),
        ("repeat", dict(repeat=2)),
        ("embed_mask", dict(embed_mask=[1, 1])),
        ("embed_mask", dict(embed_mask=MASK[:1])),
        ("embed_mask", dict(embed_mask=torch.ones_like(MASK))),
        ("embed_mask", dict(embed_mask=MASK * torch.tensor([[1], [0]]))),
        ("labels", dict(labels=IDS[:, 1:])),
        ("labels", dict(labels=IDS.float())),
        ("labels", dict(labels=IDS)),
        ("labels", dict(labels=IDS.masked_fill(torch.arange(4) > 0, -100))),
    ],
)
def test_bad_input_is_refused_by_name(argument, changes):
    call = masked_next_token_loss if "labels" in changes else encode
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: expected .*(got|row 0)"):
        call(bitune_model(), **dict(input_ids=IDS, attention_mask=MASK) | changes)


def test_models_that_cannot_encode_are_refused():
    with pytest.raises(TypeError, match="model: expected a BituneModel, got LlamaForCausalLM"):
        encode(base_model(), IDS)
    model = bitune_model()
    with model.disable_bitune(), pytest.raises(ValueError, match="model: expected its streams to be on"):
        masked_next_token_loss(model, IDS, IDS)
    gpt2 = bitune_model(base=BY_ID["gpt2"].build(), peft=lora(target_modules=BY_ID["gpt2"].targets))
    ids = torch.ones(1, 40, dtype=torch.long)
    encode(gpt2, ids)
    with pytest.raises(ValueError, match=r"input_ids: expected at most 64 tokens per row.*got 80"):
        encode(gpt2, ids, repeat=True)
    experts = bitune_model(base=BY_ID["qwen3_moe"].build(), peft=lora(target_modules=["q_proj"]))
    experts.get_base_model().config.output_router_logits = True
    with pytest.raises(ValueError, match=r"output_router_logits: expected False.*got True"):
        masked_next_token_loss(experts, IDS, IDS)
