"""Steps of the network as CUDA graphs: emulated on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from emulated_cuda_graphs import EmulatedCudaGraph, emulate_cuda_graphs
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omniops.sam2 import SAM2ImagePredictor, SAM2VideoPredictor
from omniops.sam2.architectures import SIZES, cast, new
from omniops.sam2.modeling import cuda_graphs
from omniops.sam2.modeling.cuda_graphs import CudaGraphs
from omniops.sam2.modeling.sam2 import SAM2Base

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[EmulatedCudaGraph]:
    return emulate_cuda_graphs(monkeypatch)


class Scaled(nn.Linear):
    """A module whose function counts its calls."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.calls = 0
        self.cuda_graphs = CudaGraphs()

    def scale_and_shift(
        self, pair: tuple[Tensor, Tensor | None], *, factor: float
    ) -> tuple[Tensor, tuple[Tensor, None]]:
        self.calls += 1
        x, offset = pair
        y = self(x) * factor
        return y if offset is None else y + offset, (x, None)

    def run(self, *pair: Tensor | None, factor: float = 2.0) -> tuple[Tensor, tuple[Tensor, None]]:
        with torch.inference_mode():
            return self.cuda_graphs.run(self.scale_and_shift, pair, device=CPU, factor=factor)

    def expected(self, x: Tensor, offset: Tensor | None = None, factor: float = 2.0) -> Tensor:
        with torch.inference_mode():
            return self(x) * factor + (0 if offset is None else offset)


def test_a_function_is_called_then_captured_then_replayed(replayed: list[EmulatedCudaGraph]) -> None:
    module = Scaled()
    calls = []
    for _ in range(4):
        x, offset = torch.randn(2, 3), torch.randn(3)
        y, (same, none) = module.run(x, offset)
        assert torch.equal(y, module.expected(x, offset))
        assert torch.equal(same, x)
        assert none is None
        calls.append((module.calls, len(replayed)))
    assert calls == [(1, 0), (3, 0), (3, 1), (3, 2)]


def test_results_are_the_callers_own(replayed: list[EmulatedCudaGraph]) -> None:
    module, x = Scaled(), torch.randn(2, 3)
    results = [module.run(x * i, None)[0] for i in range(4)]
    assert len(replayed) == 2
    for i, result in enumerate(results):
        assert torch.equal(result, module.expected(x * i))


@pytest.mark.parametrize(
    ("second", "factor"),
    [((torch.ones(3, 3), None), 2.0), ((torch.ones(2, 3), torch.ones(3)), 2.0), ((torch.ones(2, 3), None), 3.0),
     ((torch.ones(3, 2).T, None), 2.0)],
    ids=["shape", "None", "option", "strides"],
)  # fmt: skip
def test_other_arguments_have_a_graph_of_their_own(
    replayed: list[EmulatedCudaGraph], second: tuple[Tensor, Tensor | None], factor: float
) -> None:
    module = Scaled()
    for _ in range(3):
        assert torch.equal(module.run(torch.ones(2, 3), None)[0], module.expected(torch.ones(2, 3)))
        assert torch.equal(module.run(*second, factor=factor)[0], module.expected(*second, factor=factor))
    assert len({id(graph) for graph in replayed}) == 2


def test_autocast_has_a_graph_of_its_own(replayed: list[EmulatedCudaGraph]) -> None:
    module, x = Scaled(), torch.ones(2, 3)
    module.run(x, None)
    with torch.autocast("cpu", torch.bfloat16):
        module.run(x, None)
    assert not replayed


def test_graphs_do_not_read_the_casts_that_autocast_keeps(replayed: list[EmulatedCudaGraph]) -> None:
    """As it does in inference mode in torch 2.7."""
    module, x = Scaled(), torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            module.run(x, None)
    with torch.no_grad():
        module.weight.fill_(5.0)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = module.run(x, None)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, module.expected(x))
    assert len({id(graph) for graph in replayed}) == 1


def test_functions_are_called_and_captured_with_autocast_in_one_state(replayed: list[EmulatedCudaGraph]) -> None:
    """Else torch.compile compiles for each."""
    module, states = Scaled(), []
    module.register_forward_pre_hook(lambda *_: states.append(torch.is_autocast_cache_enabled()))
    for _ in range(2):
        module.run(torch.ones(2, 3), None)
    assert states == [False, False, False]
    assert torch.is_autocast_cache_enabled()


def test_training_has_a_graph_of_its_own(replayed: list[EmulatedCudaGraph]) -> None:
    module, x = Scaled(), torch.ones(2, 3)
    for _ in range(3):
        module.run(x, None)
    module.eval()
    module.run(x, None)
    assert len(replayed) == 1


def test_a_model_is_freed_with_its_last_reference() -> None:
    network = SAM2Base(SIZES["tiny"], "2.1", image_size=64)
    reference = weakref.ref(network)
    gc.disable()
    try:
        del network
        assert reference() is None
    finally:
        gc.enable()


