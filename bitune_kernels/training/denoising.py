"""Texts as denoising samples, by the mixture of denoisers of UL2 (arXiv 2205.05131): data alone, for any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DataCollatorForSeq2Seq


@dataclass(frozen=True)
class Denoiser:
    """One way to corrupt a text.

    Args:
        mode: a key of ``UL2Collator.mode_tokens``; UL2 has "R" (regular), "X" (extreme) and "S" (sequential).
        corruption_rate: in (0, 1), the part of the tokens that is corrupted.
        mean_span_length: tokens of a corrupted span, at least 1; their number follows from it, at least one. None: the
            end of the text is the one span, of uniformly drawn length, and ``corruption_rate``, then at most 0.5, is
            its mean part.

    Raises:
        ValueError, TypeError: naming the field, what was expected and what came.
    """

    mode: str
    corruption_rate: float
    mean_span_length: float | None

    def __post_init__(self):
        for name in ("corruption_rate", "mean_span_length"):
            value = getattr(self, name)
            if name == "mean_span_length" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        if not 0 < self.corruption_rate < 1:
            raise ValueError(f"corruption_rate: expected a number between 0 and 1, got {self.corruption_rate}")
        if self.mean_span_length is None and self.corruption_rate > 0.5:
            raise ValueError(f"corruption_rate: expected at most 0.5 for the end of a text, got {self.corruption_rate}")
        if self.mean_span_length is not None and not 1 <= self.mean_span_length < float("inf"):
            raise ValueError(f"mean_span_length: expected a finite number of at least 1, got {self.mean_span_length}")

    def num_spans(self, length: int) -> int:
        """How many spans of a text of ``length`` tokens are corrupted.

        Raises:
            ValueError: the text is too short to corrupt a token and keep one, or to keep spans of this length apart.
        """
        corrupted = round(self.corruption_rate * length)
        if not 0 < corrupted < length:
            raise ValueError(f"length: expected a text long enough for {self}, got {length} tokens")
        if self.mean_span_length is None:
            return 1
        spans = max(1, round(corrupted / self.mean_span_length))
        if spans > length - corrupted + 1:
            raise ValueError(
                f"mean_span_length: expected spans long enough for a kept token between any two of them, got {spans} "
                f"spans and {length - corrupted} kept tokens in a text of {length} ({self})"
            )
        return spans

    def draw_spans(self, length: int, generator: torch.Generator | None = None) -> list[tuple[int, int]]:
        """``(first, end)`` of the corrupted spans of a text of ``length`` tokens, in order, never side by side.

        Every choice with ``round(corruption_rate * length)`` tokens in ``num_spans`` spans is equally likely, those
        with a span at either end of the text too.

        Raises:
            ValueError: as ``num_spans``.
        """
        spans = self.num_spans(length)
        if self.mean_span_length is None:
            longest = max(1, round(2 * self.corruption_rate * length) - 1)
            drawn = torch.randint(1, longest + 1, (), generator=generator, device="cpu")
            return [(length - int(drawn), length)]
        corrupted = round(self.corruption_rate * length)
        lengths = _partition(corrupted, spans, generator)
        gaps = _partition(length - corrupted + 2, spans + 1, generator)  # the outer two are one less, so may be empty
        ends = (gaps[:-1] + lengths).cumsum(0) - 1
        return list(zip((ends - lengths).tolist(), ends.tolist(), strict=True))


def _partition(total: int, parts: int, generator: torch.Generator | None) -> torch.Tensor:
    """int64 [parts]: positive numbers with this sum, each such list equally likely."""
    cuts = torch.randperm(total - 1, generator=generator, device="cpu")[: parts - 1].sort().values + 1
    return torch.diff(pad(cuts, (1, 0)), append=cuts.new_full((1,), total))


# Each (corruption rate, mean span length) of UL2.
UL2_DENOISERS = (
    Denoiser("R", 0.15, 3),
    Denoiser("R", 0.15, 8),
    Denoiser("S", 0.25, None),
    Denoiser("X", 0.5, 3),
    Denoiser("X", 0.5, 8),
    Denoiser("X", 0.15, 64),
    Denoiser("X", 0.5, 64),
)


def corrupt(
    tokens: Sequence[int], spans: Sequence[tuple[int, int]], sentinels: Sequence[int]
) -> tuple[list[int], list[int]]:
    """One text as ``(corrupted text, answer)``: a sentinel stands for each span there, and before it here.

    Args:
        tokens: ids of the text.
        spans: ``(first, end)`` of each corrupted span, in order.
        sentinels: ids that don't occur in the text, in the order in which the spans take them.

    Raises:
        ValueError: spans outside of the text, empty or out of order; too few sentinels, or one that the text has.
    """
    tokens = [int(token) for token in tokens]
    sentinels = [int(sentinel) for sentinel in sentinels]
    if len(sentinels) < len(spans):
        raise ValueError(f"sentinels: expected one for each of {len(spans)} spans, got {len(sentinels)}")
    if taken := sorted(set(tokens) & set(sentinels)):
        raise ValueError(f"tokens: expected a text without sentinels, got {taken}")
    corrupted, answer, kept = [], [], 0
    for (first, end), sentinel in zip(spans, sentinels, strict=False):
        if not kept <= first < end <= len(tokens):
            raise ValueError(f"spans: expected (first, end) in order within {len(tokens)} tokens, got {list(spans)}")
        corrupted += [*tokens[kept:first], sentinel]
        answer += [sentinel, *tokens[first:end]]
        kept = end
    return corrupted + tokens[kept:], answer


class UL2Collator:
    """Texts to a batch of denoising samples, for a Trainer or a DataLoader: each text is corrupted by a drawn denoiser.

    The prompt is the mode's tokens, the corrupted text and the end token; the answer is each sentinel with its span,
    and the end token. The prompt's end token, which opens the answer, keeps all of the corrupted text bidirectional.

    Args:
        tokenizer: pads, on its ``padding_side``; has an end and a padding token.
        mode_tokens: the ids in front of each mode's prompts, with the token that begins a sequence if the model wants
            one. UL2 writes [NLU] for "R", [NLG] for "X" and [S2S] for "S".
        sentinels: distinct ids that occur in no text, as T5's <extra_id_0>, <extra_id_1>, ...
        denoisers: all are equally likely; one that stands there twice is so twice as often.
        generator: of every draw. None: torch's own, which a DataLoader seeds anew in each worker and epoch, where a
            generator given here would be copied.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came. Whether a text is refused, as too
            short or for more spans than sentinels, doesn't depend on the draw.
    """

    def __init__(
        self,
        tokenizer,
        mode_tokens: Mapping[str, Sequence[int]],
        sentinels: Sequence[int],
        denoisers: Sequence[Denoiser] = UL2_DENOISERS,
        generator: torch.Generator | None = None,
    ):
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError("tokenizer: expected one with an end and a padding token, got one without")
        if not denoisers:
            raise ValueError("denoisers: expected at least one, got none")
        if missing := sorted({d.mode for d in denoisers} - set(mode_tokens)):
            raise ValueError(
                f"mode_tokens: expected ids for every mode, {', '.join(missing)} too, got {', '.join(mode_tokens)}"
            )
        for mode, ids in mode_tokens.items():
            if not isinstance(ids, Sequence) or isinstance(ids, str) or not all(isinstance(i, int) for i in ids):
                raise TypeError(f"mode_tokens: expected a list of ids for {mode!r}, got {ids!r}")
        if len(set(sentinels)) < len(sentinels):
            raise ValueError(f"sentinels: expected distinct ids, got {list(sentinels)}")
        special = {tokenizer.eos_token_id, tokenizer.pad_token_id}.union(*mode_tokens.values())
        if taken := sorted(special & set(sentinels)):
            raise ValueError(f"sentinels: expected ids without those of end, padding and modes, got {taken}")
        self.mode_tokens, self.sentinels, self.denoisers = dict(mode_tokens), list(sentinels), tuple(denoisers)
        self.end, self.generator = tokenizer.eos_token_id, generator
        self._pad = DataCollatorForSeq2Seq(tokenizer)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels`` (-100 on the prompt and padding), int64 [batch, seq].

        Args:
            features: each with ``input_ids``, the ids of one text without special tokens and padding.
        """
        return dict(self._pad([self._sample(feature["input_ids"]) for feature in features]))

    def _sample(self, tokens: Sequence[int]) -> dict[str, list[int]]:
        needed = max(denoiser.num_spans(len(tokens)) for denoiser in self.denoisers)
        if needed > len(self.sentinels):
            raise ValueError(
                f"sentinels: expected at least {needed} for a text of {len(tokens)} tokens, got {len(self.sentinels)}"
            )
        drawn = torch.randint(len(self.denoisers), (), generator=self.generator, device="cpu")
        denoiser = self.denoisers[int(drawn)]
        corrupted, answer = corrupt(tokens, denoiser.draw_spans(len(tokens), self.generator), self.sentinels)
        prompt, answer = [*self.mode_tokens[denoiser.mode], *corrupted, self.end], [*answer, self.end]
        both = prompt + answer
        return {"input_ids": both, "attention_mask": [1] * len(both), "labels": [-100] * len(prompt) + answer}
