"""Real text as token ids of a model's vocabulary."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer


class Text:
    """The instruction file as token ids of a model's vocabulary."""

    def __init__(self, path: Path, vocab_size: int, folder: Path | None = None):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        texts = [json.loads(line)["prompt"] for line in lines]
        if len(texts) < 2:
            raise ValueError(f"{path}: expected at least 2 instructions, got {len(texts)}")
        if folder is None:
            tokenizer = _train_bpe(texts)
            self.source = f"a byte-level BPE of {tokenizer.get_vocab_size()} tokens trained on {path.name}"
            self.first = []

            def encode(text):
                return tokenizer.encode(text).ids
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.source = f"the tokenizer of {folder.resolve().name}"
            self.first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

            def encode(text):
                return tokenizer.encode(text, add_special_tokens=False)

        self.ids = [[t % vocab_size for t in encode(text)] for text in texts]
        self.gap = [t % vocab_size for t in encode("\n\n")]
        self.first = [t % vocab_size for t in self.first]

    def prompts(self, batch: int, length: int, seed: int = 0) -> list[list[int]]:
        """``batch`` prompts: the first is cut to exactly ``length`` tokens, the others end where they end.

        Instructions are joined until the next one doesn't fit; one that is too long by itself is cut. So a
        batch is as ragged as its text, and ``length`` is its width.
        """
        source = self._in_turn(seed)
        rows = [self._joined(source, length, fill=True)]
        while len(rows) < batch:
            rows.append(self._joined(source, length, fill=False))
        return rows

    def samples(
        self, count: int, max_length: int, seed: int = 0, fill: bool = False
    ) -> list[tuple[list[int], list[int]]]:
        """``count`` pairs: an instruction, cut to half of ``max_length``, and a cut of another as its answer.

        ``fill``: instructions are joined, so that each pair has exactly ``max_length`` tokens.
        """
        source, pairs = self._in_turn(seed), []
        for _ in range(count):
            if fill:
                row = self._joined(source, max_length, fill=True)
                pairs.append((row[: max_length // 2], row[max_length // 2 :]))
                continue
            prompt = (self.first + next(source))[: max_length // 2]
            pairs.append((prompt, next(source)[: max_length - len(prompt)]))
        return pairs

    def _in_turn(self, seed: int) -> Iterable[list[int]]:
        order = list(range(len(self.ids)))
        random.Random(seed).shuffle(order)
        while True:
            for i in order:
                yield self.ids[i]

    def _joined(self, source, length: int, fill: bool) -> list[int]:
        row = self.first + next(source)
        while len(row) < length:
            more = self.gap + next(source)
            if len(row) + len(more) > length and not fill:
                break
            row += more
        return row[:length]


def _train_bpe(texts: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def padded_samples(samples: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` (prompt, padding: -100) of (prompt, answer), padded right."""
    ids, mask = padded([prompt + answer for prompt, answer in samples], "right")
    labels, _ = padded([[-100] * len(prompt) + answer for prompt, answer in samples], "right", fill=-100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def padded(rows: Sequence[Sequence[int]], side: str, fill: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 tokens [batch, width] and their mask, padded on one side."""
    rows, options = [torch.tensor(row) for row in rows], dict(batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], **options)
    return pad_sequence(rows, padding_value=fill, **options), mask
