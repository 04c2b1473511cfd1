"""The example as its documentation prints it, with fewer steps of a smaller size."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from omniops.sam2.checkpoints import load

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples/finetune_sam2.py"
PAGE = ROOT / "docs/sam2.md"
SIDE = 64
pytestmark = pytest.mark.skipif(not EXAMPLE.exists() or not PAGE.exists(), reason="examples/ is not beside the tests")


def commands(path):
    pattern = r"^ {4}((?:python|torchrun) .*examples/finetune_sam2\.py .*)$"
    return re.findall(pattern, path.read_text(encoding="utf-8"), re.M)


COMMANDS = commands(EXAMPLE) if EXAMPLE.exists() else []


def run(command, *more):
    program, *arguments = shlex.split(command)
    module = [] if program == "python" else ["-m", "torch.distributed.run"]
    return subprocess.run(
        [sys.executable, *module, *arguments, *more], cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def test_the_page_prints_the_commands_of_the_example():
    assert commands(PAGE) == COMMANDS
    assert [command.split()[0] for command in COMMANDS] == ["python", "torchrun", "torchrun"]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_trains_and_writes_weights(command, tmp_path):
    if command.startswith("torchrun") and (not dist.is_available() or sys.platform == "win32"):
        pytest.skip("needs torch.distributed")
    out = tmp_path / "tuned.pt"
    few = ["--steps", "4", "--image-size", str(SIDE), "--frames", "2", "--clicks", "1", "--out", out]
    done = run(command, *few)
    assert done.returncode == 0, done.stderr
    kinds = [
        re.fullmatch(r"step \d \((\w+), \w+\): loss \d+\.\d+, IoU \d\.\d+", line) for line in done.stdout.splitlines()
    ]
    assert [kind[1] for kind in kinds[:-1]] == ["pictures", "clip", "pictures", "clip"]
    assert done.stdout.endswith(f"wrote {out}\n")
    tuned, before = (
        load(model, "cpu", "float32", image_size=SIDE, random_weights=model == "tiny") for model in (out, "tiny")
    )
    assert (tuned.no_mem_embed - before.no_mem_embed).abs().max() > 1e-5


@pytest.mark.slow
def test_shares_need_processes():
    done = run("python examples/finetune_sam2.py --fsdp")
    assert done.returncode == 2
    assert "torchrun --nproc-per-node" in done.stderr
