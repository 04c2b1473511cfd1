"""Weights of SAM 2: Meta's files and transformers' folders, and files that are neither."""

from __future__ import annotations

import functools
import json
import pickle
import socket
import time

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from one_thread import one_thread as one_thread
from safetensors.torch import load_file, save_file

from omniops import weights
from omniops.sam2 import build_sam2, build_sam2_video_predictor, checkpoints, load
from omniops.sam2.architectures import LETTERS, SIZES, new, recognize
from omniops.sam2.transformers_names import from_transformers

SIDE = 64


@pytest.fixture(scope="module")
def official(twins):
    return twins(image_size=SIDE)[0]


@pytest.fixture(scope="module")
def checkpoint(official, tmp_path_factory):
    """As Meta's: the state dict under "model"."""
    path = tmp_path_factory.mktemp("meta") / "sam2.1_hiera_tiny.pt"
    torch.save({"model": official.state_dict()}, path)
    return path


@pytest.fixture
def folder(transformers_model, tmp_path):
    """As transformers writes it."""
    transformers_model().save_pretrained(tmp_path)
    return tmp_path


def same(model, other) -> bool:
    state, expected = model.state_dict(), other.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("version", ["2.0", "2.1"])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_of_metas_is_left_over_or_missing(size, version, monkeypatch):
    """By the names and shapes of both, with no memory for either."""
    build_sam = pytest.importorskip("sam2.build_sam", reason="the oracle: the official package, sam2 from PyPI")
    folder = "sam2" if version == "2.0" else "sam2.1"
    # What is read while it is built, and what would go to a GPU without being asked.
    monkeypatch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with torch.device("meta"):
        meta = build_sam.build_sam2(f"configs/{folder}/{folder}_hiera_{LETTERS[size]}.yaml", device="meta").state_dict()
        own = new(size, version).state_dict()
    assert recognize(meta) == (size, version)
    assert {name: value.shape for name, value in meta.items()} == {name: value.shape for name, value in own.items()}


def test_metas_checkpoint(twins, checkpoint):
    model = load(checkpoint, "cpu", "float32", image_size=SIDE)
    assert not model.training
    assert model.image_size == SIDE
    assert same(model, twins(image_size=SIDE)[1])
    assert load(str(checkpoint), "cpu").image_size == 1024


@pytest.mark.parametrize("version", ["2.0", "2.1"])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_of_transformers_is_left_over_or_missing(size, version, transformers_model):
    """By the names and shapes of both, with no memory for either."""
    with torch.device("meta"):
        converted = from_transformers(transformers_model(size, version, on_meta=True).state_dict())
        own = new(size, version).state_dict()
    assert recognize(converted) == (size, version)
    assert weights.complaint(own, converted) == ""


def test_folder(folder, transformers_model):
    model = load(folder, "cpu", "float32")
    assert not model.training
    assert model.image_size == SIDE
    expected = from_transformers(transformers_model().state_dict())
    assert weights.complaint(model.state_dict(), expected) == ""
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert load(folder, "cpu", image_size=96).image_size == 96


