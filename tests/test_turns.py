"""Conversations: turns in training, turns over a cache, and BituneChat."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import AddedToken
from transformers import DynamicCache, GenerationConfig

from bitune_kernels import BituneChat
from bitune_kernels.modeling import one_pass
from bitune_kernels.modeling.adapters import BIDIR, CAUSAL, _using
from bitune_kernels.plan import find_turns
from tests.families import BY_ID
from tests.test_training_data import byte_tokenizer
from tests.tiny import VOCAB, base_model, bitune_model, lora

# prompt and answer tokens of each turn, then what follows the last answer
CONVERSATIONS = [([(5, 3), (1, 2), (4, 4)], 2), ([(6, 4)], 0), ([(2, 1), (7, 5)], 1)]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def conversations(vocab: int = VOCAB, given=CONVERSATIONS):
    generator = torch.Generator().manual_seed(0)
    lengths = [sum(p + a for p, a in turns) + rest for turns, rest in given]
    ids, labels = (torch.full((len(given), max(lengths)), fill) for fill in (0, -100))
    mask = torch.zeros_like(ids)
    for b, (turns, _) in enumerate(given):
        ids[b, : lengths[b]] = torch.randint(3, vocab, (lengths[b],), generator=generator)
        mask[b, : lengths[b]] = 1
        at = 0
        for p, a in turns:
            labels[b, at + p : at + p + a] = ids[b, at + p : at + p + a]
            at += p + a
    return ids, mask, labels


def model_of(family: str, **config):
    if family == "llama":
        return bitune_model(base=base_model(dtype=torch.float64), **config)
    entry = BY_ID[family]
    targets = entry.targets if isinstance(entry.targets, str) else list(entry.targets)
    return bitune_model(base=entry.build().double(), peft=lora(target_modules=targets), **config).double()


@torch.no_grad()
def turn_by_turn(model, ids, turns):
    """Logits of each answer's tokens, one turn after the other over one cache."""
    cache, at, logits = DynamicCache(config=model.get_base_model().config), 0, []
    for p, a in turns:
        with model._hooks.turn_over(cache):
            out = model(input_ids=ids[:, at : at + p], past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, -1:])
        out = model(input_ids=ids[:, at + p : at + p + a], past_key_values=cache, use_cache=True)
        logits.append(out.logits)
        at += p + a
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("variant", ["bitune", "naive_bidir", "shared_weights"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma4_shared_kv", "gpt2"])
def test_alternating_training_equals_turns_over_a_cache(family, variant):
    model = model_of(family, turns="alternating", variant=variant).eval()
    ids, mask, labels = conversations()
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    for fused in (True, False):
        with model.use_schedule(use_fused=fused):
            for b, (turns, _) in enumerate(CONVERSATIONS):
                expected, _ = turn_by_turn(model, ids[b : b + 1], turns)
                rows, at = [], 0
                for p, a in turns:
                    rows.append(found[b, at + p - 1 : at + p + a])
                    at += p + a
                torch.testing.assert_close(torch.cat(rows), expected[0], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dynamic", [False, True])
def test_layers_share_their_plans(dynamic, monkeypatch):
    # With a plan lives what a backend derives from it: the tiles of its kernels, which are copied to the GPU.
    model, plans = model_of("gemma3_text", turns="alternating", dynamic_mixing=dynamic).eval(), []

    def recorded(operator):
        return lambda *args, **options: plans.append(args[5]) or operator(*args, **options)

    for name in ("bitune_attention", "bitune_prefill"):
        monkeypatch.setattr(one_pass, name, recorded(getattr(one_pass, name)))
    turns = [(6, 4), (3, 2)]
    _, cache = turn_by_turn(model, conversations(given=[(turns, 0)])[0], turns)
    assert len({layer.keys.shape[2] for layer in cache.layers}) == 2 < len(cache.layers), "windows cut the past"
    calls = 1 + dynamic  # with dynamic mixing prompts and answers are a call each
    assert len(set(plans)) == calls * (1 + 2), "one for the first turn, one for each length of the second one's past"


@torch.no_grad()
def test_a_turn_over_a_cache_by_hand():
    """Each stream once more with a mask written here, and the mix of what it added to the cache."""
    model = model_of("llama").eval()
    (ids, _, _), (turns, _) = conversations(given=CONVERSATIONS[:1]), CONVERSATIONS[0]
    found, cache = turn_by_turn(model, ids, turns)
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    past, at, logits = DynamicCache(), 0, []

    def stream(name, tokens, see):
        """The keys and values that one adapter adds to the cache, and the logits."""
        mask = torch.zeros(see.shape, dtype=torch.float64).masked_fill(~see, torch.finfo(torch.float64).min)
        own = copy.deepcopy(past)
        scopes = [_using(m, name) for m in layers]
        for scope in scopes:
            scope.__enter__()
        positions = torch.arange(at, at + tokens.shape[1])[None]
        with model.disable_bitune():
            out = model(
                input_ids=tokens,
                past_key_values=own,
                attention_mask=mask[None, None],
                position_ids=positions,
                use_cache=True,
            )
        for scope in scopes:
            scope.__exit__(None, None, None)
        return [(layer.keys[:, :, at:], layer.values[:, :, at:]) for layer in own.layers], out.logits

    def causal(n):
        return torch.ones(n, at + n, dtype=torch.bool).tril(at)

    for p, a in turns:
        if p > 1:
            tokens = ids[:, at : at + p - 1]
            both = stream(BIDIR, tokens, torch.ones(p - 1, at + p - 1, dtype=torch.bool))[0]
            one = stream(CAUSAL, tokens, causal(p - 1))[0]
            for layer, (b, c) in enumerate(zip(both, one, strict=True)):
                alphas = model.mixing.alpha(layer)
                past.update(*(x + alpha * (y - x) for x, y, alpha in zip(c, b, alphas, strict=True)), layer)
            at += p - 1
        tokens = ids[:, at : at + 1 + a]
        added, out = stream(CAUSAL, tokens, causal(1 + a))
        for layer, (k, v) in enumerate(added):
            past.update(k, v, layer)
        logits.append(out)
        at += 1 + a
    torch.testing.assert_close(found, torch.cat(logits, dim=1), atol=1e-9, rtol=1e-9)
    for mine, theirs in zip(cache.layers, past.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(mine.values, theirs.values, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("fused", [True, False])
def test_turns_over_a_cache_under_autocast(fused):
    # the steps of an answer leave keys in float32 and values in bfloat16
    model, ids, turns = bitune_model().eval(), conversations()[0][:1], CONVERSATIONS[0][0]
    expected, _ = turn_by_turn(model, ids, turns)
    with torch.autocast("cpu", torch.bfloat16), model.use_schedule(use_fused=fused):
        found, _ = turn_by_turn(model, ids, turns)
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_gradients_reach_earlier_turns(backend):
    """Against finite differences: turns meet in the keys and values of those before."""
    model = model_of("llama", turns="alternating", backend=backend).train()
    with torch.no_grad():  # away from 0, where |theta| bends
        for theta in model.mixing.parameters():
            theta.abs_().add_(0.01)
    ids, mask, labels = conversations()

    def loss():  # in float64, and not in float32 as transformers' own
        logits = model(input_ids=ids, attention_mask=mask, labels=labels).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    loss().backward()
    chosen = [model.mixing.theta_k, model.mixing.theta_v]
    chosen += [
        p for n, p in model.named_parameters() if ".layers.0." in n and "lora_B" in n and ("k_proj" in n or "v_" in n)
    ]
    assert len(chosen) == 6
    for parameter in chosen:
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(parameter.dtype)
        step, losses = 1e-3, []  # norms are float32 inside
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                losses.append(float(loss()))
                parameter.sub_(direction, alpha=sign * step)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=2e-3)


@pytest.mark.parametrize("turns", ["recompute", "alternating"])
def test_a_prompt_is_as_long_as_it_is_said_to_be(turns):
    ids = torch.arange(3, 15)[None]
    labels = torch.cat([torch.full((1, 7), -100), ids[:, 7:]], dim=1)
    model, one = bitune_model(turns=turns).eval(), bitune_model().eval()
    for n in (3, 7):
        loss = model(input_ids=ids, labels=labels, prompt_lengths=[n]).loss
        torch.testing.assert_close(loss, one(input_ids=ids, labels=labels, prompt_lengths=[n]).loss)
    for n in (0, 99):
        with pytest.raises(ValueError, match=rf"^prompt_lengths: expected 1 to \d+ \(tokens of sample 0\), got {n}"):
            model(input_ids=ids, labels=labels, prompt_lengths=[n])


@pytest.mark.parametrize("fused", [True, False])
def test_recompute_training_equals_a_sample_per_answer(fused):
    model = bitune_model(turns="recompute", use_fused=fused).train()
    ids, mask, labels = conversations()
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    expected, one = (
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        bitune_model(use_fused=fused).train(),
    )
    total, count = 0.0, int((labels != -100).sum())
    for b, (turns, _) in enumerate(CONVERSATIONS):
        at = 0
        for p, a in turns:
            end = at + p + a
            alone = torch.full_like(labels[b : b + 1, :end], -100)
            alone[:, at + p :] = ids[b, at + p : end]
            part = one(input_ids=ids[b : b + 1, :end], labels=alone).loss * (a / count)
            part.backward()
            total, at = total + float(part), end
    assert total == pytest.approx(float(loss), rel=1e-5)
    for name, parameter in one.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                parameter.grad, expected[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_turns_are_found_in_the_labels():
    labels = torch.tensor([[-100, -100, 5, 5, -100, 5, -100], [-100, 5, -100, -100, -100, -100, -100]])
    found = find_turns(labels, [(0, 7), (7, 3)], [2, 1])
    assert found == ([(0, 4), (4, 2), (7, 2)], [2, 1, 1], [0, 4, 0])
    assert find_turns(labels, [(9, 4)], [4]) == ([(9, 4)], [4], [0])
    # the answer begins where prompt_lengths say so, whatever its first labels
    assert find_turns(labels, [(0, 7), (9, 4)], [1, 3]) == ([(0, 4), (4, 2), (9, 4)], [1, 1, 3], [0, 4, 0])
    (ids, mask, labels), model = conversations(), bitune_model(turns="alternating", use_fused=False)
    with pytest.raises(ValueError, match="use_fused: expected True with turns='alternating'"):
        model(input_ids=ids, attention_mask=mask, labels=labels)


# BituneChat


@pytest.fixture(scope="module")
def tokenizer():
    tok = byte_tokenizer()
    tok.chat_template = TEMPLATE
    return tok


@pytest.fixture(scope="module")
def model():
    return bitune_model(base=base_model(vocab_size=272, max_position_embeddings=1024)).eval()


SAYS = ["hi there", "why?", "and then"]
OPTIONS = dict(max_new_tokens=6, do_sample=False)


def test_recompute_is_a_fresh_prompt(model, tokenizer):
    chat = BituneChat(model, tokenizer, messages=[{"role": "system", "content": "be brief"}])
    for text in SAYS:
        before = copy.deepcopy(chat.messages)
        answer = chat.send(text, **OPTIONS)
        prompt = tokenizer.apply_chat_template(
            [*before, {"role": "user", "content": text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**prompt, **OPTIONS)[0, prompt["input_ids"].shape[1] :]
        assert answer == tokenizer.decode(out, skip_special_tokens=True)
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 3]


@pytest.mark.parametrize("fused", [True, False])
def test_alternating_reads_each_turn_over_the_cache(model, tokenizer, fused):
    chat = BituneChat(model, tokenizer, "alternating")
    with model.use_schedule(use_fused=fused):
        answers = [chat.send(text, **OPTIONS) for text in SAYS]
    turns = chat._turns
    ids = torch.tensor([[t for prompt, answer in turns for t in (*prompt, *answer)]])
    text = tokenizer.decode(ids[0])
    assert text.startswith("<user>hi there</s>\n<assistant>") and text.count("<assistant>") == 3
    logits, _ = turn_by_turn(model, ids, [(len(p), len(a)) for p, a in turns])
    at = 0
    for (_, tokens), answer in zip(turns, answers, strict=True):
        greedy = logits[0, at : at + len(tokens)].argmax(-1).tolist()
        assert greedy == tokens and tokenizer.decode(tokens, skip_special_tokens=True) == answer
        at += 1 + len(tokens)


def test_a_chat_goes_on_from_messages_and_after_a_failure(model, tokenizer):
    class Broken:
        def put(self, value):
            raise RuntimeError("the line is down")

        def end(self):
            pass

    whole = BituneChat(model, tokenizer, "alternating")
    first = whole.send(SAYS[0], **OPTIONS)
    messages = copy.deepcopy(whole.messages)
    with pytest.raises(RuntimeError, match="line is down"):
        whole.send("lost", streamer=Broken(), **OPTIONS)
    assert whole.messages == messages and whole._cache is None
    second = whole.send(SAYS[1], **OPTIONS)
    undisturbed = BituneChat(model, tokenizer, "alternating")
    assert [undisturbed.send(text, **OPTIONS) for text in SAYS[:2]] == [first, second]
    # a conversation from elsewhere: its answers are tokenized anew and end as the template says
    given = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    chat = BituneChat(model, tokenizer, "alternating", messages=given)
    chat.send("e", **OPTIONS)
    texts = [tuple(tokenizer.decode(part) for part in turn) for turn in chat._turns]
    assert texts[:2] == [("<user>a</s>\n<assistant>", "b</s>"), ("\n<user>c</s>\n<assistant>", "d</s>")]
    assert texts[2][0] == "\n<user>e</s>\n<assistant>"
    # an end token that the tokenizer names nowhere, as those of chat templates on base models
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<end>", special=True)])
    tokenizer.chat_template = TEMPLATE.replace("{{ eos_token }}", "<end>")
    chat = BituneChat(model, tokenizer, "alternating", messages=given[:2])
    chat.send("c", **OPTIONS)
    texts = [tuple(tokenizer.decode(part) for part in turn) for turn in chat._turns]
    assert texts[0] == ("<user>a<end>\n<assistant>", "b<end>") and texts[1][0] == "\n<user>c<end>\n<assistant>"


@pytest.mark.parametrize("turns", ["recompute", "alternating"])
def test_turns_may_be_taken_back_or_changed(turns, model, tokenizer, monkeypatch):
    read = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **options: read.append(options["input_ids"]) or generate(**options))
    chat = BituneChat(model, tokenizer, turns)
    for text in SAYS:
        chat.send(text, **OPTIONS)
    del chat.messages[-4:]
    chat.messages[1]["content"] = "No."
    answer = chat.send("why not?", **OPTIONS)
    told = [{"role": "user", "content": SAYS[0]}, {"role": "assistant", "content": "No."}]
    assert BituneChat(model, tokenizer, turns, told).send("why not?", **OPTIONS) == answer
    assert torch.equal(*read[-2:]) and len(chat.messages) == 4
    chat.messages[-1]["role"] = "user"
    with pytest.raises(ValueError, match="messages: expected user and assistant in turns"):
        chat.send("x", **OPTIONS)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ({"text": "  "}, {}, "text: expected what the user says"),
        ({"text": None}, {}, "text: expected what the user says"),
        ({"text": "x"}, {"num_return_sequences": 2}, "num_return_sequences: expected 1"),
        ({"text": "x"}, {"num_beams": 2}, "num_beams: expected 1"),
        ({"text": "x"}, {"generation_config": GenerationConfig(num_beams=2)}, "num_beams: expected 1 in a chat, got 2"),
        ({"text": "x"}, {"past_key_values": DynamicCache()}, "past_key_values: expected None"),
        ({"text": "x" * 1000}, {}, "text: expected a conversation of at most 1024 tokens, its next answer"),
        ({"text": "x"}, {"use_cache": False}, "use_cache: expected True"),
        ({"text": "x"}, {"prompt_lookup_num_tokens": 2}, "expected no assisted decoding"),
        ({"text": "x"}, {"cache_implementation": "static"}, "cache_implementation: expected None in an alternating"),
    ],
)
def test_what_a_chat_refuses_leaves_it_usable(model, tokenizer, arguments, options, message):
    chat = BituneChat(model, tokenizer, "alternating")
    first = chat.send("hello", **OPTIONS)
    with pytest.raises(ValueError, match=message):
        chat.send(**arguments, **OPTIONS | options)
    again = BituneChat(model, tokenizer, "alternating")
    assert again.send("hello", **OPTIONS) == first and again.send("so?", **OPTIONS) == chat.send("so?", **OPTIONS)


def test_a_conversation_may_fill_the_model(model, tokenizer):
    chat = BituneChat(model, tokenizer)
    around = len(chat._tokens(chat._render([{"role": "user", "content": "x"}]))) - 1
    text = "x" * (1024 - around - 2)
    with pytest.raises(ValueError, match=r"its next answer \(3\) included, got 1022"):
        chat.send(text, max_new_tokens=3)
    chat.send(text, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"its next answer \(1\) included, got 1024"):
        BituneChat(model, tokenizer).send(text + "xx")


def test_the_models_own_options_are_those_of_a_chat(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model, "generation_config", GenerationConfig(num_beams=2, max_new_tokens=1020))
    with pytest.raises(ValueError, match="num_beams: expected 1 in a chat, got 2"):
        BituneChat(model, tokenizer).send("x")
    with pytest.raises(ValueError, match=r"its next answer \(1020\) included"):
        BituneChat(model, tokenizer).send("x", num_beams=1)


@pytest.mark.parametrize("turns", ["one", "recompute", "alternating"])
def test_a_chat_reads_turns_as_the_model_was_trained(turns, tokenizer):
    chat = BituneChat(bitune_model(turns=turns), tokenizer)
    assert chat.turns == ("recompute" if turns == "one" else turns)


@pytest.mark.parametrize("turns", ["recompute", "alternating"])
def test_a_chat_reads_no_turn_without_its_streams(turns, model, tokenizer):
    chat = BituneChat(model, tokenizer, turns)
    chat.send("hello", **OPTIONS)
    for off in (model.disable_adapter, model.disable_bitune):
        with off(), pytest.raises(ValueError, match="model: expected its streams to be on"):
            chat.send("so?", **OPTIONS)
    assert len(chat.messages) == 2


def test_a_chat_is_made_of_the_right_things(model, tokenizer):
    for changes, error in (
        ({"model": model.get_base_model()}, "model: expected a BituneModel"),
        ({"tokenizer": byte_tokenizer()}, "tokenizer: expected one with a chat template"),
        ({"turns": "none"}, "turns: expected one of recompute, alternating"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages: expected user and assistant in turns"),
        ({"messages": ["hi"]}, "messages: expected each with a role and a text as content, got 'hi'"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]},
            "messages: expected each with a role and a text as content, got {'role': 'assistant'",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            BituneChat(**{"model": model, "tokenizer": tokenizer} | changes)
    forgetful = byte_tokenizer()
    forgetful.chat_template = TEMPLATE.replace("messages %}", "messages[-1:] %}")
    chat = BituneChat(model, forgetful, "alternating")
    chat.send("hello", **OPTIONS)
    with pytest.raises(ValueError, match="turns: expected 'recompute' for a chat template"):
        chat.send("so?", **OPTIONS)
