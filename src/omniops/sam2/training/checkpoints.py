"""Fine-tuned weights as a file."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omniops.weights import replace_file


def save_checkpoint(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write the weights as Meta's checkpoints have them, for ``omniops.sam2.load`` and the official package.

    Of several processes the first writes. Where ``fully_shard_step`` shares weights out, all processes must call this,
    since each weight is gathered from them; the first alone keeps them, on the CPU.

    Args:
        model: the network, without what is around it for training.
        path: the file, which is replaced once all is on the disk.

    Raises:
        OSError: where the file cannot be written.

    Example:
        >>> from omniops.sam2 import load
        >>> model = load("tiny", "cpu", "float32", image_size=64, random_weights=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(model, folder + "/tuned.pt")
        ...     tuned = load(folder + "/tuned.pt", "cpu", image_size=64)
        >>> torch.equal(tuned.no_mem_embed, model.no_mem_embed)
        True
    """
    is_first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.detach()
        if hasattr(whole, "full_tensor"):  # a share of it: every process has to take part
            whole = whole.full_tensor()
        if is_first:
            state[name] = whole.cpu()
    if is_first:
        replace_file(Path(path), lambda file: torch.save({"model": state}, file))
