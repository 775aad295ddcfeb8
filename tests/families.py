"""The model families that the tests cover, as data: tiny random models, each with its traits.

Sliding windows are 4, so that they cut into prompts of 7 tokens, and layers with and without a window
alternate where the family can. Scales, softcaps, key/value groups, partial rotary embeddings and biases are
set away from the values that would hide a mistake.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SIZES = dict(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
GQA = dict(num_key_value_heads=2)
WINDOW = dict(sliding_window=4)
# The last layer is the one that is trimmed, so it has the window.
MIXED_LAYERS = WINDOW | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"])
QWEN3_MOE = GQA | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)


@dataclass(frozen=True)
class Family:
    """One family of causal LMs.

    Attributes:
        id: the name of the test case, and the model type of transformers unless ``model_type`` is given.
        options: of the config, beside ``SIZES``.
        targets: ``target_modules`` of the adapters.
        gradients: relative error per tensor that one pass may have against three, in float32.
        reason: why ``gradients`` is above 1e-5.
        trimmed: whether the last layer drops the prompt rows once it has their keys and values.
        reentrant: whether transformers has right gradients under reentrant checkpointing (else refused).
        random_in_training: names of submodules that sample in training mode and stay in evaluation mode here.
    """

    id: str
    options: dict = field(default_factory=dict)
    model_type: str | None = None
    targets: str | tuple[str, ...] = "all-linear"
    gradients: float = 1e-5
    reason: str = ""
    trimmed: bool = True
    reentrant: bool = True
    random_in_training: tuple[str, ...] = ()

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0, **options):
        """The model, with the same random weights for the same seed; ``options`` override the config's."""
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(seed)
        config = AutoConfig.for_model(self.model_type or self.id, **SIZES | self.options | options)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for p in model.parameters():
                # The usual 0.02 makes attention uniform and the logits flat, which hides mistakes in both.
                if p.ndim > 1:
                    p.normal_(std=0.2)
                else:
                    p.add_(torch.randn_like(p) * 0.1)
        model.generation_config.eos_token_id = None
        return model.to(dtype).eval()


