"""A Bitune model for the lm-evaluation-harness: contexts are read in both directions, answers causally.

Releases of the harness after 0.4.13 find it by the entry point ``lm_eval.models``; ``bitune evaluate`` runs it in any.
"""

from __future__ import annotations

import logging
from itertools import chain
from types import SimpleNamespace

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from .commands.load import DTYPES, end_tokens, load_model, load_tokenizer
from .modeling import BituneModel, score_choices

logger = logging.getLogger(__name__)


@register_model("bitune")
class BituneLM(HFLM):
    """``lm_eval --model bitune --model_args pretrained=google/gemma-2b,adapter=runs/answers``

    The context of a request is the prompt, few-shot examples included; the continuation is the answer. Texts become
    tokens, and answers are generated until a stop string, as in the harness's own ``hf``. The choices of one question
    are scored in one pass over its prompt (``score_choices``). A context that is empty is the BOS token, as in ``hf``.

    A prompt longer than the model, less its answer, is cut on the left, with a warning that counts them: what is left
    is read in both directions as ever.

    Args:
        pretrained: folder or id of the causal language model that was trained, or a ``BituneModel``.
        adapter: folder of ``BituneModel.save_pretrained`` or of a run of ``bitune train``.
        tokenizer: of the ``BituneModel``.
        dtype: of the model's weights: "auto" (as they are saved), "float32", "bfloat16" or "float16".
        device: of torch; None: cuda where there is one, else cpu.
        batch_size: questions in a pass; a pass computes no padding.
        max_length: tokens of prompt and answer together, less one; None: what the model was made for.

    Raises:
        ValueError, TypeError, FileNotFoundError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        pretrained: str | BituneModel,
        adapter: str | None = None,
        tokenizer=None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
    ):
        if not str(batch_size).isdigit() or not int(batch_size):
            raise ValueError(f"batch_size: expected a number of questions, at least 1, got {batch_size!r}")
        if isinstance(pretrained, str):
            if dtype not in DTYPES:
                raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
            if adapter is None:
                raise ValueError(
                    "adapter: expected a folder of BituneModel.save_pretrained or of bitune train, got none"
                )
            given = SimpleNamespace(model=pretrained, adapter=str(adapter), dtype=dtype, device=device)
            tokenizer = load_tokenizer(given)
            model = load_model(given, use_fused=True)
        elif isinstance(pretrained, BituneModel):
            if tokenizer is None:
                raise ValueError("tokenizer: expected that of the BituneModel, got None")
            model = pretrained
        else:
            raise TypeError(f"pretrained: expected a folder, an id or a BituneModel, got {type(pretrained).__name__}")
        if tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
            raise ValueError("tokenizer: expected one that leaves a text open, got one that ends it with its end token")
        super().__init__(
            model, tokenizer=tokenizer, backend="causal", batch_size=int(batch_size), max_length=max_length
        )
        if isinstance(pretrained, str):
            self.pretrained, self.peft = pretrained, str(adapter)  # for the harness's record of the run

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether greedy decoding makes it.

        Raises:
            ValueError: a continuation without text, naming its task, document and place among the choices.
        """
        for request in requests:
            choice = request.args[1]
            if not choice.strip():
                raise ValueError(
                    f"{request.task_name}, document {request.doc_id}: expected choices with some text, got {choice!r} "
                    f"as choice {request.idx}"
                )
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        # requests: ((context, continuation), tokens of the context, tokens of the continuation)
        questions: dict[tuple[int, ...], list[int]] = {}  # the prompt's tokens -> its requests
        cut = 0
        for i, ((context, choice), prompt, answer) in enumerate(requests):
            room = self.max_length + 1 - len(answer)  # the last token of an answer is not read
            if not answer or room < 1:
                raise ValueError(
                    f"continuation: expected 1 to {self.max_length} tokens, got {len(answer)} for {choice[:40]!r} "
                    f"after {context[-40:]!r}"
                )
            cut += len(prompt) > room
            questions.setdefault(tuple(prompt[-room:]), []).append(i)
        if cut:
            logger.warning(
                "%d of %d prompts are cut on the left, to the %d tokens of the model less those of their answer",
                cut,
                len(requests),
                self.max_length,
            )
        # the longest first, so that what doesn't fit into memory fails at once
        longest_first = sorted(questions.items(), key=lambda question: -len(question[0]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="Scoring choices", disable=disable_tqdm) as bar:
            for first in range(0, len(longest_first), self.batch_size):
                prompts, places = zip(*longest_first[first : first + self.batch_size], strict=True)
                scores = score_choices(self.model, prompts, [[requests[i][2] for i in each] for each in places])
                for i, score in zip(chain(*places), chain(*scores), strict=True):
                    found[i] = score
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
                    bar.update()
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """As in ``hf``; an answer as long as the model, which the harness asserts, is a ValueError."""
        try:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        except AssertionError as error:
            raise ValueError(str(error)) from error

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        """Refused: a text without a prompt has nothing that could be read in both directions."""
        names = ", ".join(sorted({str(request.task_name) for request in requests}))
        raise ValueError(
            f"{names}: expected tasks with a prompt and an answer, got the likelihood of a whole text "
            "(loglikelihood_rolling): without a boundary there is no prompt to read in both directions"
        )

    def _model_generate(self, context, max_length, stop, **options):
        # What ends an answer in bitune train need not be what the model's own config says.
        options.setdefault("eos_token_id", end_tokens(self.model, self.tokenizer))
        return super()._model_generate(context, max_length, stop, **options)