@torch.no_grad()
def test_a_folder_computes_what_transformers_does(folder, transformers_model):
    """Names that are mixed up between tensors of one shape would show here."""
    theirs, ours = transformers_model(), load(folder, "cpu", "float32")
    torch.manual_seed(1)
    pixels, points, labels = torch.randn(1, 3, SIDE, SIDE), torch.tensor([[[20.0, 30.0]]]), torch.tensor([[1]])
    expected = theirs.get_image_features(pixels).fpn_hidden_states[-1].permute(1, 2, 0).reshape(1, 256, 4, 4)
    features = ours.forward_image(pixels)
    torch.testing.assert_close(features.image_embed, expected)
    tokens, _ = theirs.prompt_encoder(points[:, None], labels[:, None], None, None)
    torch.testing.assert_close(ours.sam_prompt_encoder.embed_points(points, labels), tokens[:, 0])
    mask = torch.randn(1, 1, SIDE // 4, SIDE // 4)
    torch.testing.assert_close(ours.sam_prompt_encoder.embed_masks(mask), theirs.prompt_encoder.mask_embed(mask))
    image = torch.randn(1, 256, 4, 4)
    found = ours.sam_mask_decoder(
        image, features.image_pe, tokens[:, 0], features.high_res_feats, multimask_output=True
    )
    decoded = theirs.mask_decoder(
        image_embeddings=image,
        image_positional_embeddings=theirs.get_image_wide_positional_embeddings(),
        sparse_prompt_embeddings=tokens,
        dense_prompt_embeddings=torch.zeros(1),
        multimask_output=True,
        high_resolution_features=list(features.high_res_feats),
    )
    for value, reference in zip(found, decoded, strict=True):
        torch.testing.assert_close(value, reference.squeeze(1), rtol=1e-4, atol=1e-5)
    memory, _ = theirs.memory_encoder(image, torch.randn(1, 1, SIDE, SIDE, generator=torch.manual_seed(2)))
    ours_memory = ours.memory_encoder(image, torch.randn(1, 1, SIDE, SIDE, generator=torch.manual_seed(2)))
    torch.testing.assert_close(ours_memory, memory, rtol=1e-4, atol=1e-5)
    frame, memory, position = torch.randn(1, 16, 256), torch.randn(1, 16 + 4, 64), torch.randn(16 + 4, 64)
    attended = theirs.memory_attention(
        current_vision_features=frame.transpose(0, 1),
        memory=memory.transpose(0, 1),
        memory_posision_embeddings=position[:, None],
        num_object_pointer_tokens=4,
    )
    torch.testing.assert_close(
        ours.memory_attention(frame, memory, position, (4, 4), 4), attended.reshape(1, 16, 256), rtol=1e-4, atol=1e-5
    )
    token = torch.randn(1, 256)
    torch.testing.assert_close(ours.obj_ptr_proj(token), theirs.object_pointer_proj(token))
    torch.testing.assert_close(
        ours.obj_ptr_tpos_proj(token), theirs.temporal_positional_encoding_projection_layer(token)
    )


def test_settings_of_a_folder(folder):
    content = json.loads((folder / "config.json").read_text())
    changed = {"max_object_pointers_in_encoder": 5, "multimask_max_pt_num": 3, "sigmoid_bias_for_mem_enc": -4}
    (folder / "config.json").write_text(json.dumps({**content, **changed}))
    model = load(folder, "cpu")
    assert (model.max_obj_ptrs_in_encoder, model.multimask_max_pt_num, model.sigmoid_bias_for_mem_enc) == (5, 3, -4.0)
    assert type(model.sigmoid_bias_for_mem_enc) is float


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", "abc"),
        ("image_size", None),
        ("image_size", [64, 64]),
        ("image_size", 63),
        ("max_object_pointers_in_encoder", float("inf")),
        ("sigmoid_scale_for_mem_enc", float("nan")),
        ("sigmoid_scale_for_mem_enc", 10**400),
    ],
)
def test_settings_that_are_none(tmp_path, name, value):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam2_video", name: value}))
    with pytest.raises(ValueError, match=r"config\.json is no configuration of SAM 2: ") as caught:
        load(tmp_path, "cpu")
    assert str(tmp_path) in str(caught.value)


def test_build_sam2(twins, checkpoint):
    name = "configs/sam2.1/sam2.1_hiera_t.yaml"
    model = build_sam2(name, checkpoint, "cpu", dtype="float32", image_size=SIDE)
    assert same(model, twins(image_size=SIDE)[1])
    assert model.sam_mask_decoder.dynamic_multimask_via_stability
    plain = build_sam2(name, checkpoint, "cpu", apply_postprocessing=False, image_size=SIDE)
    assert not plain.sam_mask_decoder.dynamic_multimask_via_stability
    random = build_sam2("sam2_hiera_b+", device="cpu", mode="train", image_size=SIDE)
    assert random.training
    assert len(random.image_encoder.trunk.blocks) == 24
    assert random.no_obj_embed_spatial is None
    with pytest.raises(ValueError, match=r"12 blocks of an encoder, config_file '.*hiera_s.yaml' 16"):
        build_sam2("sam2.1_hiera_s.yaml", checkpoint, "cpu", image_size=SIDE)
    with pytest.raises(ValueError, match=r"config_file must be a name as configs/sam2.1/.*, got 'sam_vit_h'"):
        build_sam2("sam_vit_h")
    with pytest.raises(
        ValueError, match=r"ckpt_path has the weights of version 2\.1, config_file 'sam2_hiera_t.yaml' is"
    ):
        build_sam2("sam2_hiera_t.yaml", checkpoint, "cpu", image_size=SIDE)


