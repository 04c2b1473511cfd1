"""MMDetection without a compiler: a detector of its configs finds objects in a photograph, and learns from it.

pip install omniops torchvision mmdet==3.3.0 mmcv-lite==2.1.0
python examples/mmdetection.py photo.jpg --model carafe-mask --weights FILE --out found.jpg

OpenMMLab's model zoo has the weights, such as those of the CARAFE detectors:
https://github.com/open-mmlab/mmdetection/tree/main/configs/carafe
"""

# ruff: noqa: E402

import argparse
from pathlib import Path

import omniops

omniops.enable()  # mmdet needs mmcv.ops when it is imported

import mmcv
import mmdet
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import get_test_pipeline_cfg
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import OptimWrapper
from mmengine.structures import InstanceData

CONFIGS = Path(mmdet.__file__).parent / ".mim/configs"
MODELS = {
    "carafe-faster": "carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py",
    "carafe-mask": "carafe/mask-rcnn_r50_fpn-carafe_1x_coco.py",
    "dcn": "dcn/mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
}


def main() -> None:
    """Read the command line and do what it asks."""
    arguments = parse()
    config = Config.fromfile(CONFIGS / MODELS.get(arguments.model, arguments.model))
    for step in config.test_dataloader.dataset.pipeline:
        if step.type == "Resize":
            step.scale = tuple(arguments.scale)
    rcnn_or_head = config.model.test_cfg.get("rcnn", config.model.test_cfg)
    rcnn_or_head.score_thr = arguments.score
    model = init_detector(config, arguments.weights, device=arguments.device)

    result = inference_detector(model, str(arguments.image))
    found = result.pred_instances
    print(f"{len(found)} objects found on {next(model.parameters()).device}")
    for label, score, box in zip(found.labels[:10], found.scores, found.bboxes, strict=False):
        x1, y1, x2, y2 = (round(coordinate, 1) for coordinate in box.tolist())
        print(f"{model.dataset_meta['classes'][label]} {score:.3f} at ({x1}, {y1}) to ({x2}, {y2})")
    if arguments.out:
        photograph = mmcv.imread(arguments.image, channel_order="rgb")
        visualizer = DetLocalVisualizer()
        visualizer.dataset_meta = model.dataset_meta
        visualizer.add_datasample(
            "found", photograph, result, draw_gt=False, pred_score_thr=arguments.score, out_file=str(arguments.out)
        )
        print(f"drawn in {arguments.out}")
    if arguments.train_step:
        losses = train_step(model, arguments.image)
        print(", ".join(f"{name} {loss.item():.4f}" for name, loss in losses.items() if "loss" in name))


def train_step(model: torch.nn.Module, image: Path) -> dict[str, torch.Tensor]:
    """Take one step that teaches the model an object in the middle of the picture; returns the losses."""
    data = Compose(get_test_pipeline_cfg(model.cfg))({"img_path": str(image), "img_id": 0})
    sample = data["data_samples"]
    height, width = sample.img_shape
    top, left = height // 4, width // 4
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, top : height - top, left : width - left] = 1
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[left, top, width - left, height - top]], dtype=torch.float32),
        labels=torch.tensor([0]),
        masks=BitmapMasks(mask.numpy(), height, width),
    )
    model.train()
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9))
    return model.train_step({"inputs": [data["inputs"]], "data_samples": [sample]}, optimizer)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="a photograph")
    parser.add_argument(
        "--model",
        default="carafe-mask",
        help=f"{', '.join(MODELS)}, or a config: a file, or its name below mmdet's configs (default: %(default)s)",
    )
    parser.add_argument("--weights", help="a checkpoint of that config, file or URL; random weights without")
    parser.add_argument("--device", default=default_device(), help="as PyTorch names it (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the picture to draw what was found into")
    parser.add_argument("--overwrite", action="store_true", help="replace the file that is there already")
    parser.add_argument("--score", type=float, default=0.3, help="what is found scores more (default: %(default)s)")
    parser.add_argument(
        "--scale",
        type=int,
        nargs=2,
        default=(1333, 800),
        metavar=("LONG", "SHORT"),
        help="the photograph is resized to fit in (default: 1333 800)",
    )
    parser.add_argument("--train-step", action="store_true", help="take a training step on the photograph, too")
    arguments = parser.parse_args()
    if arguments.out and arguments.out.exists() and not arguments.overwrite:
        parser.error(f"{arguments.out} is there already: --overwrite replaces what is there")
    if arguments.out and arguments.out.exists() and arguments.out.samefile(arguments.image):
        parser.error(f"{arguments.out} would be overwritten: it is what is read, so --out must be another")
    return arguments


def default_device() -> str:
    """The accelerator of this machine, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


if __name__ == "__main__":
    main()