def test_graphs_end_with_the_weights_that_they_read(replayed: list[EmulatedCudaGraph]) -> None:
    module, x = Scaled(), torch.ones(2, 3)
    for _ in range(3):
        module.run(x, None)
    module.weight.data = torch.full((3, 3), 7.0)
    for _ in range(3):
        assert torch.equal(module.run(x, None)[0], module.expected(x))
    with torch.no_grad():
        module.weight.fill_(5.0)  # in place: the same graph reads the new values
    before = len({id(graph) for graph in replayed})
    assert torch.equal(module.run(x, None)[0], module.expected(x))
    assert before == len({id(graph) for graph in replayed}) == 2


def test_only_so_many_graphs_are_kept(replayed: list[EmulatedCudaGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    module = Scaled()
    for rows in (1, 2, 3, 2, 1):
        for _ in range(3):
            x = torch.randn(rows, 3)
            assert torch.equal(module.run(x, None)[0], module.expected(x))
    # That of one row was captured again, that of two was not.
    assert len({id(graph) for graph in replayed}) == 4
    replayed.clear()
    assert len(module.cuda_graphs._buffers) == 2  # what only forgotten graphs read is forgotten too


def test_disabled(replayed: list[EmulatedCudaGraph]) -> None:
    module = Scaled()
    module.cuda_graphs.enabled = False
    for _ in range(3):
        module.run(torch.ones(2, 3), None)
    assert module.calls == 3
    assert not replayed


def test_nothing_is_captured_where_gradients_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not cuda_graphs._can_replay(torch.device("cuda"))
    with torch.inference_mode():
        assert not cuda_graphs._can_replay(CPU)


def test_a_copy_has_no_graphs(replayed: list[EmulatedCudaGraph]) -> None:
    module, x = Scaled(), torch.ones(2, 3)
    for _ in range(3):
        module.run(x, None)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            copied.weight.fill_(0.5)
        for _ in range(3):
            assert torch.equal(copied.run(x, None)[0], copied.expected(x))
        assert copied.calls == module.calls + 3
    assert torch.equal(module.run(x, None)[0], module.expected(x))


def test_a_thread_calls_a_function_before_it_captures_it(replayed: list[EmulatedCudaGraph]) -> None:
    module = Scaled()
    captures: list[bool] = []
    module.register_forward_pre_hook(lambda *_: captures.append(EmulatedCudaGraph.capturing is not None))
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(module.run, torch.ones(2, 3), None).result()
    assert captures == [False, False, True]
    assert len(replayed) == 1


def test_wrong_arguments_leave_graphs_enabled(replayed: list[EmulatedCudaGraph]) -> None:
    module, x = Scaled(), torch.ones(2, 3)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            module.run(torch.ones(2, 4), None)
    for _ in range(3):
        assert torch.equal(module.run(x, None)[0], module.expected(x))
    assert module.cuda_graphs.enabled
    assert len(replayed) == 1


@pytest.mark.parametrize(
    ("forward", "operator"),
    [(lambda x: x * x.sum().item(), "item"), (lambda x: x * torch.tensor([1.0, 2.0, 3.0]), "lift_fresh")],
    ids=["waits for the GPU", "copies from the CPU"],
)
def test_what_cannot_be_captured_goes_on_without_graphs(
    replayed: list[EmulatedCudaGraph], forward: Any, operator: str
) -> None:
    module = Scaled()
    module.forward = forward  # type: ignore[method-assign]
    module.run(torch.ones(2, 3), None)
    with pytest.warns(
        UserWarning, match=rf"no CUDA graphs any more: Scaled.scale_and_shift: .*{operator}.*cannot be captured"
    ):
        y, _ = module.run(torch.ones(2, 3), None)
    assert torch.equal(y, module.expected(torch.ones(2, 3)))
    assert not module.cuda_graphs.enabled
    assert torch.equal(module.run(torch.full((2, 3), 2.0), None)[0], module.expected(torch.full((2, 3), 2.0)))
    assert not replayed


def video_masks(model: SAM2Base, folder: Any) -> Tensor:
    """Of two objects, one of them shown later, through 6 frames, twice."""
    predictor = SAM2VideoPredictor(model)
    masks = []
    for _ in range(2):
        state = predictor.init_state(folder)
        predictor.add_new_points_or_box(state, 0, "a", points=[[20, 12]], labels=[1])
        predictor.add_new_points_or_box(state, 3, "b", box=[4, 4, 40, 30])
        masks += [masks for _, _, masks in predictor.propagate_in_video(state, start_frame_idx=0)]
    return torch.stack(masks)


def picture_masks(model: SAM2Base) -> list[np.ndarray]:
    """Of pictures and prompts of all kinds, several times."""
    predictor = SAM2ImagePredictor(model)
    random, results = np.random.default_rng(1), []
    for _ in range(3):
        predictor.set_image(random.integers(0, 255, (48, 64, 3), np.uint8))
        for multimask_output in (True, False):
            point = {"point_coords": random.uniform(0, 48, (1, 2)), "point_labels": [1]}
            *_, logits = predictor.predict(**point, multimask_output=multimask_output, return_logits=True)
            box = {"box": [3, 4, *random.uniform(20, 48, 2)]}
            results += [logits, *predictor.predict(**box, mask_input=logits[:1], multimask_output=multimask_output)]
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("frames")
    random = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(random.integers(0, 255, (48, 64, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def model(version: str, dtype: torch.dtype, device: str) -> SAM2Base:
    torch.manual_seed(0)
    return cast(new("tiny", version, image_size=64), dtype).to(device)


CASES = [("2.0", torch.float32), ("2.1", torch.bfloat16)]


@pytest.mark.slow
@pytest.mark.parametrize(("version", "dtype"), CASES)
def test_the_same_masks_by_graphs(
    version: str, dtype: torch.dtype, folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = model(version, dtype, "cpu")
    network.cuda_graphs.enabled = False
    video, pictures = video_masks(network, folder), picture_masks(network)
    replayed = emulate_cuda_graphs(monkeypatch)
    network.cuda_graphs.enabled = True
    assert torch.equal(video_masks(network, folder), video)
    assert len(replayed) >= 12
    replayed.clear()
    for result, expected in zip(picture_masks(network), pictures, strict=True):
        assert np.array_equal(result, expected)
    assert len({id(graph) for graph in replayed}) == 5  # an image, and each prompt with three masks and with one


class OnlyOnMeta(TorchDispatchMode):
    """Refuses to copy from the CPU or to it, and to compute there."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        assert devices == {"meta"}, operator
        return result


def test_what_is_captured_makes_nothing_on_the_cpu() -> None:
    """On a device without values, which none can be asked for."""
    network = model("2.1", torch.float32, "meta")

    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, dtype=dtype, device="meta")

    pixels, coords, labels = ones(4, 3, 64, 64), ones(2, 3, 2), ones(2, 3, dtype=torch.int32)
    memories, tpos, pos = ones(3, 2, 64, 4, 4, dtype=torch.bfloat16), ones(3, dtype=torch.int64), ones(5, 256)
    with torch.inference_mode():
        features = network.forward_image(pixels).of(0)
        network.track_step(features, memories, tpos, ones(5, 2, 256), pos)  # which keeps encodings of positions
        with OnlyOnMeta():
            network.forward_image(pixels)
            network.track_step(features, memories, tpos, ones(5, 2, 256), pos)
            for multimask_output in (True, False):
                for mask_input in (None, ones(2, 1, 16, 16)):
                    network.predict_masks(
                        features, features.image_embed, coords, labels, mask_input, multimask_output=multimask_output
                    )


def test_what_is_made_on_the_cpu_is_refused() -> None:
    with OnlyOnMeta(), pytest.raises(AssertionError, match="cpu"):
        torch.arange(3)


@needs_cuda
@pytest.mark.parametrize(("version", "dtype"), CASES)
def test_the_same_masks_by_graphs_on_a_gpu(version: str, dtype: torch.dtype, folder: Any) -> None:
    network = model(version, dtype, "cuda")
    network.cuda_graphs.enabled = False
    video, pictures = video_masks(network, folder), picture_masks(network)
    network.cuda_graphs.enabled = True
    assert torch.equal(video_masks(network, folder), video)
    for result, expected in zip(picture_masks(network), pictures, strict=True):
        assert np.array_equal(result, expected)
    assert network.cuda_graphs._graphs


@needs_cuda
def test_after_a_failed_capture_the_gpu_goes_on() -> None:
    module = Scaled().cuda()
    module.forward = lambda x: x * x.sum().item()  # type: ignore[method-assign]
    x = torch.ones(2, 3, device="cuda")
    with torch.inference_mode():
        module.cuda_graphs.run(module.scale_and_shift, (x, None), device=x.device, factor=2.0)
        with pytest.warns(UserWarning, match="no CUDA graphs any more"):
            y, _ = module.cuda_graphs.run(module.scale_and_shift, (x, None), device=x.device, factor=2.0)
    assert torch.equal(y.cpu(), torch.full((2, 3), 12.0))
    assert torch.equal((torch.ones(5, device="cuda") * 2).cpu(), torch.full((5,), 2.0))
    torch.cuda.empty_cache()


@needs_cuda
def test_what_is_captured_waits_for_nothing() -> None:
    network = model("2.1", torch.bfloat16, "cuda")
    pixels = torch.zeros(1, 3, 64, 64, device="cuda")
    memories = torch.zeros(3, 2, 64, 4, 4, dtype=torch.bfloat16, device="cuda")
    pointers, pos = torch.zeros(5, 2, 256, device="cuda"), torch.zeros(5, 256, device="cuda")
    tpos = torch.zeros(3, dtype=torch.int64, device="cuda")
    with torch.inference_mode(), network.autocast():
        features = network.forward_image(pixels)
        network.track_step(features, memories, tpos, pointers, pos)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            network.track_step(network.forward_image(pixels), memories, tpos, pointers, pos)
        finally:
            torch.cuda.set_sync_debug_mode("default")
