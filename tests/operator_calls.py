"""Which of our operators PyTorch is asked for."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorCalls(TorchDispatchMode):
    """Within it, the names of our operators in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    @property
    def counts(self) -> Counter[str]:
        """How often each was called."""
        return Counter(self.names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "omniops":
            self.names.append(func._schema.name.removeprefix("omniops::"))
        return func(*args, **(kwargs or {}))
