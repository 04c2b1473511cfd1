"""Two processes train as one: the same losses, the same weights, the same figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("omniops.detection.coco", exc_type=ImportError, reason="needs torchvision and faster-coco-eval")

TESTS = Path(__file__).parents[2]


def train(shapes, out, statistics):
    """In each process; with ``statistics`` in a model whose batch normalisation counts them."""
    import tiny_detectors

    from omniops.detection import coco
    from omniops.detection.training import CocoDataset, Settings, Training, fit
    from omniops.distributed import Processes

    processes = Processes()
    processes.start()
    # Pictures of one size: others are padded to the largest of their process.
    annotations = coco.read_annotations(Path(shapes) / "annotations.json")
    dataset = CocoDataset(Path(shapes) / "images", annotations, masks=True)
    torch.manual_seed(processes.rank)  # the first one's weights are everybody's
    model = tiny_detectors.build(True, num_classes=3, box_batch_size_per_image=24)
    if statistics:
        model.backbone.stem = torch.nn.Sequential(model.backbone.stem, torch.nn.BatchNorm2d(8))
    settings = Settings(epochs=2, batch=4, lr=0.02)
    device = torch.device("cpu")
    training = Training(model, dataset, settings, device, tiny_detectors.NAMES[1], processes=processes)
    history = fit(training, out, dataset)
    buffers = processes.gather({name: value.tolist() for name, value in model.named_buffers()})
    if processes.rank == 0:
        (Path(out) / "run.json").write_text(json.dumps({"history": history, "buffers": buffers}))
    processes.end()


def _run(count, shapes, out, statistics=False):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [*command, __file__, str(shapes), str(out), *(["statistics"] if statistics else [])],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads((out / "run.json").read_text())


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed"),
]


@pytest.fixture(scope="module")
def same_sizes(tmp_path_factory):
    import shapes_dataset

    folder = tmp_path_factory.mktemp("same")
    shapes_dataset.make(folder, 10, sizes=[(64, 64)])
    return folder


def test_two_processes_train_as_one(same_sizes, tmp_path):
    """Although they draw different numbers of proposals: the last picture has no object."""
    one, two = (_run(count, same_sizes, tmp_path / str(count))["history"] for count in (1, 2))
    for record, other in zip(two, one, strict=True):
        assert record["losses"] == pytest.approx(other["losses"], rel=2e-4)
        assert record["lr"] == other["lr"]
        for kind in ("bbox", "segm"):
            assert record[kind]["AP50"] == pytest.approx(other[kind]["AP50"], abs=0.02)
    states = [torch.load(tmp_path / str(count) / "last.pth", weights_only=True) for count in (1, 2)]
    assert states[0]["dataset"] == states[1]["dataset"]
    for name, value in states[0]["state_dict"].items():
        assert (states[1]["state_dict"][name] - value).abs().max() <= 2e-4 * value.abs().max(), name


def test_statistics_are_the_first_process_s(same_sizes, tmp_path):
    first, second = _run(2, same_sizes, tmp_path / "out", statistics=True)["buffers"]
    assert len(first) == 3
    assert first == second


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], sys.argv[2], sys.argv[3:] == ["statistics"])