FAMILIES = (
    Family("llama", GQA),
    Family("mistral", GQA | WINDOW),
    Family("qwen2", GQA | MIXED_LAYERS | dict(use_sliding_window=True)),
    Family("qwen3", GQA | MIXED_LAYERS | dict(use_sliding_window=True, head_dim=12)),
    Family("gemma", dict(num_key_value_heads=1, head_dim=16)),
    Family(
        "gemma2",
        GQA
        | MIXED_LAYERS
        | dict(head_dim=16, query_pre_attn_scalar=11, attn_logit_softcapping=2.0, final_logit_softcapping=5.0)
        # transformers 5.17 takes SDPA by default, which drops the softcap in silence
        | dict(attn_implementation="eager"),
    ),
    Family("gemma3_text", GQA | MIXED_LAYERS | dict(head_dim=16, query_pre_attn_scalar=11)),
    Family(
        "gemma4_text",
        GQA
        | WINDOW
        | dict(
            # its last layer can't have a window
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            head_dim=8,
            global_head_dim=16,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=101,
        ),
    ),
    Family(
        "gemma4_shared_kv",
        GQA
        | WINDOW
        | dict(
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            head_dim=8,
            global_head_dim=16,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=101,
        ),
        "gemma4_text",
        gradients=1e-4,
        reason="rounding over four layers with two residual branches each: 1e-14 with everything in float64",
        reentrant=False,
    ),
    Family("phi", GQA | dict(partial_rotary_factor=0.5, qk_layernorm=True, resid_pdrop=0.0, embd_pdrop=0.0)),
    Family("phi3", GQA | WINDOW | dict(original_max_position_embeddings=64)),
    Family("olmo", GQA | dict(clip_qkv=0.8)),
    Family("olmo2", GQA),
    Family("olmo3", GQA | MIXED_LAYERS),
    Family("gpt_neox", dict(rotary_pct=0.5)),
    # its backbone reshapes the result to the number of rows that it was given
    Family("gpt2", dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0), trimmed=False),
    Family("opt", dict(ffn_dim=48, dropout=0.0, word_embed_proj_dim=24)),
    Family(
        "granite",
        GQA | dict(embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.7, attention_multiplier=0.5),
    ),
    Family(
        "granitemoe",
        GQA | dict(num_local_experts=4, num_experts_per_tok=2, attention_multiplier=0.5, residual_multiplier=0.7),
        targets=ATTENTION,
    ),
    Family("cohere", GQA | dict(use_qk_norm=True, logit_scale=0.5)),
    Family("cohere2", GQA | MIXED_LAYERS | dict(logit_scale=0.5)),
    Family("starcoder2", GQA | WINDOW),
    Family("stablelm", GQA | dict(use_qkv_bias=True, qk_layernorm=True, use_parallel_residual=True)),
    Family("smollm3", GQA | MIXED_LAYERS | dict(use_sliding_window=True, no_rope_layers=[1, 0, 1])),
    Family("glm", GQA | dict(head_dim=8, attention_dropout=0.0)),
    Family("glm4", GQA | dict(head_dim=8)),
    Family("exaone4", GQA | MIXED_LAYERS),
    Family("nemotron", GQA | dict(head_dim=8)),
    Family("helium", GQA | dict(head_dim=8)),
    Family("ernie4_5", GQA | dict(head_dim=8, use_bias=True)),
    Family("seed_oss", GQA | dict(head_dim=8, attention_dropout=0.0, residual_dropout=0.0)),
    Family("apertus", GQA),
    Family("bitnet", GQA),
    Family("hunyuan_v1_dense", GQA | dict(head_dim=8)),
    Family("ministral3", GQA | dict(head_dim=8)),
    Family("arcee", GQA),
    Family("nanochat", GQA),
    Family(
        "vaultgemma",
        GQA
        | MIXED_LAYERS
        | dict(head_dim=16, query_pre_attn_scalar=11, attn_logit_softcapping=2.0, attn_implementation="eager"),
    ),
    Family("modernbert-decoder", MIXED_LAYERS | dict(local_attention=8, bos_token_id=1, eos_token_id=2)),
    Family("mixtral", GQA | WINDOW | dict(num_local_experts=4), targets=ATTENTION),
    Family("qwen2_moe", QWEN3_MOE | dict(shared_expert_intermediate_size=24), targets=ATTENTION),
    Family("olmoe", GQA | dict(num_experts=4, num_experts_per_tok=2), targets=ATTENTION),
    Family(
        "glm4_moe",
        GQA
        | dict(head_dim=8, n_routed_experts=4, num_experts_per_tok=2)
        | dict(moe_intermediate_size=24, first_k_dense_replace=1),
        targets=ATTENTION,
    ),
    Family("ernie4_5_moe", GQA | dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=24), targets=ATTENTION),
    Family("minimax_m2", GQA | dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2), targets=ATTENTION),
    Family(
        "qwen3_moe",
        QWEN3_MOE | WINDOW | dict(use_sliding_window=True),
        targets=ATTENTION,
    ),
    Family("phimoe", GQA | WINDOW | dict(num_local_experts=4), targets=ATTENTION, random_in_training=("router",)),
    Family(
        "gpt_oss",
        GQA | MIXED_LAYERS | dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2),
        targets=ATTENTION,
    ),
)

BY_ID = {f.id: f for f in FAMILIES}

# Families that can't be used, and what the error says.
REFUSED = (
    (
        Family("falcon", dict(num_kv_heads=4, hidden_dropout=0.0, attention_dropout=0.0)),
        "computes attention itself",
    ),
    (Family("gptj", dict(n_inner=48, rotary_dim=4)), "computes attention itself"),
    (
        Family(
            "deepseek_v3",
            dict(num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=8, qk_rope_head_dim=8)
            | dict(qk_nope_head_dim=8, v_head_dim=16, first_k_dense_replace=3),
        ),
        r"a mixed cache has .*got a cache of \[\(1, 8\), \(1, 8\)\]",
    ),
    (  # a state-space layer beside each attention
        Family(
            "falcon_h1",
            GQA | dict(head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1),
            targets=("q_proj", "v_proj"),
        ),
        "something beside its attention looks from one token to others",
    ),
    (Family("doge", GQA), "it makes an attention mask of its own from the one that it is given"),
    (Family("llama4_text", GQA | dict(head_dim=8, intermediate_size_mlp=48, num_local_experts=2)), "is chunked"),
    (
        Family("qwen3_next", QWEN3_MOE | dict(layer_types=["linear_attention", "full_attention", "linear_attention"])),
        "only 1 of 3 layers use the registered attention function",
    ),
    (Family("bert", dict(is_decoder=False), targets=("query", "value")), "its attention is not causal"),
    (  # its positions begin behind the id of padding
        Family("roberta", dict(is_decoder=True), targets=("query", "value")),
        "its positions don't count 0, 1, 2, ... from the first token",
    ),
    (Family("mixtral_experts", GQA | dict(num_local_experts=4), "mixtral"), "expert parameters"),
    (Family("qwen3_moe_experts", QWEN3_MOE, "qwen3_moe"), "expert parameters"),
)
