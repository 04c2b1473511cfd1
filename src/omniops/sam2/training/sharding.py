"""FSDP2: each process keeps a share of the weights, of their gradients and of the optimizer's state."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omniops.sam2.modeling.sam2 import SAM2Base


def fully_shard_step(step: nn.Module) -> None:
    """Share the weights of a training step out among the processes of the default group, in place.

    PyTorch's ``fully_shard`` for SAM 2: the blocks of the image encoder's trunk, which have most of the weights, are
    gathered one at a time, when they run. The rest is gathered once a step, because clips call it as often as their
    prompts have it. Optimizers are made afterwards.

    In one step all processes must train the same weights: the same prompt, clips or pictures in all of them. Gradients
    are the means over processes, also with gloo in torch 2.7, which adds them up.

    Args:
        step: a module that holds the network, and whose forward returns the loss, a tensor or a tuple of tensors as of
            ``image_step`` and ``clip_step``.

    Raises:
        RuntimeError: without a process group.
        ValueError: for a step that holds no network, or that is the network itself.

    Example:
        >>> class Step(nn.Module):
        ...     def __init__(self, model):
        ...         super().__init__()
        ...         self.model = model
        ...
        ...     def forward(self, images, targets):
        ...         return image_step(self.model, images, targets, num_correction_pt_per_frame=1)
        >>> from omniops.sam2 import load
        >>> from omniops.sam2.training import image_step
        >>> model = load("tiny", "cpu", "float32", image_size=32, random_weights=True).train()
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> step = Step(model)
        >>> fully_shard_step(step)
        >>> step(torch.randn(1, 3, 32, 32), torch.ones(1, 32, 32)).total.backward()
        >>> torch.distributed.destroy_process_group()
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "fully_shard_step needs a process group: start the processes by torchrun, and call "
            "torch.distributed.init_process_group first"
        )
    models = [module for module in step.modules() if isinstance(module, SAM2Base)]
    if len(models) != 1 or models[0] is step:
        raise ValueError(
            f"step must be a module that holds one SAM2Base and whose forward returns its loss, got "
            f"{type(step).__name__} with {len(models)} of them"
        )
    # Imported here, as they load much that only this needs.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    (model,) = models
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    for block in model.image_encoder.trunk.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(step, mesh=mesh)
    if _sums_gradients(model.device):
        step.register_forward_hook(_divide_gradients)


def _sums_gradients(device: torch.device) -> bool:
    """Whether the group adds up where FSDP2 has it average, as gloo did (pytorch issue 162338)."""
    share = torch.empty(1, device=device)
    dist.reduce_scatter_tensor(share, torch.ones(dist.get_world_size(), device=device), op=dist.ReduceOp.AVG)
    return share.item() != 1


def _divide_gradients(step: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
    """Have the losses' gradients divided by the number of processes, and so all others."""
    for loss in (output,) if isinstance(output, Tensor) else output:
        if loss.requires_grad:
            loss.register_hook(lambda gradient: gradient / dist.get_world_size())