@pytest.mark.parametrize("version", ["2.0", "2.1"])
@pytest.mark.parametrize("kind", ["Meta's file", "a folder"])
def test_weights_of_the_other_version(twins, transformers_model, tmp_path, version, kind):
    if kind == "a folder":
        transformers_model(version=version).save_pretrained(tmp_path)
        path = tmp_path
    else:
        path = tmp_path / "a.pt"
        torch.save({"model": twins(version=version, image_size=SIDE)[0].state_dict()}, path)
    right, wrong = ("sam2_hiera_t", "sam2.1_hiera_t")[:: 1 if version == "2.0" else -1]
    for build in (build_sam2, build_sam2_video_predictor):
        build(right, path, "cpu", image_size=SIDE)
        with pytest.raises(ValueError, match=f"ckpt_path has the weights of version {version}, config_file '{wrong}'"):
            build(wrong, path, "cpu", image_size=SIDE)


@pytest.mark.parametrize("side", [0, -32, 100, np.int64(0)])
def test_image_sizes_that_are_none(checkpoint, folder, side):
    for build in (
        lambda: load(checkpoint, "cpu", image_size=side),
        lambda: load(folder, "cpu", image_size=side),
        lambda: build_sam2("sam2.1_hiera_t", None, "cpu", image_size=side),
        lambda: build_sam2_video_predictor("sam2.1_hiera_t", None, "cpu", image_size=side),
        lambda: build_sam2("sam2.1_hiera_t", None, "cpu", "eval", [f"++model.image_size={side}"]),
    ):
        with pytest.raises(ValueError, match=f"image_size must be a positive multiple of 32, got {side}"):
            build()


def test_image_sizes_of_numpy(checkpoint):
    model = load(checkpoint, "cpu", image_size=np.int64(SIDE))
    assert model.image_size == SIDE
    assert type(model.image_size) is int
    with pytest.raises(TypeError, match="image_size must be an integer, got str"):
        load(checkpoint, "cpu", image_size="64")


def test_build_sam2_video_predictor(twins, checkpoint):
    name = "configs/sam2.1/sam2.1_hiera_t.yaml"
    predictor = build_sam2_video_predictor(name, checkpoint, "cpu", dtype="float32", image_size=SIDE)
    assert same(predictor.model, twins(image_size=SIDE)[1])
    assert predictor.fill_hole_area == 8
    plain = build_sam2_video_predictor(
        name, checkpoint, "cpu", "eval", [], False, image_size=SIDE, non_overlap_masks=True
    )
    assert plain.fill_hole_area == 0
    assert plain.non_overlap_masks
    assert not plain.model.sam_mask_decoder.dynamic_multimask_via_stability


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_half_precision(checkpoint, dtype):
    model = load(checkpoint, "cpu", dtype, image_size=SIDE)
    assert model.dtype == (torch.float16 if dtype == "float16" else dtype)
    assert {parameter.dtype for parameter in model.image_encoder.parameters()} == {model.dtype}
    assert model.sam_prompt_encoder.point_embeddings[0].weight.dtype == torch.float32


def _without(state, name):
    return {key: value for key, value in state.items() if key != name}


