"""Two processes compute what one computes: DistributedDataParallel, FSDP2 and the Trainer, on CPU over gloo."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from bitune_kernels import BituneModel
from tests.tiny import base_model, bitune_model, lora, ragged_batch

SECONDS = 120  # the work itself takes a few
RANKS = 2
CHECKPOINTING = {"plain": None, "reentrant": True, "nonreentrant": False}

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def _rank(rank: int, port: int, function, args) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    try:
        function(rank, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def on_two_ranks(function, *args) -> None:
    """Run ``function(rank, *args)`` in two processes; raises what one of them raised."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # A server imports these once and forks every process from there; this one has run autograd, and mustn't be forked.
    mp.get_context("forkserver").set_forkserver_preload(["torch", "peft", "transformers.trainer", "tests.tiny"])
    ranks = mp.start_processes(_rank, (port, function, args), nprocs=RANKS, join=False, start_method="forkserver")
    end = time.monotonic() + SECONDS
    while not ranks.join(timeout=1):
        if time.monotonic() > end:
            for process in ranks.processes:
                process.kill()
            pytest.fail(f"{function.__name__}: not done after {SECONDS} s")


def batch(equal: bool = True):
    # 7 targets for each rank, or 7 and 11
    return ragged_batch(answers=(3, 4, 4, 3) if equal else (3, 4, 4, 7))


PROMPTS = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 3], [4, 5]])
# prompts of one token alone in process 1, which are no prompt rows: the adapter "bidir" has nothing to do there
ONE_TOKEN = ragged_batch(prompts=(5, 3, 1, 1), answers=(3, 4, 4, 3))


def share(rank: int, tensors):
    return [x[2 * rank : 2 * rank + 2] for x in tensors]


def make(checkpointing: str, **config):
    model = bitune_model(**config).train()
    if CHECKPOINTING[checkpointing] is not None:
        options = {"use_reentrant": CHECKPOINTING[checkpointing]}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    return model


def step(model, tensors, **options) -> torch.Tensor:
    ids, mask, labels = tensors
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, **options).loss
    loss.backward()
    return loss.detach()


def one_process(equal: bool = True, **config):
    model = bitune_model(**config).train()
    return step(model, batch(equal)), model


def compare(case: str, model, expected) -> None:
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None or not p.grad.any(), f"{case}: {name}"
            continue
        gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(gradient, q.grad, atol=1e-7, rtol=1e-4, msg=lambda m, n=name: f"{case}: {n}: {m}")


