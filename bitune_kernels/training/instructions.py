"""Learned instructions (arXiv 2306.10098): what stands in front of the training prompts is trained so that the model
trained behind it does well on validation tasks with instructions written by people.

    inner: theta, the model's trained parameters, minimizes L_train(theta, phi)
    outer: phi, the instruction's parameters, minimizes L_val(theta*(phi), phi)

At test time there are no learned instructions any more: theta is the product.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from operator import index

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from ..plan import find_samples
from .bilevel import check_options, hypergradient, largest_curvature, leaves

CHECK_ALPHA_EVERY = 100  # outer steps
BATCH_KEYS = {"input_ids", "attention_mask", "labels", "task_ids"}


class InstructionOptimizer:
    """Trains a model behind an instruction, and the instruction for what the model learns behind it.

    Each ``step`` is one of ``inner_optimizer`` on the training loss with the instruction, and every ``every``-th also
    one of ``outer_optimizer`` along the ``hypergradient`` of the validation loss, whose prompts have their own
    instructions, written by people.

    On several processes, with method "finite", the model is in DistributedDataParallel or sharded by FSDP2, which
    average its gradients. The instruction isn't wrapped: it starts as that of process 0, and its hypergradients are
    averaged here. Each process brings its share of both batches, and shares weigh the same.

    Args:
        model: a Bitune model or another causal LM that takes ``inputs_embeds``, whose token embeddings have no adapter.
        instruction: maps a batch to vectors, as ``SoftInstruction``, ``EncodedInstruction``, ``InstructionSelector``.
        inner_optimizer: of what is trained in ``model``.
        outer_optimizer: of what is trained in ``instruction``.
        alpha: step size of the hypergradient's series; None: the inner optimizer's learning rate, which the caller may
            change on the way. One for all parameters: at the default scale of ``theta_init`` = 0.01 the mixing
            coefficients' gradients and curvature, which grows in training, drown the adapters';
            ``BituneConfig(theta_init=1.0)`` puts them on one scale.
        k, method, epsilon: as in ``hypergradient``.
        every: outer steps are taken at every so many inner ones, the first included.
        max_grad_norm: the hypergradient is clipped to this norm.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        model: nn.Module,
        instruction: nn.Module,
        inner_optimizer: torch.optim.Optimizer,
        outer_optimizer: torch.optim.Optimizer,
        alpha: float | None = None,
        k: int = 1,
        every: int = 1,
        method: str = "finite",
        max_grad_norm: float = 1.0,
        epsilon: float = 1e-3,
    ):
        if alpha is None and len(rates := {group["lr"] for group in inner_optimizer.param_groups}) > 1:
            raise ValueError(f"alpha: expected a number where learning rates differ ({sorted(rates)}), got None")
        check_options(alpha=1.0 if alpha is None else alpha, k=k, method=method, epsilon=epsilon)
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every: expected an integer >= 1, got {every}")
        if not isinstance(max_grad_norm, int | float) or not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected a number > 0, got {max_grad_norm}")
        if method == "exact" and (processes := _processes()) > 1:
            raise ValueError(f"method: expected 'finite' on {processes} processes, since nothing averages 'exact'")
        _token_embedding(model)
        self.model, self.instruction = model, instruction
        self.inner_optimizer, self.outer_optimizer = inner_optimizer, outer_optimizer
        self.k, self.every, self.max_grad_norm = k, every, max_grad_norm
        self.options = {"method": method, "epsilon": epsilon}
        self._alpha, self._steps, self._warned = alpha, 0, False
        self.parameters = [p for group in inner_optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.phi = [p for group in outer_optimizer.param_groups for p in group["params"] if p.requires_grad]
        leaves("inner_optimizer", self.parameters)
        leaves("outer_optimizer", self.phi)
        if not {id(p) for p in self.parameters}.isdisjoint(id(p) for p in self.phi):
            raise ValueError("outer_optimizer: expected parameters that the inner_optimizer hasn't, got some of both")
        if not {id(p) for p in self.phi} <= {id(p) for p in instruction.parameters()}:
            raise ValueError("outer_optimizer: expected parameters of the instruction alone, got others")
        if _processes() > 1:
            for p in self.phi:
                dist.broadcast(p.detach(), 0)

    @property
    def alpha(self) -> float:
        """The step size of the series."""
        return float(self.inner_optimizer.param_groups[0]["lr"]) if self._alpha is None else self._alpha

    def step(self, train_batch: dict[str, torch.Tensor], val_batch: dict[str, torch.Tensor]) -> dict[str, float]:
        """One inner step, and where it is due an outer one.

        Args:
            train_batch, val_batch: ``input_ids``, ``labels`` and perhaps ``attention_mask`` as ``BituneModel`` takes
                them, and perhaps ``task_ids`` int64 [batch]: the rows of an instruction's table, and what is compared
                to warn of validation tasks that are trained on.

        Returns:
            "train_loss" of this process's batch before the step, and with an outer step "grad_norm", of the
            hypergradient before clipping.

        Raises:
            ValueError: of the batches; and at the first outer step, then at every 100th, ``alpha`` above
                2 / ``largest_curvature``, before anything is trained. With k = 0 that isn't asked.
        """
        self._check_tasks(train_batch, val_batch)
        outer, remainder = divmod(self._steps, self.every)
        if remainder == 0 and self.k > 0 and outer % CHECK_ALPHA_EVERY == 0:
            self._check_alpha(train_batch)
        self.inner_optimizer.zero_grad()
        loss = self._train_loss(train_batch)
        loss.backward()
        self.inner_optimizer.step()
        self.inner_optimizer.zero_grad()
        self.outer_optimizer.zero_grad()
        result = {"train_loss": float(loss.detach())}
        if remainder == 0:
            result["grad_norm"] = self._outer_step(train_batch, val_batch)
        self._steps += 1
        return result

    def _outer_step(self, train_batch, val_batch) -> float:
        options = dict(alpha=self.alpha, k=self.k, **self.options)
        losses = (lambda: self._train_loss(train_batch), lambda: self._val_loss(val_batch))
        gradients = hypergradient(*losses, self.parameters, self.phi, **options)
        processes = _processes()
        for p, gradient in zip(self.phi, gradients, strict=True):
            if processes > 1:
                dist.all_reduce(gradient)
            p.grad = gradient / processes
        norm = nn.utils.clip_grad_norm_(self.phi, self.max_grad_norm, error_if_nonfinite=True)
        self.outer_optimizer.step()
        self.outer_optimizer.zero_grad()
        return float(norm)

    def _train_loss(self, batch) -> torch.Tensor:
        return self.model(**prepend_instruction(self.model, batch, *self.instruction(batch))).loss

    def _val_loss(self, batch) -> torch.Tensor:
        return self.model(**{name: x for name, x in batch.items() if name != "task_ids"}).loss

    def _check_alpha(self, train_batch) -> None:
        curvature = largest_curvature(lambda: self._train_loss(train_batch), self.parameters, **self.options)
        if self.alpha * curvature > 2:
            raise ValueError(
                f"alpha: expected at most 2 / |lambda| = {2 / curvature:.3g} of the training loss, above which the "
                f"series diverges, got {self.alpha:.3g}"
            )

    def _check_tasks(self, train_batch, val_batch) -> None:
        if self._warned or "task_ids" not in train_batch or "task_ids" not in val_batch:
            return
        both = sorted(set(train_batch["task_ids"].tolist()) & set(val_batch["task_ids"].tolist()))
        if both:
            self._warned = True
            warnings.warn(
                f"val_batch: expected tasks that aren't trained on, got training tasks {both}: the instruction will be "
                "chosen for what it makes the model remember",
                stacklevel=3,
            )


def prepend_instruction(
    model: nn.Module, batch: dict[str, torch.Tensor], vectors: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """A batch with vectors in front of each sample's prompt, as arguments of ``model``.

    Args:
        model: as in ``InstructionOptimizer``.
        batch: ``input_ids`` [batch, seq], ``labels`` and ``attention_mask`` (None: no padding), padded left or right.
        vectors, mask: what an instruction returns, [batch, length, hidden] and bool [batch, length].

    Returns:
        ``inputs_embeds`` [batch, seq', hidden], ``attention_mask`` and ``labels`` [batch, seq'], padded on the side on
        which the batch is. Differentiable in ``vectors``.

    Raises:
        ValueError: other things or other shapes in the batch, labels on padding, or samples longer than the model with
            their instruction.
    """
    real = _real_tokens(batch)
    ids, labels = batch["input_ids"], batch["labels"]
    longest, limit = int((real.sum(1) + mask.sum(1)).max()), _max_length(model)
    if limit is not None and longest > limit:
        raise ValueError(
            f"instruction: expected at most {limit} tokens with its prompt and answer, the length of the model, "
            f"got {longest}"
        )
    embeds = _embed(_token_embedding(model), ids)
    vectors = vectors.to(embeds.dtype)
    rows = range(len(ids))
    side = "left" if not bool(real[:, 0].all()) else "right"
    options = dict(batch_first=True, padding_side=side)
    new_embeds = [torch.cat([vectors[b][mask[b]], embeds[b][real[b]]]) for b in rows]
    new_labels = [nn.functional.pad(labels[b][real[b]], (int(mask[b].sum()), 0), value=-100) for b in rows]
    return {
        "inputs_embeds": pad_sequence(new_embeds, **options),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in new_labels], **options),
        "labels": pad_sequence(new_labels, padding_value=-100, **options),
    }


