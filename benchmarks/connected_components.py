"""Connected components beside what they replace: ``omniops bench connected_components`` and the project's goals.

OpenCV and SciPy on the CPU, and sam2 with its CUDA extension, are timed where they are installed:

pip install opencv-python-headless scipy
python benchmarks/connected_components.py --json docs/benchmarks/connected_components.json
"""

import sys

from omniops.cli import main

if __name__ == "__main__":
    main(["bench", "connected_components", "--goals", *sys.argv[1:]])
