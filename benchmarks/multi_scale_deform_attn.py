"""Multi-scale deformable attention beside what it replaces: ``omniops bench multi_scale_deform_attn`` and the goals.

On NVIDIA GPUs deformops (Python 3.12 and newer) is timed where it is installed, the composition of grid_sample
everywhere:

pip install deformops
python benchmarks/multi_scale_deform_attn.py --json docs/benchmarks/multi_scale_deform_attn.json
"""

import sys

from omniops.cli import main

if __name__ == "__main__":
    main(["bench", "multi_scale_deform_attn", "--goals", *sys.argv[1:]])