BAD = {
    "a tensor missing": (
        lambda state: {"model": _without(state, "no_mem_embed")},
        r"1 missing \(no_mem_embed\)",
    ),
    "a tensor left over": (lambda state: {"model": {**state, "extra.weight": torch.ones(1)}}, "1 unexpected.*extra"),
    "another shape": (
        lambda state: {"model": {**state, "no_mem_embed": torch.ones(1, 1, 8)}},
        r"1 of another shape \(no_mem_embed \(1, 1, 8\) for \(1, 1, 256\)\)",
    ),
    "no values": (
        lambda state: {"model": {**state, "no_mem_embed": state["no_mem_embed"].to("meta")}},
        r"has tensors that SAM 2\.1 tiny cannot take",
    ),
    "a sparse tensor": (
        lambda state: {"model": {**state, "no_mem_embed": state["no_mem_embed"].to_sparse()}},
        r"has tensors that SAM 2\.1 tiny cannot take",
    ),
    "another model": (lambda _: {"model": {"fc.weight": torch.ones(2, 2)}}, "not a checkpoint of SAM 2.*fc.weight"),
    "transformers' names": (
        lambda _: {"vision_encoder.backbone.pos_embed": torch.ones(1)},
        "pass the folder that its config.json is in",
    ),
    "a list": (lambda _: [1, 2], "it holds no state dict but one list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints(official, tmp_path, case):
    content, words = BAD[case]
    path = tmp_path / "bad.pt"
    torch.save(content(official.state_dict()), path)
    with pytest.raises(ValueError, match=words) as caught:
        load(path, "cpu", image_size=SIDE)
    assert str(path) in str(caught.value)


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (tmp_path.joinpath("harm").touch, ())

    path = tmp_path / "harmful.pt"
    torch.save({"model": Harmful()}, path)
    with pytest.raises(ValueError, match="is refused"):
        load(path, "cpu")
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match=r"is refused|no checkpoint"):
        load(path, "cpu")
    assert not tmp_path.joinpath("harm").exists()


def test_bad_folders(transformers_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        load(tmp_path, "cpu")
    transformers_model().save_pretrained(tmp_path)
    tensors = tmp_path / "model.safetensors"
    state = load_file(tensors)
    save_file(_without(state, "no_memory_embedding"), tensors, {"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit SAM 2\.1 tiny: 1 missing \(no_mem_embed\)"):
        load(tmp_path, "cpu")
    tensors.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"model\.safetensors is no"):
        load(tmp_path, "cpu")
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors in"):
        load(tmp_path, "cpu")
    tensors.touch()
    (tmp_path / "config.json").write_text("[" * 100000)
    with pytest.raises(ValueError, match=r"config\.json is no configuration of SAM 2"):
        load(tmp_path, "cpu")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"config\.json is no configuration of SAM 2"):
        load(tmp_path, "cpu")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no configuration of SAM 2"):
        load(tmp_path, "cpu")


@pytest.fixture
def silent():
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_without_a_network(monkeypatch, tmp_path, silent):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "_PATIENCE", 1)
    began = time.monotonic()
    for endpoint in ("http://127.0.0.1:9", silent):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        with pytest.raises(ConnectionError, match=r"cannot fetch facebook/sam2\.1-hiera-tiny .*sam2\.1_hiera_tiny\.pt"):
            load("tiny", "cpu")
        with pytest.raises(ConnectionError, match=r"Meta's checkpoint, sam2_hiera_base_plus\.pt, and pass"):
            load("facebook/sam2-hiera-base-plus", "cpu")
    with pytest.raises(ConnectionError, match=r"sam2\.1_hiera_tiny\.pt.*put it at"):
        load("http://127.0.0.1:9/sam2.1_hiera_tiny.pt", "cpu")
    assert time.monotonic() - began < 10


def test_what_the_hub_gave_before_needs_no_network(transformers_model, monkeypatch, tmp_path, silent):
    snapshot = tmp_path / "models--facebook--sam2.1-hiera-tiny" / "snapshots" / ("0" * 40)
    transformers_model().save_pretrained(snapshot)
    (tmp_path / "models--facebook--sam2.1-hiera-tiny" / "refs").mkdir()
    (tmp_path / "models--facebook--sam2.1-hiera-tiny" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    monkeypatch.setattr(weights, "_PATIENCE", 1)
    assert same(load("facebook/sam2.1-hiera-tiny", "cpu", "float32"), load(snapshot, "cpu", "float32"))


def test_bad_arguments(checkpoint):
    for path_or_name in ("nowhere.pt", "checkpoints/nowhere.pt", "huge"):
        with pytest.raises(FileNotFoundError, match=f"there is no checkpoint at {path_or_name}: pass"):
            load(path_or_name, "cpu")
    with pytest.raises(ValueError, match="dtype must be auto, float32, bfloat16 or float16, got 'float8'"):
        load(checkpoint, "cpu", "float8")
    with pytest.raises(ValueError, match="image_size must be a positive multiple of 32, got 100"):
        load(checkpoint, "cpu", image_size=100)
    with pytest.raises(ValueError, match="nodevice"):
        load(checkpoint, "nodevice")
    with pytest.raises(ValueError, match="size must be one of tiny, small, base-plus, large, got 'huge'"):
        new("huge")


@pytest.mark.parametrize(("version", "refused"), [("2.7.0", True), ("2.13.1+cu130", True), ("2.14.0", False)])
def test_compiled_encoders_are_refused_where_mps_compiles_layer_norms_wrongly(monkeypatch, version, refused):
    monkeypatch.setattr(torch, "__version__", version)
    checkpoints.require_compiler(torch.device("cpu"))
    if not refused:
        checkpoints.require_compiler(torch.device("mps"))
        return
    monkeypatch.setattr(checkpoints.devices, "pick", torch.device)
    for call in (lambda: load("tiny", "mps", compile_encoder=True),
                 lambda: build_sam2("sam2.1_hiera_t", device="mps", compile_encoder=True)):  # fmt: skip
        with pytest.raises(ValueError, match=r"compile_encoder must be False on MPS before torch 2\.14"):
            call()
