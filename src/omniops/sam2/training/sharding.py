"""FSDP2: each process keeps a share of the weights, of their gradients and of the optimizer's state."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from omniops.sam2.modeling.sam2 import SAM2Base


def fully_shard_step(step: nn.Module) -> None:
    """Share the weights of a training step out among the processes of the default group, in place.

    PyTorch's ``fully_shard`` for SAM 2: the blocks of the image encoder's trunk, which have most of the weights, are
    gathered one at a time, when they run. The rest is gathered once a step, because clips call it as often as their
    prompts have it. Optimizers are made afterwards.

    In one step all processes must train the same weights: the same prompt, clips or pictures in all of them.

    Args:
        step: a module whose forward returns the loss, as of ``image_step`` or ``clip_step``, and which holds the
            network. Seen on the CPU with gloo and on CUDA with nccl.

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