def _token_embedding(model: nn.Module) -> nn.Module:
    embedding = getattr(model, "module", model).get_input_embeddings()
    if isinstance(embedding, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        raise ValueError(
            f"model: expected token embeddings without adapters, since both streams read the same vectors, got "
            f"{type(embedding).__name__}"
        )
    if any(p.requires_grad and hasattr(p, "full_tensor") for p in embedding.parameters()):
        raise ValueError("model: expected frozen token embeddings where FSDP2 shards it, got trained ones")
    return embedding


def _embed(embedding: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The tokens' vectors, also outside a model that FSDP2 shards, which has its weights only where it is called."""
    full = {name: p.full_tensor() for name, p in embedding.named_parameters() if hasattr(p, "full_tensor")}
    return functional_call(embedding, full, (ids,)) if full else embedding(ids)


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _max_length(model: nn.Module) -> int | None:
    config = getattr(model, "module", model).config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _real_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """bool [batch, seq]; refuses a batch that the model would not take (ValueError, TypeError)."""
    unknown = sorted(name for name in batch if name not in BATCH_KEYS)
    if unknown or "input_ids" not in batch or "labels" not in batch:
        raise ValueError(
            f"batch: expected input_ids, labels and perhaps attention_mask and task_ids, got {', '.join(batch)}"
        )
    ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    find_samples(ids.shape, mask)
    if labels.shape != ids.shape:
        raise ValueError(f"labels: expected shape {list(ids.shape)} as the tokens, got {list(labels.shape)}")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if bool((labels[~real] != -100).any()):
        raise ValueError("labels: expected -100 wherever attention_mask is 0, got labels on padding")
    return real


def _token_ids(name: str, ids: Sequence[int], embedding: nn.Module) -> list[int]:
    last = len(embedding.weight) - 1
    try:
        found = [index(i) for i in ids]
    except TypeError:
        found = [-1]
    if not all(0 <= i <= last for i in found):
        raise ValueError(f"{name}: expected token ids from 0 to {last} in a list, got {ids!r}")
    return found


def _at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {count!r}")


def _rows_of_tasks(batch: dict[str, torch.Tensor], num_tasks: int) -> torch.Tensor:
    ids = batch["input_ids"]
    tasks = batch.get("task_ids", torch.zeros(len(ids), dtype=torch.long, device=ids.device))
    if tasks.shape != (len(ids),) or not bool(((tasks >= 0) & (tasks < num_tasks)).all()):
        raise ValueError(f"task_ids: expected {len(ids)} numbers from 0 to {num_tasks - 1}, got {tasks.tolist()}")
    return tasks


class SoftInstruction(nn.Module):
    """A table of vectors: ``length`` for each task.

    Args:
        embedding: the model's token embedding, ``model.get_input_embeddings()``. It isn't kept.
        length: > 0; the vectors start as those of tokens drawn from the vocabulary.
        token_ids: instead, the text they start as.
        num_tasks: > 0, the number of rows that the batch's ``task_ids`` choose from.

    Called with a batch it returns vectors [batch, length, hidden], float32 or wider, and a mask that is all True.
    """

    def __init__(
        self,
        embedding: nn.Module,
        *,
        length: int | None = None,
        token_ids: Sequence[int] | None = None,
        num_tasks: int = 1,
    ):
        super().__init__()
        if (length is None) == (token_ids is None):
            raise ValueError(f"length: expected either it or token_ids, got {length} and {token_ids}")
        _at_least_one(num_tasks=num_tasks)
        if token_ids is None:
            _at_least_one(length=length)
            ids = torch.randint(len(embedding.weight), (num_tasks, length))
        else:
            if not len(token_ids):
                raise ValueError("token_ids: expected one or more, got none")
            ids = torch.tensor([_token_ids("token_ids", token_ids, embedding)] * num_tasks)
        with torch.no_grad():
            start = _embed(embedding, ids.to(embedding.weight.device))
        self.vectors = nn.Parameter(start.to(torch.promote_types(start.dtype, torch.float32)).clone())

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        vectors = self.vectors[_rows_of_tasks(batch, len(self.vectors))]
        return vectors, torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)


class EncodedInstruction(nn.Module):
    """An encoder of the instance: ``length`` vectors made from the mean of its prompt's token vectors.

    The answer, which is what has labels, is not read.

    Args:
        embedding: the model's token embedding, which is read and not trained.
        length: > 0.
        width: of the hidden layer.

    Called with a batch it returns what ``SoftInstruction`` does.
    """

    def __init__(self, embedding: nn.Module, *, length: int, width: int = 64):
        super().__init__()
        _at_least_one(length=length, width=width)
        self._embedding = (embedding,)  # in a tuple it is no part of this module
        hidden, device = embedding.weight.shape[1], embedding.weight.device
        dtype = torch.promote_types(embedding.weight.dtype, torch.float32)
        layers = (
            nn.Linear(hidden, width),
            nn.GELU(),
            nn.Linear(width, length * hidden),
            nn.Unflatten(1, (length, hidden)),
        )
        self.encoder = nn.Sequential(*layers).to(device, dtype)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = batch["input_ids"]
        # behind the first label everything is answer, whether it is trained or not
        prompt = _real_tokens(batch) & ((batch["labels"] != -100).cumsum(1) == 0)
        with torch.no_grad():
            weights = prompt[:, :, None].to(self.encoder[0].weight.dtype)
            mean = (_embed(self._embedding[0], ids) * weights).sum(1) / weights.sum(1).clamp(min=1)
        vectors = self.encoder(mean)
        return vectors, torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)


