"""Every model family: one pass over both streams against the three calls of the paper, on the same weights.

Three references, from near to far: the package's three-pass schedule, the family's own plain forward (mixing
weight 0 is the causal model), and its forward under a prefix-LM mask (the variant with one stream).
"""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from bitune_kernels import BituneConfig, config, get_bitune_model

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from families import ATTENTION, BY_ID, FAMILIES, REFUSED, Family  # noqa: E402

PROMPTS, ANSWERS = (1, 2, 7), (3, 5, 2)
WIDTH = 9
VOCAB = 101
BF16 = ("llama", "gemma2", "gpt_neox", "olmo2", "phi3")
CHECKPOINTED_THREE_PASS = ("llama", "gemma2", "opt")


def lora(family: Family, **options):
    targets = family.targets if isinstance(family.targets, str) else list(family.targets)
    options = dict(r=4, lora_alpha=8, target_modules=targets) | options
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


def randomize(model, scale: float = 0.1) -> None:
    """Give both adapters different weights, and every theta its own value of either sign."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            parts = name.split(".")
            if "causal" in parts or "bidir" in parts:
                p.add_(scale * torch.randn(p.shape, generator=generator))
            elif name.startswith("mixing.gate"):
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
            elif ".theta_" in f".{name}":
                sign = 1 - 2 * (torch.arange(p.numel()) % 2).view(p.shape)
                p.copy_(0.01 * sign * (0.4 + 2 * torch.rand(p.shape, generator=generator)))


def attach(family: Family, use_fused: bool, *, adapters="lora", dtype=torch.float32, **options):
    adapters = lora(family) if adapters == "lora" else adapters
    adapters = copy.deepcopy(adapters)
    return get_bitune_model(family.build(dtype), BituneConfig(peft=adapters, use_fused=use_fused, **options))


def attach_pair(family: Family, *, scale: float = 0.1, **options):
    """The same Bitune model twice: in one pass and in three."""
    one, three = attach(family, True, **options), attach(family, False, **options)
    randomize(one, scale)
    three.load_state_dict(one.state_dict())
    # What one pass leaves frozen, because the bidirectional stream ends before it, must get no gradient here.
    for name, p in three.named_parameters():
        if "bidir" in name.split("."):
            p.requires_grad_(True)
    return SimpleNamespace(one=one.eval(), three=three.eval(), family=family)


@dataclass
class Batch:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def ragged(padding: str) -> Batch:
    ids = torch.randint(1, VOCAB, (len(PROMPTS), WIDTH), generator=torch.Generator().manual_seed(2))
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for b, (p, a) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        first = WIDTH - p - a if padding == "left" else 0
        mask[b, first : first + p + a] = 1
        labels[b, first + p : first + p + a] = ids[b, first + p : first + p + a]
    return Batch(ids * mask, mask, labels)


def step(model, batch: Batch, *, train: Family | None = None, checkpointing: bool | None = None):
    """Loss, logits and the gradient of every parameter. ``checkpointing``: None or its use_reentrant."""
    model.train(train is not None)
    if train is not None:
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in train.random_in_training:
                module.eval()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    model.zero_grad(set_to_none=True)
    try:
        out = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
        out.loss.backward()
    finally:
        if checkpointing is not None:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
        model.eval()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return SimpleNamespace(loss=out.loss.detach(), logits=out.logits.detach(), grads=grads)


def assert_same_step(found, expected, gradients: float = 1e-5) -> None:
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    errors = {}
    for name in found.grads.keys() | expected.grads.keys():
        f, e = (x.grads[name] if name in x.grads else torch.zeros(()) for x in (found, expected))
        size = float(e.norm())
        errors[name] = float((f - e).norm()) / (size or 1.0)
    worst = max(errors, key=errors.get)
    assert errors[worst] <= gradients, f"{worst}: relative error {errors[worst]:.1e} of its gradient"


def assert_meaningful(step, model) -> None:
    """Nothing above would be worth comparing if a part of the model had no gradient."""
    missing = [n for n, p in model.named_parameters() if p.requires_grad and n not in step.grads]
    assert not missing, f"trained parameters without a gradient: {missing}"
    for part in (".causal", ".bidir", "theta_k", "theta_v"):
        norms = [float(g.norm()) for n, g in step.grads.items() if part in n]
        assert norms and max(norms) > 1e-4, f"{part}: gradients {norms}"


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda f: f.id)
def pair(request):
    yield attach_pair(request.param)
    gc.collect()


@pytest.fixture(scope="module")
def three_passes(pair):
    return {padding: step(pair.three, ragged(padding)) for padding in ("left", "right")}


@pytest.mark.parametrize("padding", ["left", "right"])
def test_one_pass_equals_three(pair, three_passes, padding):
    found = step(pair.one, ragged(padding))
    assert_meaningful(found, pair.one)
    assert_same_step(found, three_passes[padding], pair.family.gradients)


def test_last_layer_is_trimmed(pair):
    rows = []
    last = pair.one._hooks.structure.trim.layer

    def record(module, args, output):
        rows.append((output[0] if isinstance(output, tuple) else output).shape[-2])

    handle = last.register_forward_hook(record)
    with torch.no_grad():
        batch = ragged("left")
        pair.one(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    handle.remove()
    prompt = sum(PROMPTS) - len(PROMPTS)
    answer = sum(ANSWERS) + len(ANSWERS)
    assert rows == [answer if pair.family.trimmed else 2 * prompt + answer]


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
def test_checkpointed_one_pass_equals_three(pair, three_passes, use_reentrant):
    if use_reentrant and not pair.family.reentrant:
        with pytest.raises(ValueError, match="use_reentrant"):
            step(pair.one, ragged("left"), train=pair.family, checkpointing=True)
        return
    found = step(pair.one, ragged("left"), train=pair.family, checkpointing=use_reentrant)
    assert_same_step(found, three_passes["left"], pair.family.gradients)


@pytest.mark.parametrize("name", CHECKPOINTED_THREE_PASS)
def test_checkpointed_three_passes(name):
    model = attach(BY_ID[name], False)
    randomize(model)
    expected = step(model, ragged("right"))
    assert_same_step(step(model, ragged("right"), train=BY_ID[name], checkpointing=False), expected)


def generate(model, ids, mask=None):
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def test_generation(pair):
    width = max(PROMPTS)
    ids = torch.randint(1, VOCAB, (len(PROMPTS), width), generator=torch.Generator().manual_seed(3))
    mask = torch.stack([(torch.arange(width) >= width - p).long() for p in PROMPTS])
    ids = ids * mask
    tokens, logits = generate(pair.one, ids, mask)
    three_tokens, three_logits = generate(pair.three, ids, mask)
    # The tokens of a random model can agree by chance; the logits behind them can't.
    torch.testing.assert_close(logits, three_logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(tokens, three_tokens)
    for b, p in enumerate(PROMPTS):
        alone, alone_logits = generate(pair.one, ids[b : b + 1, width - p :])
        torch.testing.assert_close(logits[b : b + 1], alone_logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(tokens[b : b + 1], alone)


def plain_model(pair):
    """The family's own model with the causal adapter's weights, as PEFT alone would run it."""
    model = peft.get_peft_model(pair.family.build(), lora(pair.family), adapter_name="causal")
    weights = {n: p for n, p in pair.one.state_dict().items() if n in model.state_dict()}
    assert len(weights) == len(model.state_dict())
    model.load_state_dict(weights)
    return model.eval()


def test_alpha_zero_is_the_causal_model(pair):
    batch = ragged("right")
    thetas = {n: p.detach().clone() for n, p in pair.one.mixing.named_parameters()}
    with torch.no_grad():
        for p in pair.one.mixing.parameters():
            p.zero_()
        found = pair.one(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
        expected = plain_model(pair)(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
        pair.one.mixing.load_state_dict(thetas)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    for b, (p, a) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        rows = slice(p - 1, p + a)
        torch.testing.assert_close(found.logits[b, rows], expected.logits[b, rows], rtol=1e-5, atol=1e-5)


def test_one_bidirectional_stream_is_a_prefix_lm(pair):
    # The family's own forward under a mask that shows the prompt (less its last token) to all of the prompt.
    prompt, length = 7, 9
    ids = torch.randint(1, VOCAB, (1, length), generator=torch.Generator().manual_seed(4))
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    see = (j <= i) | ((i < prompt - 1) & (j < prompt - 1))

    def additive(window=None):
        seen = see if window is None else see & ((i - j).abs() < window)
        return torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)

    plain = plain_model(pair)
    traits = plain.get_base_model().config
    window = getattr(traits, "sliding_window", None) or None
    if len(set(getattr(traits, "layer_types", None) or [])) > 1:
        mask = {"full_attention": additive(), "sliding_attention": additive(window)}
    else:
        mask = additive(window)
    model = attach(pair.family, True, variant="naive_bidir")
    model.load_state_dict({n: p for n, p in pair.one.state_dict().items() if n in model.state_dict()})
    with torch.no_grad():
        found = model.eval()(ids, prompt_lengths=[prompt])
        options = dict(attention_mask=mask, position_ids=torch.arange(length)[None], use_cache=False)
        expected = plain.get_base_model()(ids, **options)
    torch.testing.assert_close(found.logits[:, prompt - 1 :], expected.logits[:, prompt - 1 :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BF16)
def test_bfloat16_is_as_exact_in_one_pass_as_in_three(name):
    # The oracle is float32 with the weights that were rounded to bfloat16.
    family = BY_ID[name]
    low, exact = attach_pair(family, dtype=torch.bfloat16), attach(family, True)
    exact.load_state_dict(low.one.state_dict())
    batch = ragged("left")
    results = [step(m, batch) for m in (exact, low.one, low.three)]
    eps = torch.finfo(torch.bfloat16).eps

    def check(what, oracle, one, three):
        one, three = (float((x.float() - oracle).norm() / oracle.norm()) for x in (one, three))
        assert one <= 2 * three + 2 * eps, f"{what}: error {one:.1e} in one pass, {three:.1e} in three"

    for what in ("loss", "logits"):
        check(what, *(getattr(r, what) for r in results))
    for part in ("causal", "bidir", "theta"):
        names = [n for n in results[0].grads if part in n and n in results[2].grads]
        check(part, *(torch.cat([r.grads[n].flatten() for n in names]) for r in results))


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])  # softcap and sinks: the formula's own backend
def test_autocast(name):
    models, batch = attach_pair(BY_ID[name]), ragged("left")
    exact = step(models.three, batch)
    with torch.autocast("cpu", torch.bfloat16):
        errors = [float((step(m, batch).loss - exact.loss).abs() / exact.loss) for m in (models.one, models.three)]
    assert max(errors) < 0.01 and errors[0] <= 2 * errors[1] + 0.004, errors


@pytest.mark.parametrize(("family", "reason"), REFUSED, ids=lambda x: getattr(x, "id", ""))
def test_refused_and_left_as_it_was(family, reason):
    model = family.build()
    ids = torch.arange(1, 9).view(2, 4)
    with torch.no_grad():
        before = model(ids).logits
    modules = dict(model.named_modules())
    trainable = [p.requires_grad for p in model.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    for use_fused in (True, False):
        with pytest.raises(ValueError, match=reason):
            get_bitune_model(model, BituneConfig(peft=lora(family), use_fused=use_fused))
    assert dict(model.named_modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_images_that_see_themselves_are_refused():
    import transformers

    text = BY_ID["gemma3_text"].build().config.to_dict()
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8)
    sizes = dict(text_config=text, vision_config=vision | dict(patch_size=4), mm_tokens_per_image=1)
    base = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**sizes))
    model = get_bitune_model(base, BituneConfig(peft=lora(LLAMA, target_modules=r".*language_model.*\.q_proj")))
    ids, types = torch.arange(1, 9)[None], torch.zeros(1, 8, dtype=torch.long)
    labels = torch.where(ids > 5, ids, -100)
    model(input_ids=ids, labels=labels, token_type_ids=types)  # its training asks for them
    types[0, 2:4] = 1
    with pytest.raises(ValueError, match=r"^token_type_ids: expected no further input per token"):
        model(input_ids=ids, labels=labels, token_type_ids=types)
    for call in (model.eval(), model.generate):
        with torch.no_grad(), pytest.raises(ValueError, match=r"^token_type_ids: expected no further input per token"):
            call(input_ids=ids, token_type_ids=types)


@pytest.mark.parametrize("name", ["gemma3_text", "exaone4"])
def test_norms_of_heads_in_front_of_the_tokens_are_refused(name):
    adapters = lora(BY_ID[name], modules_to_save=["q_norm"])
    with pytest.raises(ValueError, match=r"expected all 18 or .* heads in front of the tokens \(norms of"):
        attach(BY_ID[name], True, adapters=adapters)


LLAMA, PHI, GEMMA = BY_ID["llama"], BY_ID["phi"], BY_ID["gemma"]
LLAMA_IA3 = ["q_proj", "k_proj", "v_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    id: str
    family: Family
    adapters: object
    scale: float = 0.1
    gradients: float = 1e-5


TUNERS = (
    Case("dora", LLAMA, lora(LLAMA, use_dora=True)),
    Case("dora", PHI, lora(PHI, use_dora=True)),
    Case("dora", GEMMA, lora(GEMMA, use_dora=True)),
    Case("ia3", LLAMA, peft.IA3Config(target_modules=LLAMA_IA3, feedforward_modules=["down_proj"])),
    Case("ia3", GEMMA, peft.IA3Config(target_modules=LLAMA_IA3, feedforward_modules=["down_proj"])),
    Case(
        "ia3",
        PHI,
        peft.IA3Config(target_modules=["k_proj", "v_proj", "dense", "fc2"], feedforward_modules=["fc2"]),
    ),
    Case("rslora_bias", LLAMA, lora(LLAMA, use_rslora=True, lora_bias=True)),
    Case(  # its matrices are no linear layers
        "block_diagonal",
        LLAMA,
        lora(LLAMA, use_bdlora=peft.BdLoraConfig(target_modules_bd_b=["o_proj"], nblocks=2, match_strict=False)),
    ),
    Case("vera", LLAMA, peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj", "down_proj"])),
    Case("loha", LLAMA, peft.LoHaConfig(r=4, alpha=4, target_modules=[*ATTENTION, "gate_proj", "down_proj"])),
    Case("embedding", LLAMA, lora(LLAMA, target_modules=["embed_tokens", *ATTENTION])),
    # its vectors are one parameter, which a layer shares that the bidirectional stream never reaches
    Case(
        "vblora",
        LLAMA,
        peft.VBLoRAConfig(target_modules=["q_proj", "o_proj"], vector_length=8, num_vectors=16),
        gradients=3e-5,
    ),
    Case("full", LLAMA, None, scale=0.02),
)


@pytest.mark.parametrize("case", TUNERS, ids=lambda c: f"{c.id}-{c.family.id}")
@pytest.mark.parametrize("padding", ["left", "right"])
def test_tuners(case, padding):
    models = attach_pair(case.family, adapters=case.adapters, scale=case.scale)
    found, expected = (step(m, ragged(padding)) for m in (models.one, models.three))
    assert_meaningful(found, models.one)
    assert_same_step(found, expected, case.gradients)


@pytest.mark.parametrize("use_dora", [False, True])
def test_trained_biases_of_the_base_layers(use_dora):
    models = attach_pair(PHI, adapters=lora(PHI, bias="all", use_dora=use_dora), variant="shared_weights")
    found, expected = (step(m, ragged("left")) for m in (models.one, models.three))
    assert any(n.endswith("base_layer.bias") for n in found.grads)
    assert_same_step(found, expected)


@dataclass(frozen=True)
class Variant:
    id: str
    options: dict
    gradients: float = 1e-5


VARIANTS = (
    *(Variant(name, dict(variant=name)) for name in config.VARIANTS),
    Variant("dynamic", dict(dynamic_mixing=True)),
    Variant("skip_first", dict(skip_bidir=1)),
    Variant("skip_all_but_first", dict(skip_bidir=-1)),
    Variant("relu", dict(mixing="relu")),
    Variant("per_head", dict(mixing_granularity="head")),
    # One theta sums terms of either sign over all layers. In float64 both schedules agree exactly.
    Variant("global", dict(mixing_granularity="global"), gradients=1e-4),
)


@pytest.mark.parametrize("case", VARIANTS, ids=lambda c: c.id)
def test_variants(case):
    models = attach_pair(LLAMA, **case.options)
    found, expected = (step(m, ragged("left")) for m in (models.one, models.three))
    assert_same_step(found, expected, case.gradients)


SAME_PARAMETERS = [c for c in VARIANTS[1:] if "mixing_granularity" not in c.options]


def test_what_is_trained_has_a_gradient_where_layers_share_keys_and_values():
    """A gate of a layer that takes another one's mix has none, for which distributed training would wait."""
    model = attach(BY_ID["gemma4_shared_kv"], True, dynamic_mixing=True).train()
    batch = ragged("right")
    model(**vars(batch)).loss.backward()
    assert [g.requires_grad for g in model.mixing.gate] == [True, True, False, False]
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("case", SAME_PARAMETERS, ids=lambda c: c.id)
def test_variants_differ(case):
    # The comparison above would hold for options that both schedules ignore.
    batch, models = ragged("left"), (attach(LLAMA, True), attach(LLAMA, True, **case.options))
    randomize(models[0])
    weights = models[0].state_dict()
    randomize(models[1])  # what the first one has not
    models[1].load_state_dict({n: weights.get(n, x) for n, x in models[1].state_dict().items()})
    a, b = (step(m, batch).logits for m in models)
    assert float((a - b).norm() / a.norm()) > 1e-3