def mean(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x / RANKS


def data_parallel(rank: int) -> None:
    from torch.nn.parallel import DistributedDataParallel

    cases = [(c, {}) for c in CHECKPOINTING]
    cases += [("reentrant", {"mixing_granularity": "global"}), ("nonreentrant", {"use_fused": False})]
    cases += [("plain", {"variant": v}) for v in ("naive_bidir", "shared_weights", "only_causal")]
    cases += [("plain", {"peft": None}), ("reentrant", {"loss_chunk_rows": 3})]
    for checkpointing, config in cases:
        case = f"{checkpointing} {config}"
        loss, expected = one_process(**config)
        model = make(checkpointing, **config)
        # in three passes the last layer's bidirectional q has no gradient, in one pass it is zero
        wrapped = DistributedDataParallel(model, find_unused_parameters=not config.get("use_fused", True))
        for _ in range(2):  # a parameter without a gradient in the first step is an error in the second
            model.zero_grad()
            found = mean(step(wrapped, share(rank, batch())))
            torch.testing.assert_close(found, loss, atol=0, rtol=1e-6, msg=lambda m, c=case: f"{c}: {m}")
            compare(case, model, expected)

    # ragged shares: the trainers' global count of targets, times the ranks that the gradients are averaged over
    loss, expected = one_process(equal=False)
    model = make("plain")
    wrapped = DistributedDataParallel(model)
    tensors = batch(equal=False)
    count = int((tensors[2] != -100).sum())
    found = mean(step(wrapped, share(rank, tensors), num_items_in_batch=count / RANKS))
    torch.testing.assert_close(found, loss, atol=0, rtol=1e-6)
    compare("ragged", model, expected)

    for config in ({"dynamic_mixing": True}, {"variant": "single_stream_dual"}, {"peft": lora(use_dora=True)}):
        expected = make("plain", **config)
        step(expected, ONE_TOKEN)
        model = make("plain", **config)
        step(DistributedDataParallel(model), share(rank, ONE_TOKEN))
        compare(f"one token {config}", model, expected)


def test_data_parallel_gradients_are_those_of_one_process():
    on_two_ranks(data_parallel)


def fully_sharded(rank: int, folder: str) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    from bitune_kernels.training.alpha import alphas

    mesh = init_device_mesh("cpu", (RANKS,))
    cases = [(c, {}) for c in CHECKPOINTING]
    cases += [("plain", {"mixing_granularity": "global"}), ("plain", {"loss": "sample", "loss_chunk_rows": 3})]
    cases += [("nonreentrant", {"loss_chunk_rows": 3})]
    for checkpointing, config in cases:
        case = f"{checkpointing} {config}"
        loss, expected = one_process(**config)
        model = make(checkpointing, **config)
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=checkpointing != "plain")
        fully_shard(model, mesh=mesh)
        for _ in range(2):
            model.zero_grad()
            with model.disable_adapter(), torch.no_grad():  # leaves whole parameters, unless they are sharded again
                model(input_ids=batch()[0])
            found = mean(step(model, share(rank, batch())))
            torch.testing.assert_close(found, loss, atol=0, rtol=1e-6, msg=lambda m, c=case: f"{c}: {m}")
            compare(case, model, expected)
        assert alphas(model.mixing) == alphas(expected.mixing), case
        with torch.no_grad():
            model(input_ids=batch()[0])
        with pytest.raises(ValueError, match="state_dict: expected a full one"):  # also of layers that are whole now
            model.save_pretrained(folder)

    # frozen weights in bfloat16, adapters and thetas in float32: one group of FSDP with two dtypes
    bfloat16 = bitune_model(base=base_model(dtype=torch.bfloat16)).train()
    loss = step(bfloat16, batch())
    model16 = bitune_model(base=base_model(dtype=torch.bfloat16)).train()
    for layer in model16.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model16, mesh=mesh)
    torch.testing.assert_close(mean(step(model16, share(rank, batch()))), loss, atol=0, rtol=1e-2)
    for (name, p), q in zip(model16.named_parameters(), bfloat16.parameters(), strict=True):
        assert p.dtype == q.dtype and (
            q.grad is None or (p.grad.full_tensor() - q.grad).norm() <= 0.05 * q.grad.norm()
        ), name

    # mixed precision: what a layer is given, and all parameters, thetas and gates among them, are cast to bfloat16
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for config in ({}, {"dynamic_mixing": True, "loss_chunk_rows": 3}):
        rounded, mixed = (bitune_model(**config).train() for _ in range(2))
        for name, p in rounded.named_parameters():  # thetas are computed with in float32
            p.data = p.data.bfloat16().float() if name.startswith("mixing.") else p.data.bfloat16()
        losses = [step(rounded, share(r, batch())) for r in range(RANKS)]
        for module in (*mixed.get_base_model().model.layers, mixed):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        torch.testing.assert_close(step(mixed, share(rank, batch())), losses[rank], atol=0, rtol=1e-5)
        for (name, p), q in zip(mixed.named_parameters(), rounded.parameters(), strict=True):
            if q.grad is not None:
                assert (RANKS * p.grad.full_tensor() - q.grad).norm() <= 0.01 * q.grad.norm(), name

    # the embedding and the head in groups of their own, as accelerate has them: 3 chunks of one process, 4 of the other
    tensors = batch(equal=False)
    loss, whole = one_process(equal=False)
    chunked = make("plain", loss_chunk_rows=3)
    base = chunked.get_base_model()
    for module in (*base.model.layers, base.model.embed_tokens, base.lm_head, chunked):
        fully_shard(module, mesh=mesh)
    count = int((tensors[2] != -100).sum())
    found = mean(step(chunked, share(rank, tensors), num_items_in_batch=count / RANKS))
    torch.testing.assert_close(found, loss, atol=0, rtol=1e-6)
    compare("head of its own", chunked, whole)

    whole = make("plain")
    step(whole, ONE_TOKEN)
    chunked.zero_grad()
    step(chunked, share(rank, ONE_TOKEN))
    compare("one token", chunked, whole)

    # which isn't the forward that weights are gathered for; one process makes more tokens than the other
    register_fsdp_forward_method(model, "generate")
    options = dict(input_ids=PROMPTS[rank], max_new_tokens=3 + rank, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(model.eval().generate(**options, synced_gpus=True), expected.eval().generate(**options))
    model.train()

    with model.use_schedule(use_fused=False), pytest.raises(ValueError, match="use_fused: expected True"):
        step(model, share(rank, batch()))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
        loaded = BituneModel.from_pretrained(base_model(), folder)
        for (name, p), q in zip(loaded.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(p, q), name


def test_fully_sharded_gradients_are_those_of_one_process_and_save_whole(tmp_path):
    on_two_ranks(fully_sharded, str(tmp_path))


class Encoder(torch.nn.Module):
    """What DistributedDataParallel and FSDP2 wrap, since they act around a call of their own module."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        model.set_requires_grad("causal", False)
        model.mixing.requires_grad_(False)

    def forward(self, ids, mask, labels):
        from bitune_kernels.modeling import encode, masked_next_token_loss

        masked = masked_next_token_loss(self.model, ids, labels, mask)
        return masked + encode(self.model, ids, mask).sin().mean()


def encoded(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def sharded(encoder):
        mesh = init_device_mesh("cpu", (RANKS,))
        base = encoder.model.get_base_model()
        for module in (*base.model.layers, base.lm_head, encoder):
            fully_shard(module, mesh=mesh)
        return encoder

    ids, mask, labels = batch()
    for wrap in (DistributedDataParallel, sharded):
        expected = Encoder(bitune_model().train())
        expected(ids, mask, labels).backward()
        model = bitune_model().train()
        wrapped = wrap(Encoder(model))
        for _ in range(2):
            model.zero_grad()
            wrapped(*share(rank, (ids, mask, labels))).backward()
            compare(wrap.__name__, model, expected.model)


def test_vectors_of_two_processes_have_the_gradients_of_one():
    on_two_ranks(encoded)


TWO_BATCHES = batch(), ragged_batch(seed=1, answers=(3, 4, 4, 3))  # training and validation


def as_inputs(ids, mask, labels) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def learn_instructions(model, batches, seed: int = 0) -> list[torch.Tensor]:
    """How two steps change the model's parameters and the instruction's, and what other instructions return."""
    from bitune_kernels.training import EncodedInstruction, InstructionOptimizer, InstructionSelector, SoftInstruction

    def vector(parameters):
        return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten() for p in parameters])

    batches = [as_inputs(*tensors) for tensors in batches]
    embedding = getattr(model, "module", model).get_input_embeddings()
    torch.manual_seed(0)
    others = EncodedInstruction(embedding, length=2), InstructionSelector(embedding, [[5, 6], [], [7]], soft=True)
    vectors = [vector(instruction(batches[0])[0]) for instruction in others]
    torch.manual_seed(seed)
    instruction = SoftInstruction(embedding, length=3)
    theta, phi = [p for p in model.parameters() if p.requires_grad], [instruction.vectors]
    inner, outer = torch.optim.SGD(theta, 1e-3), torch.optim.SGD(phi, 10.0)
    before = vector(theta)
    optimizer = InstructionOptimizer(model, instruction, inner, outer, max_grad_norm=1e9)
    for _ in range(2):
        optimizer.step(*batches)
    return [vector(theta) - before, vector(phi), *vectors]


def instructions(rank: int, expected: list[torch.Tensor]) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from bitune_kernels.training import InstructionOptimizer, SoftInstruction, prepend_instruction

    def sharded(model):
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    own = [share(rank, tensors) for tensors in TWO_BATCHES]
    expected = expected[:2] + [x.view(RANKS, -1)[rank] for x in expected[2:]]
    bucket_views = partial(DistributedDataParallel, gradient_as_bucket_view=True)
    for wrap in (DistributedDataParallel, bucket_views, sharded):
        # process 1 would begin with other vectors
        found = learn_instructions(wrap(bitune_model().train()), own, seed=rank)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= 1e-3 * b.norm() > 0, wrap

    model = bitune_model()
    instruction = SoftInstruction(model.get_input_embeddings(), length=1)
    inner, outer = (torch.optim.SGD(module.parameters(), 1e-3) for module in (model, instruction))
    with pytest.raises(ValueError, match="method: expected 'finite' on 2 processes"):
        InstructionOptimizer(model, instruction, inner, outer, method="exact")
    vectors = torch.zeros(RANKS, 1, 32)
    with pytest.raises(ValueError, match="model: expected frozen token embeddings where FSDP2 shards it"):
        prepend_instruction(fully_shard(base_model()), as_inputs(*own[0]), vectors, vectors[:, :, 0] == 0)


def test_instructions_learned_by_two_processes_are_those_of_one():
    on_two_ranks(instructions, learn_instructions(bitune_model().train(), TWO_BATCHES))


def train(rank: int, folder: str, expected: list[float], checkpointing: str) -> None:
    from tests.test_trainers import hf_trainer, losses

    trainer = hf_trainer(bitune_model(), f"{folder}/two", **trainer_options(1, checkpointing))
    assert trainer.accelerator.num_processes == RANKS
    trainer.train()
    if rank == 0:
        assert losses(trainer) == pytest.approx(expected, rel=1e-3)  # logged with four digits


def trainer_options(accumulation: int, checkpointing: str = "plain") -> dict:
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=accumulation, save_strategy="no")
    if CHECKPOINTING[checkpointing] is not None:
        # the Trainer looks for unused parameters where the model is PEFT's, which reentrant checkpoints hide
        options |= dict(gradient_checkpointing=True, ddp_find_unused_parameters=False)
        options |= dict(gradient_checkpointing_kwargs={"use_reentrant": CHECKPOINTING[checkpointing]})
    return options


@pytest.mark.parametrize("checkpointing", ["plain", "reentrant"])
def test_the_trainer_on_two_ranks_gives_the_losses_of_accumulation(checkpointing, tmp_path):
    from tests.test_trainers import hf_trainer, losses

    alone = hf_trainer(bitune_model(), tmp_path / "one", **trainer_options(RANKS))
    alone.train()
    assert losses(alone)[-1] < losses(alone)[0]
    on_two_ranks(train, str(tmp_path), losses(alone), checkpointing)


def shard(rank: int, folder: str, expected: list[float]) -> None:
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from transformers import Trainer, TrainingArguments

    from tests.test_trainers import arguments, collate, losses, tokenized

    fsdp = dict(fsdp=True, fsdp_config={"activation_checkpointing": True})
    args = arguments(TrainingArguments, folder, per_device_train_batch_size=2, **fsdp)
    assert args.device.type == "cpu"
    PartialState().distributed_type = DistributedType.MULTI_XPU  # on CPUs accelerate shards nothing
    for resume in (None, f"{folder}/checkpoint-2"):
        model = bitune_model()
        trainer = Trainer(model=model, args=args, train_dataset=tokenized(), data_collator=collate)
        trainer.train(resume_from_checkpoint=resume)
        assert all(hasattr(p, "full_tensor") for p in model.parameters())
        assert [type(m).__name__ for m in model.get_base_model().model.layers] == ["FSDPCheckpointWrapper"] * 3
        if rank == 0:
            assert losses(trainer) == pytest.approx(expected, rel=1e-5)
    trainer.save_model(f"{folder}/final")


def test_the_trainer_shards_recomputes_resumes_and_saves(tmp_path):
    from tests.test_trainers import hf_trainer, losses

    model = bitune_model()
    alone = hf_trainer(model, tmp_path / "one")
    alone.train()
    on_two_ranks(shard, str(tmp_path), losses(alone))
    saved = BituneModel.from_pretrained(base_model(), tmp_path / "final", is_trainable=True)
    expected = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in saved.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_base_model_that_is_sharded_already_is_refused():
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        base = base_model()
        base.lm_head.weight = nn.Parameter(
            distribute_tensor(base.lm_head.weight.detach(), init_device_mesh("cpu", (1,)))
        )
        with pytest.raises(ValueError, match=r"^base_model: expected whole weights, got lm_head.weight as a DTensor"):
            bitune_model(base=base)
    finally:
        dist.destroy_process_group()


def test_parameters_partitioned_by_zero_3_are_refused():
    # DeepSpeed isn't needed for its mark
    base = base_model()
    base.model.layers[1].mlp.up_proj.weight.ds_id = 7
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight partitioned by DeepSpeed ZeRO-3"):
        bitune_model(base=base)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())

    model = bitune_model()
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3"):
        step(model, batch())


def test_sharded_checkpoints_of_the_trainer_are_warned_of(monkeypatch):
    plugin = SimpleNamespace(state_dict_type=SimpleNamespace(name="SHARDED_STATE_DICT"))
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
    with pytest.warns(UserWarning, match="expected FULL_STATE_DICT"):
        step(bitune_model().train(), batch())


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_samples_spread_over_processes_are_refused(monkeypatch, name):
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", ParallelismConfig(**{name: 2}))
    with pytest.raises(
        ValueError, match=f"^parallelism_config: expected {name}=1, since a pass needs whole samples, got 2"
    ):
        step(bitune_model().train(), batch())
