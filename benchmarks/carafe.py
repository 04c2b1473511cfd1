"""CARAFE beside what it replaces: ``omniops bench carafe`` with the same options, and mmcv's published times beside it.

python benchmarks/carafe.py --json docs/benchmarks/carafe.json --plot docs/benchmarks/carafe.png
"""

import sys
from pathlib import Path

from omniops.cli import main

PUBLISHED = Path(__file__).with_name("mmcv_h200.json")
"""mmcv's times on an NVIDIA H200, shown where the run is on one; the file says where they are from."""

if __name__ == "__main__":
    main(["bench", "carafe", "--beside", str(PUBLISHED), *sys.argv[1:]])
