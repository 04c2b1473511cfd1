"""SAM 2 as the command line names it, and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omniops.cli.common import CommandError, load_sam2
from omniops.cli.errors import reason, say
from omniops.cli.segment.options import Precision
from omniops.formatting import dtype_name

if TYPE_CHECKING:
    import torch

    from omniops.sam2.modeling.sam2 import SAM2Base


@dataclass
class ModelChoice:
    """The model that the options name."""

    name: str
    random_weights: bool
    device: torch.device
    precision: Precision
    image_size: int | None
    _loaded: SAM2Base | None = field(default=None, init=False, repr=False)

    def load(self) -> SAM2Base:
        """The model on the device, which is loaded once; what takes a while is said on stderr."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self) -> SAM2Base:
        means_nothing = ", with random weights: its masks mean nothing" if self.random_weights else ""
        say(f"loading SAM 2, {self.name}{means_nothing}")
        load_sam2()
        if self.random_weights:
            config_file(self.name)
        return load_model(self.name, self.random_weights, self.device, self.precision, self.image_size)


def load_model(
    model: str, random_weights: bool, device: torch.device, precision: Precision, image_size: int | None
) -> SAM2Base:
    """The model on the device; its random weights are from a fixed seed."""
    from omniops import sam2

    try:
        return sam2.load(model, device, precision.value, image_size=image_size, random_weights=random_weights)
    except FileNotFoundError as error:
        raise CommandError(str(error)) from None
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # RuntimeError: no memory
        raise CommandError(reason(error), status=1) from None


def config_file(size: str) -> str:
    """The official package's configuration of a size; raise for what is no size."""
    from omniops.sam2.architectures import LETTERS, SIZES

    if size not in SIZES:
        raise CommandError(f"random weights are of a size, --model {', '.join(SIZES)}; got {size!r}")
    return f"configs/sam2.1/sam2.1_hiera_{LETTERS[size]}.yaml"


def device_and_dtype(model: SAM2Base) -> str:
    """The device in words, and what is computed in."""
    import torch

    from omniops import device as devices

    return f"{devices.title(torch.device(model.device))}, {dtype_name(model.dtype)}"
