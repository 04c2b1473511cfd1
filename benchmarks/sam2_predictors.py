"""SAM 2 on one device beside another: ``omniops bench sam2`` with the same options.

The official package is timed where it is installed. (This file is not called as it is: Python would take it for that.)

pip install sam2
python benchmarks/sam2_predictors.py photo.jpg --json docs/benchmarks/sam2.json --plot docs/benchmarks/sam2.png
"""

import sys

from omniops.cli import main

if __name__ == "__main__":
    main(["bench", "sam2", *sys.argv[1:]])
