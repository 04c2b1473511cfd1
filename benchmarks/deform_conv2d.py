"""Deformable convolution beside what it replaces: ``omniops bench deform_conv2d`` and the project's goals.

torchvision is timed where it is installed, the plain convolution of the same shape everywhere:

pip install torchvision
python benchmarks/deform_conv2d.py --json docs/benchmarks/deform_conv2d.json
"""

import sys

from omniops.cli import main

if __name__ == "__main__":
    main(["bench", "deform_conv2d", "--goals", *sys.argv[1:]])
