"""What one would use for Bitune's attention without this package: a call per stream, a mix, a call for the answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from bitune_kernels import SegmentPlan, mix_kv
from bitune_kernels.backends.flash import varlen

SDPA_KERNELS = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}
PEERS = (*SDPA_KERNELS, "varlen")


class SdpaCalls:
    """SDPA with one kernel forced, over [B, H, n, D]: the whole batch in each call where the lengths are equal.

    Samples of different lengths go one by one. Outputs stay the tensors that SDPA returned: joining them into packed
    rows would be a copy that a user of SDPA doesn't make.
    """

    def __init__(self, name: str, plan: SegmentPlan, device: torch.device):
        self.name, self.plan = name, plan
        samples = list(zip(plan.prompt_lengths, plan.answer_lengths, strict=True))
        equal = len(set(samples)) == 1
        self.groups = [(len(samples), *samples[0])] if equal else [(1, n, a) for n, a in samples]
        self.masks = {(n, a): self._answer_mask(n, a, device) for _, n, a in self.groups}

    def _answer_mask(self, n: int, a: int, device: torch.device):
        if a <= 1:
            return None
        if self.name == "sdpa-flash":
            return causal_lower_right(a, n + a)
        # is_causal counts from the first key: with the prompt before the answer only a mask says what is seen
        return torch.ones(a, n + a, dtype=torch.bool, device=device).tril(n)

    def __call__(self, q, k, v, alpha_k=None, alpha_v=None, caches=None) -> list[tuple[slice, torch.Tensor]]:
        """Outputs [B, H, n, D] of each call, with their rows of [bidir prompts | causal prompts | answers].

        Args:
            q, k, v: [T, heads, head_dim] as in ``bitune_attention``; rows that stand once serve both streams.
            caches: k and v [N + A, num_heads_kv, head_dim], sample by sample. The answer's keys are written there
                and read from there, without a second copy.
        """
        outputs = []
        with sdpa_kernel(SDPA_KERNELS[self.name]):
            for group in self._places():
                q_bidir, k_bidir, v_bidir = (group.take(x, group.bidir) for x in (q, k, v))
                q_causal, k_causal, v_causal = (group.take(x, group.causal) for x in (q, k, v))
                k_mixed, v_mixed = (
                    causal
                    if alpha is None
                    else mix_kv(causal.flatten(0, 1), bidir.flatten(0, 1), alpha).view_as(causal)
                    for causal, bidir, alpha in ((k_causal, k_bidir, alpha_k), (v_causal, v_bidir, alpha_v))
                )
                answer = [group.take(x, group.answer) for x in (q, k, v)]
                joined = []
                for i, parts in enumerate(((k_mixed, answer[1]), (v_mixed, answer[2]))):
                    if caches is None:
                        joined.append(torch.cat(parts, dim=1))
                    else:
                        joined.append(group.take(caches[i], group.slots))
                        joined[i][:, : group.n], joined[i][:, group.n :] = parts
                outputs += [
                    (group.bidir, _attend(q_bidir, k_bidir, v_bidir)),
                    (group.out_causal, _attend(q_causal, k_causal, v_causal, causal=True)),
                    (group.out_answer, _attend(answer[0], *joined, mask=self.masks[group.n, group.a])),
                ]
        return outputs

    def _places(self) -> Iterator[_Group]:
        N, start = self.plan.num_prompt, self.plan.answer_start
        p = r = 0  # prompt and answer rows before this group
        for size, n, a in self.groups:
            yield _Group(
                size,
                n,
                a,
                bidir=slice(p, p + size * n),
                causal=slice(start - N + p, start - N + p + size * n),
                answer=slice(start + r, start + r + size * a),
                slots=slice(p + r, p + r + size * (n + a)),
                out_causal=slice(N + p, N + p + size * n),
                out_answer=slice(2 * N + r, 2 * N + r + size * a),
            )
            p, r = p + size * n, r + size * a


@dataclass(frozen=True)
class _Group:
    """Where the rows of ``size`` samples of n prompt and a answer rows stand in inputs, cache and outputs."""

    size: int
    n: int
    a: int
    bidir: slice
    causal: slice
    answer: slice
    slots: slice
    out_causal: slice
    out_answer: slice

    def take(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """[T, H, D] -> [size, n, H, D], a view."""
        return x[rows].unflatten(0, (self.size, -1))


class VarlenCalls:
    """PyTorch's own packed FlashAttention: the whole batch in each call, whatever the lengths."""

    def __init__(self, plan: SegmentPlan, slots: torch.Tensor):
        """``slots``: where the rows of [prompts | answers] stand sample by sample, [N + A]."""
        self.plan, self.slots = plan, slots.split([plan.num_prompt, plan.num_answer])
        self.longest = max(n + a for n, a in zip(plan.prompt_lengths, plan.answer_lengths, strict=True))

    def __call__(self, q, k, v, alpha_k=None, alpha_v=None, caches=None) -> list[tuple[slice, torch.Tensor]]:
        """As ``SdpaCalls``, with outputs [rows, H, D]."""
        plan, N, start = self.plan, self.plan.num_prompt, self.plan.answer_start
        joined = []
        for i, (x, alpha) in enumerate(((k, alpha_k), (v, alpha_v))):
            mixed = x[:N] if alpha is None else mix_kv(x[start - N : start], x[:N], alpha)
            rows = torch.empty_like(x[: N + plan.num_answer]) if caches is None else caches[i]
            joined.append(rows.index_copy_(0, self.slots[0], mixed).index_copy_(0, self.slots[1], x[start:]))
        prompts = plan.cu_prompt, plan.cu_prompt, plan.max_prompt, plan.max_prompt
        answers = plan.cu_answer, plan.cu_prompt + plan.cu_answer, plan.max_answer, self.longest
        bidir, causal = ([x[rows] for x in (q, k, v)] for rows in (slice(0, N), slice(start - N, start)))
        calls = (bidir, prompts, (-1, -1)), (causal, prompts, (-1, 0)), ((q[start:], *joined), answers, (-1, 0))
        out_rows = slice(0, N), slice(N, 2 * N), slice(2 * N, None)
        return [
            (rows, varlen(*tensors, *lengths, window_size=window))
            for rows, (tensors, lengths, window) in zip(out_rows, calls, strict=True)
        ]


def _attend(q, k, v, mask=None, causal: bool = False) -> torch.Tensor:
    """[B, n, H, D] -> [B, H, n, D], as SDPA has it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
