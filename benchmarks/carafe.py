"""CARAFE beside what it replaces: ``omniops bench carafe`` with the same options, our goals and mmcv's times.

python benchmarks/carafe.py --json docs/benchmarks/carafe.json --plot docs/benchmarks/carafe.png
"""

import sys
from pathlib import Path

from omniops.cli import main

MMCV = Path(__file__).with_name("mmcv_h200.json")
"""mmcv's times, measured earlier on an NVIDIA H200 and shown where the run is on one; the file says how."""

if __name__ == "__main__":
    main(["bench", "carafe", "--goals", "--beside", str(MMCV), *sys.argv[1:]])
