"""Ranks whose loops step by themselves, hold nothing, or are not all of the job."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from spawn import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch_jobs import message_of

from rose_ds import RoseAdamW, prepare

ACCUMULATION = 2


class Net(nn.Sequential):
    """Two layers, named as those of a transformer, with dropout between them."""

    def __init__(self, base: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add_module("layer", nn.Linear(8, 8))
        self.add_module("drop", nn.Dropout(0.2))
        # large and frozen, so that all that FSDP1 shards of the layer lies on the first rank
        self.add_module("base" if base else "head", nn.Linear(8, 64 if base else 3).requires_grad_(not base))


def optimizer_of(model: nn.Module, **rose: Any) -> RoseAdamW:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return RoseAdamW(named, lr=1e-2, strategy="first", include=["layer.*weight"], **rose)


def batch(rank: int, t: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * t + rank)
    return torch.randn(6, 8, generator=generator), torch.randint(classes, (6,), generator=generator)


def micro(stepper: Any, model: nn.Module, rank: int, t: int, classes: int = 3) -> None:
    x, y = batch(rank, t, classes)
    torch.manual_seed(1000 * t + rank)
    stepper.backward(lambda: model(x), lambda z: F.cross_entropy(z, y))


def train(rank: int, *, own: bool) -> Tensor:
    """The weights after three steps of DDP, made by ``step()`` or by the loop."""
    model = DistributedDataParallel(Net())
    optimizer = optimizer_of(model.module)
    stepper = prepare(model, optimizer, accumulation_steps=ACCUMULATION)
    for t in range(3):
        for i in range(ACCUMULATION):
            micro(stepper, model, rank, ACCUMULATION * t + i)
            if own:
                stepper.leave_step_to_optimizer(last=i == ACCUMULATION - 1)
            else:
                stepper.step()
        if own:
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def uneven(rank: int) -> str:
    """What is said of a step that has fewer micro-batches than the others."""
    model = DistributedDataParallel(Net())
    stepper = prepare(model, optimizer_of(model.module), accumulation_steps=ACCUMULATION)
    micro(stepper, model, rank, 0)
    return message_of(lambda: stepper.leave_step_to_optimizer(last=True))


def half_the_job(rank: int) -> str:
    """Of a model that is trained on one of the ranks, beside another on the other."""
    groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
    model = DistributedDataParallel(Net(), process_group=groups[rank])
    return message_of(lambda: prepare(model, optimizer_of(model.module)))


def part_of_a_mesh(rank: int) -> str:
    """Of a model on one dimension of a mesh, beside another on the others."""
    model: Any = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("job", "data"))["data"])
    return message_of(lambda: prepare(model, optimizer_of(model)))


def low_weights(sharded: str) -> str:
    """Of bf16 weights without an fp32 copy."""
    model: Any = Net().to(torch.bfloat16)
    if sharded == "fsdp2":
        fully_shard(model)
    else:
        model = FullyShardedDataParallel(model, use_orig_params=sharded == "orig", device_id=torch.device("cpu"))
    return message_of(lambda: prepare(model, optimizer_of(model)))


def resumed(rank: int) -> list[Any]:
    """What this rank holds, steps it knows of before and after FSDP1 was saved and loaded, and what is kept then."""

    def build() -> tuple[Any, Any, Any]:
        model = FullyShardedDataParallel(Net(base=True), use_orig_params=True, device_id=torch.device("cpu"))
        optimizer = optimizer_of(model, mask_warmup_steps=4)
        return model, optimizer, prepare(model, optimizer)

    options = StateDictOptions(full_state_dict=True)
    model, optimizer, stepper = build()
    for t in range(6):
        micro(stepper, model, rank, t, 64)
        stepper.step()
    held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    before = optimizer.steps_taken()
    saved = [get_state_dict(model, optimizer, options=options)]
    dist.broadcast_object_list(saved)
    weights, states = saved[0]
    model, optimizer, stepper = build()
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states, options=options)
    micro(stepper, model, rank, 6, 64)
    return [held, before, optimizer.steps_taken(), stepper.step().kept_first]


def everything(rank: int, world: int) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    found: dict[str, Any] = {
        "step": train(rank, own=False),
        "own": train(rank, own=True),
        "uneven": uneven(rank),
        "half": half_the_job(rank),
        "mesh": part_of_a_mesh(rank),
        "resumed": resumed(rank),
    }
    return found | {how: low_weights(how) for how in ("orig", "flat", "fsdp2")}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_ranks(everything, 2, timeout=180)


def test_a_loop_that_steps_and_accumulates(found: Any) -> None:
    """Under DDP its gradients were reduced in no micro-batch, and replicas drifted apart."""
    for rank in found:
        assert torch.equal(rank["own"], found[0]["step"])
        assert torch.equal(rank["step"], found[0]["step"])


def test_a_last_micro_batch_that_was_not_reduced(found: Any) -> None:
    assert all("number 1 of prepare(accumulation_steps=2)" in rank["uneven"] for rank in found)


@pytest.mark.parametrize("how", ["half", "mesh"])
def test_a_model_on_some_of_the_ranks(how: str, found: Any) -> None:
    assert all("trained by 1 of the job's 2 ranks" in rank[how] for rank in found)


@pytest.mark.parametrize("how", ["orig", "flat", "fsdp2"])
def test_low_weights_without_fp32_ones(how: str, found: Any) -> None:
    """FSDP1's stand-ins for whole parameters had torch's default type."""
    assert all("is kept in low precision" in rank[how] for rank in found)


def test_a_rank_that_holds_nothing_goes_on_with_the_others(found: Any) -> None:
    """FSDP1's checkpoints have no state for it, and it would begin its mask warm-up anew."""
    first, second = (rank["resumed"] for rank in found)
    assert first[0] and not second[0]
    assert first[1:3] == second[1:3] == [6, 6]
    assert first[3] == second[3]
