"""No call leaves anything behind: in any sequence each gives what it gives on a model that was made just before."""

from __future__ import annotations

import random
from threading import Thread

import pytest
import torch
from torch import nn

from bitune_kernels.modeling import encode, passes, score_choices
from bitune_kernels.training import selective_checkpointing
from tests.tiny import base_model, bitune_model, lora, ragged_batch

KINDS = {
    "bitune": {},
    "three": {"use_fused": False},
    "dora": {"peft": lora(use_dora=True)},
    "one stream": {"variant": "single_stream", "loss_chunk_rows": 3},
}
PROMPTS = torch.tensor([[5, 6, 7, 8], [9, 3, 4, 5]])
OPTIONS = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)


def train(model, side="right"):
    ids, mask, labels = ragged_batch(side)
    model.train()
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    model.eval()
    return found


def recompute(model, **settings):
    model.gradient_checkpointing_enable(settings)
    model.enable_input_require_grads()
    try:
        return train(model)
    finally:
        model.disable_input_require_grads()
        model.gradient_checkpointing_disable()


def compiled(model):
    torch._dynamo.reset()
    return train(torch.compile(model, backend="eager"))


def read(model):
    with torch.no_grad():
        return [model(input_ids=PROMPTS, logits_to_keep=1).logits]


def answer(model, **options):
    return [model.generate(input_ids=PROMPTS, **OPTIONS, **options)]


def merged(model):
    with model.merged_decoding():
        return [*answer(model), *read(model), *answer(model)]


def disabled(model):
    with model.disable_adapter():
        return read(model)


def causal(model):
    with model.disable_bitune():
        return [*read(model), *answer(model)]


def other_schedule(model):
    with model.use_schedule(use_fused=not model.bitune_config.use_fused):
        return train(model)


def choices(model):
    return [torch.tensor(score_choices(model, PROMPTS.tolist(), [[[8], [4, 2]], [[3, 3, 3]]])[0])]


def broken(model, error=KeyboardInterrupt, call=train):
    """Ends in the middle of a layer."""

    def stop(module, args, output):
        raise error

    handle = model.get_base_model().model.layers[1].mlp.up_proj.register_forward_hook(stop)
    try:
        with pytest.raises(error):
            call(model)
    finally:
        handle.remove()
        model.zero_grad()
        model.eval()
    return []


def refused(model):
    with pytest.raises(ValueError, match="attention_mask"):
        model.generate(input_ids=PROMPTS, attention_mask=torch.tensor([[1, 1, 1, 0]] * 2), **OPTIONS)
    return []


def elsewhere(model):
    found = []
    thread = Thread(target=lambda: found.extend([*train(model), *read(model)]))
    thread.start()
    thread.join()
    return found


CALLS = {
    "train": train,
    "train left": lambda model: train(model, "left"),
    "recompute": lambda model: recompute(model, **selective_checkpointing()),
    "compiled": compiled,
    "read": read,
    "answer": answer,
    "beams": lambda model: answer(model, num_beams=2),
    "static": lambda model: answer(model, cache_implementation="static"),
    "merged": merged,
    "disabled": disabled,
    "causal": causal,
    "other schedule": other_schedule,
    "choices": choices,
    "encode": lambda model: [encode(model, PROMPTS)],
    "interrupted": broken,
    "failed": lambda model: broken(model, ZeroDivisionError),
    "interrupted answer": lambda model: broken(model, call=merged),
    "refused": refused,
    "elsewhere": elsewhere,
}


def made(kind):
    return bitune_model(base=base_model(num_hidden_layers=2), **KINDS[kind]).eval()


def state(model):
    return (
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
        # transformers leaves one on the embedding whenever checkpointing is switched on
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules() if not isinstance(m, nn.Embedding)],
        model.active_adapters,
        model.config._attn_implementation,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_call_gives_does_not_depend_on_those_before(kind):
    model, expected = made(kind), {}
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    sequence = [name for name in CALLS for _ in range(2) if name != "compiled"]  # which takes seconds
    sequence += ["compiled"] * (kind == "bitune")
    random.Random(kind).shuffle(sequence)
    for i, name in enumerate(sequence):
        told = f"{name} behind {', '.join(sequence[:i]) or 'nothing'}"
        before = state(model)
        if name not in expected:
            expected[name] = CALLS[name](made(kind))
        found = CALLS[name](model)
        assert passes.current() is None and passes.state.call is None, told
        assert state(model) == before, told
        for x, y in zip(found, expected[name], strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4, msg=lambda m, told=told: f"{told}: {m}")
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
