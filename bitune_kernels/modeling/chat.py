"""Conversations over many turns, in the two ways of the paper (appendix A.8)."""

from __future__ import annotations

from typing import Any

import torch

from ..config import HISTORIES
from .generate import find_option
from .model import BituneModel, check_streams_on
from .passes import evaluating


def check_messages(messages: list[dict[str, Any]]) -> None:
    """Refuse what isn't a conversation that the user goes on with (ValueError)."""
    for m in messages:
        if not isinstance(m, dict) or "role" not in m or not isinstance(m.get("content"), str):
            raise ValueError(f"messages: expected each with a role and a text as content, got {m!r}")
    roles = [m["role"] for m in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise ValueError(f"messages: expected user and assistant in turns, got {', '.join(map(str, roles))}")


class BituneChat:
    """A conversation with a Bitune model; the tokenizer's chat template says where turns begin and end.

    Args:
        model: the Bitune model.
        tokenizer: with a chat template.
        turns: "recompute": all messages so far are the prompt, read in both directions anew; or "alternating": each
            new turn of the user is read by both streams over the cache of what came before, mixed and appended. None:
            as the model was trained (``BituneConfig.turns``), and "recompute" where that is "one".
        messages: the conversation so far, as transformers' chat templates take it: {"role", "content"} with a system
            message first, if there is one, and then user and assistant in turns.

    Attributes:
        messages: the conversation, answers included. Turns may be taken back or changed between two calls of ``send``;
            alternating then reads the conversation anew.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def __init__(
        self, model: BituneModel, tokenizer, turns: str | None = None, messages: list[dict[str, Any]] | None = None
    ):
        check_streams_on(model)
        if turns is None:
            turns = model.bitune_config.turns if model.bitune_config.turns in HISTORIES else "recompute"
        if turns not in HISTORIES:
            raise ValueError(f"turns: expected one of {', '.join(HISTORIES)}, got {turns!r}")
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("tokenizer: expected one with a chat template, got none")
        check_messages(messages or [])
        self.model, self.tokenizer, self.turns = model, tokenizer, turns
        self.messages = [dict(m) for m in messages or []]
        self._turns: list[tuple[list[int], list[int]]] = []  # tokens of each turn: the prompt's and the answer's
        self._cache = None  # what the model has read of them, or None
        self._read_messages: list[dict[str, Any]] = []  # those whose tokens they are

    def send(self, text: str, **options) -> str:
        """The answer to what the user says.

        Args:
            text: of the user's turn.
            options: of ``generate()``: max_new_tokens, do_sample, a streamer, ...

        Raises:
            ValueError: a turn without text, a conversation too long for the model, an option by which one prompt has
                several answers, a cache, a template that changes earlier turns (alternating), a model whose streams are
                off. The conversation then is what it was before.
        """
        check_streams_on(self.model)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text: expected what the user says, got {text!r}")
        for name in ("num_return_sequences", "num_beams"):
            if self._option(name, options) not in (None, 1):
                raise ValueError(f"{name}: expected 1 in a chat, got {self._option(name, options)}")
        if options.get("past_key_values") is not None:
            raise ValueError("past_key_values: expected None, since a chat has its own cache")
        kind = self._option("cache_implementation", options)
        if self.turns == "alternating" and kind not in (None, "hybrid"):  # the latter transformers takes for None
            raise ValueError(
                f"cache_implementation: expected None in an alternating chat, which has its own cache, got {kind!r}"
            )
        check_messages(self.messages)
        messages = [*self.messages, {"role": "user", "content": text}]
        answer = (
            self._alternate(messages, options) if self.turns == "alternating" else self._recompute(messages, options)
        )
        content = self.tokenizer.decode(answer, skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": content}]
        self._read_messages = [dict(m) for m in self.messages]
        return content

    def _option(self, name: str, options):
        return find_option(name, options, options.get("generation_config"), self.model.generation_config)

    def _recompute(self, messages, options) -> list[int]:
        tokens = self._tokens(self._render(messages))
        self._check_length(len(tokens), options)
        return self._generate(tokens, options)

    def _alternate(self, messages, options) -> list[int]:
        if self.messages != self._read_messages:
            self._turns, self._cache = self._split(self.messages), None
            self._read_messages = [dict(m) for m in self.messages]
        turns = self._turns
        tail = self._continuation(messages, turns[-1][1]) if turns else self._render(messages)
        prompt, cache = self._tokens(tail), self._cache
        read = [token for turn in turns for part in turn for token in part]
        self._check_length(len(read) + len(prompt), options)
        self._cache = None  # what fails from here on leaves a cache that nothing can be said about
        if cache is None:
            cache = self._read(turns)
        self._decode(read, cache)
        with self.model._hooks.turn_over(cache):
            answer = self._generate([*read, *prompt], options | {"past_key_values": cache})
        self._turns, self._cache = [*turns, (prompt, answer)], cache
        return answer

    def _check_length(self, length: int, options) -> None:
        limit = getattr(self.model.get_base_model().config.get_text_config(), "max_position_embeddings", None)
        new = self._option("max_new_tokens", options) or 1
        if limit is not None and length + new > limit:
            raise ValueError(
                f"text: expected a conversation of at most {limit} tokens, its next answer ({new}) included, "
                f"got {length}"
            )

    def _generate(self, tokens: list[int], options) -> list[int]:
        ids = torch.tensor([tokens], device=self.model.device)
        out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        return sequences[0, len(tokens) :].tolist()

    def _read(self, turns):
        """A cache of these turns: each prompt by both streams, each answer causally."""
        from transformers import DynamicCache

        cache, read = DynamicCache(config=self.model.get_base_model().config), []
        for prompt, answer in turns:
            with self.model._hooks.turn_over(cache):
                self._step(prompt, cache)
            read += [*prompt, *answer]
            self._decode(read, cache)
        return cache

    def _decode(self, read: list[int], cache) -> None:
        # The last token of an answer was returned and not read yet.
        held = int(cache.get_seq_length())
        if held < len(read):
            self._step(read[held:], cache)

    def _step(self, tokens: list[int], cache) -> None:
        ids = torch.tensor([tokens], device=self.model.device)
        with evaluating(self.model):
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _render(self, messages, add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _continuation(self, messages, answer: list[int]) -> str:
        """What the template writes between the last answer and the next one."""
        last = messages[-2]["content"].strip()
        asked, whole = self._render(messages[:-2]), self._render(messages)
        said = self._render(messages[:-1], add_generation_prompt=False)
        start = said.find(last, len(asked))
        if not said.startswith(asked) or start < 0 or not whole.startswith(said):
            raise ValueError(
                "turns: expected 'recompute' for a chat template that writes earlier turns in another way once there "
                "is a new one, got 'alternating'"
            )
        rest = whole[start + len(last) :]
        if answer[-1:] and answer[-1] in self.tokenizer.added_tokens_decoder:  # it is in the cache already
            return rest.lstrip().removeprefix(self.tokenizer.decode(answer[-1:]))
        return rest

    def _split(self, messages) -> list[tuple[list[int], list[int]]]:
        """Prompt and answer tokens of each turn of a conversation that came with the chat."""
        turns: list[tuple[list[int], list[int]]] = []
        for i in (i for i, m in enumerate(messages) if m["role"] == "assistant"):
            before = messages[:i]
            text = self._continuation(before, turns[-1][1]) if turns else self._render(before)
            said = self._render(messages[: i + 1], add_generation_prompt=False)
            answer = said[len(self._render(before)) :].rstrip()
            turns.append((self._tokens(text), self._tokens(answer)))
        return turns
