"""What the tests of the documentation's examples share: which of them this machine can run.

An example that needs more than the packages it imports says so in a comment, ``# needs: the network``. Where this
machine has not got that, the example is compiled and not run.
"""

import ast
import re
import sys
from importlib.util import find_spec

import torch

NEEDS = {
    "the network": lambda: False,  # the suite fetches nothing
    "CUDA": torch.cuda.is_available,
    "MPS": torch.backends.mps.is_available,
}
# What the parts of omniops that are extras import.
EXTRAS = {"omniops.sam2": ("av", "huggingface_hub", "safetensors"), "omniops.detection": ("torchvision",)}


def needs(source):
    """What an example says that it needs."""
    found = re.findall(r"# needs: (.+)$", source, re.MULTILINE)
    unknown = set(found) - set(NEEDS)
    assert not unknown, f"no such need: {unknown}"
    return found


def unmet(source):
    """Of these needs the ones that this machine does not meet."""
    return [need for need in needs(source) if not NEEDS[need]()]


def missing(source):
    """The packages that an example imports and that are not installed."""
    asked = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            asked.add(name.partition(".")[0])
            asked.update(EXTRAS.get(name, ()))
    return sorted(name for name in asked if name not in sys.modules and find_spec(name) is None)