class InstructionSelector(nn.Module):
    """A choice between instruction texts for each task, by trained logits.

    Args:
        embedding: the model's token embedding, which is read and not trained.
        candidates: the texts, each a list of token ids; an empty one is no instruction.
        num_tasks: > 0, the number of rows that the batch's ``task_ids`` choose from.
        soft: False: the vectors are those of the most probable candidate, and the gradient is that of the
            probabilities (straight-through), which knows the others by a linear approximation around the chosen one.
            True: the vectors are the mean of all candidates' vectors by these probabilities, each followed by zeros up
            to the longest.

    Called with a batch it returns vectors [batch, longest, hidden] and the mask bool [batch, longest] of their tokens.
    """

    def __init__(
        self, embedding: nn.Module, candidates: Sequence[Sequence[int]], *, num_tasks: int = 1, soft: bool = False
    ):
        super().__init__()
        candidates = [_token_ids("candidates", c, embedding) for c in candidates]
        if not candidates or not any(candidates):
            raise ValueError(f"candidates: expected one or more texts that aren't all empty, got {candidates}")
        _at_least_one(num_tasks=num_tasks)
        device, soft_dtype = embedding.weight.device, torch.promote_types(embedding.weight.dtype, torch.float32)
        self._embedding, self.soft = (embedding,), soft
        texts = [torch.tensor(c, dtype=torch.long, device=device) for c in candidates]
        self.register_buffer("candidates", pad_sequence(texts, batch_first=True))
        self.register_buffer("lengths", torch.tensor([len(c) for c in candidates], device=device))
        self.logits = nn.Parameter(torch.zeros(num_tasks, len(candidates), dtype=soft_dtype, device=device))

    def candidate_ids(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The candidates' tokens int64 [batch, candidates, longest]; override it for texts that name the instance."""
        return self.candidates.expand(len(batch["input_ids"]), -1, -1)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.logits[_rows_of_tasks(batch, len(self.logits))]
        weights = logits.softmax(-1)  # [batch, candidates]
        ids = self.candidate_ids(batch)
        mask = torch.arange(ids.shape[-1], device=ids.device) < self.lengths[:, None]  # [candidates, longest]
        texts = _embed(self._embedding[0], ids).detach() * mask[:, :, None]
        if self.soft:
            return torch.einsum("bc,bclh->blh", weights, texts.to(weights.dtype)), mask.any(0).expand(len(ids), -1)
        chosen = nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])
        weights = chosen + (weights - weights.detach())  # chosen, to the bit
        return torch.einsum("bc,bclh->blh", weights, texts.to(weights.dtype)), mask[chosen.argmax(-1)]

    def choice(self) -> list[int]:
        """The most probable candidate of each task."""
        return self.logits.argmax(-1).tolist()
