"""--shard: weights, gradients and moments are spread over all processes (FSDP2).

Each block of a network is gathered when it is needed, and freed again. All other parameters (embeddings, heads) are one
group, which is gathered once a step. Checkpoints hold whole tensors, so they are the same files without --shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

M = TypeVar("M", bound=nn.Module)


def shard(objective: M, device: torch.device, half: bool) -> M:
    """Spreads the parameters of ``objective`` over all processes, in place, and moves it to their devices.

    The optimiser has to be made afterwards. Only ``objective`` itself may then be called, by all processes at once.

    Args:
        half: blocks are gathered in bfloat16, as autocast would use them; shards and gradients stay in float32.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    halved = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in list(objective.modules()):
        blocks, method = getattr(module, "shard_units", lambda: ([], ""))()
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=halved if half and method else MixedPrecisionPolicy())
            if method:  # it is called in place of forward
                register_fsdp_forward_method(block, method)
    fully_shard(objective, mesh=mesh)
    return objective


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors, those from shards on the CPU. All processes must call it; without ``keep`` it returns {}."""
    whole = {}
    for name, tensor in tensors.items():
        full = tensor
        if isinstance(tensor, DTensor):
            full = tensor.full_tensor().detach()
            full = full.cpu() if keep else full
        if keep:
            whole[name] = full
    return whole


def spread(whole: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's shards of whole tensors, where ``like`` has shards of that name. Nothing is communicated."""
    parts = {}
    for name, tensor in whole.items():
        model = like.get(name)
        if isinstance(model, DTensor):
            tensor = distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)
        parts[name] = tensor
    return parts
