"""transformers' models after omniops.enable: the results and gradients that they have without, by our operator."""

import copy
import importlib
import io
import re
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from operator_calls import OperatorCalls
from torch.testing import assert_close
from transformers_models import LARGER, MODELS, SIZE, build, floats, inputs

import omniops

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

FORWARD, BACKWARD = "multi_scale_deform_attn", "multi_scale_deform_attn_backward"
NAMED = re.compile(r"^(?:class MultiScaleDeformableAttention\(|def multi_scale_deformable_attention)", re.MULTILINE)
MODULES = [
    path.parent.name
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
    if NAMED.search(path.read_text(encoding="utf-8"))
]
IN_FLOAT32 = ("Deformable DETR", "RT-DETR", "RT-DETRv2", "D-FINE", "Grounding DINO")


def results(model, arguments):
    """Outputs and gradients, in a copy of the model, as one caches its text's features with their graph."""
    model = copy.deepcopy(model)
    outputs = floats(dict(model(**arguments)))
    generator = torch.Generator().manual_seed(3)
    weighted = [
        (output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum()
        for output in outputs
        if output.requires_grad and output.isfinite().all()  # logits of texts are infinite where there is none
    ]
    sum(weighted).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return [output.detach() for output in outputs], gradients


def in_dtype(name, dtype, size=SIZE):
    arguments = inputs(name, size=size)
    return build(name).to(dtype), {
        key: value.to(dtype) if value.is_floating_point() else value for key, value in arguments.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_what_it_gives_without_us(name):
    model, arguments = in_dtype(name, torch.float64)
    with OperatorCalls() as before:
        outputs, gradients = results(model, arguments)
    omniops.enable("transformers")
    with OperatorCalls() as calls:
        ours, our_gradients = results(model, arguments)
    omniops.disable("transformers")
    with OperatorCalls() as after:
        again, gradients_again = results(model, arguments)

    assert not before.counts
    assert not after.counts
    attentions = [module for module in model.modules() if hasattr(module, "sampling_offsets")]
    assert calls.counts == {FORWARD: len(attentions), BACKWARD: len(attentions)}
    assert len(attentions) >= 1
    assert_close(again, outputs, rtol=0, atol=0)
    assert_close(gradients_again, gradients, rtol=0, atol=0)
    assert_close(ours, outputs, rtol=1e-10, atol=1e-10)
    scale = max(gradient.abs().max().item() for gradient in gradients.values())
    # Of a bias before a normalisation the gradient is nothing but what was rounded.
    assert_close(our_gradients, gradients, rtol=1e-8, atol=1e-12 * scale)
    offset_gradients = [gradient for key, gradient in gradients.items() if "sampling_offsets.weight" in key]
    assert len(offset_gradients) == (0 if "discrete" in name else len(attentions))
    assert all(gradient.abs().max() > 0 for gradient in offset_gradients)


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_in_float32_to_a_hundred_thousandth(name):
    model, arguments = in_dtype(name, torch.float32, LARGER)
    outputs, gradients = results(model, arguments)
    omniops.enable("transformers")
    ours, our_gradients = results(model, arguments)
    for actual, other in zip(ours, outputs, strict=True):
        assert_close(actual, other, rtol=0, atol=1e-5 * other[other.isfinite()].abs().max().item())
    scale = max(gradient.abs().max().item() for gradient in gradients.values())
    assert_close(our_gradients, gradients, rtol=0, atol=1e-5 * scale)


def test_every_model_of_this_version_is_among_these():
    omniops.enable("transformers")
    for name in MODULES:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        found = [value for key, value in vars(module).items() if key.startswith("multi_scale_deformable_attention")]
        if hasattr(module, "MultiScaleDeformableAttention"):
            found.append(module.MultiScaleDeformableAttention.forward)
        assert found
        assert {function.__code__.co_filename for function in found} == {omniops.dropin._transformers.__file__}
    tested = {f"transformers.models.{name}.modeling_{name}" for name in MODULES}
    assert tested == {type(build(name)).__module__ for name in MODELS}


@pytest.mark.parametrize("name", ["Deformable DETR", "RT-DETR"])
def test_a_training_step(name):
    pytest.importorskip("scipy", reason="scipy is not installed, with which the losses match boxes")
    model, arguments = in_dtype(name, torch.float64)
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.6], [0.3, 0.6, 0.2, 0.2]], dtype=torch.float64)
    labels = [
        {"class_labels": torch.tensor([0, 2]), "boxes": boxes},
        {"class_labels": torch.tensor([1]), "boxes": boxes[:1]},
    ]

    def step():
        trained = copy.deepcopy(model).train()
        optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
        torch.manual_seed(0)  # of the queries with noise
        loss = trained(**arguments, labels=labels).loss
        loss.backward()
        optimizer.step()
        return loss.detach(), dict(trained.named_parameters())

    loss, parameters = step()
    omniops.enable("transformers")
    with OperatorCalls() as calls:
        our_loss, ours = step()
    assert calls.counts[FORWARD] == calls.counts[BACKWARD] > 0
    assert_close(our_loss, loss, rtol=1e-10, atol=0)
    assert_close(ours, parameters, rtol=1e-8, atol=1e-10)


def test_a_model_made_and_saved_while_enabled():
    omniops.enable("transformers")
    model = build("D-FINE")
    with torch.no_grad():
        ours = model(**inputs("D-FINE")).logits
    file = io.BytesIO()
    torch.save(model, file)
    omniops.disable()
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    with torch.no_grad(), OperatorCalls() as calls:
        assert_close(model(**inputs("D-FINE")).logits, ours, rtol=1e-5, atol=1e-5)
        assert_close(loaded(**inputs("D-FINE")).logits, ours, rtol=1e-5, atol=1e-5)
    assert not calls.counts


@pytest.mark.parametrize("name", ["Deformable DETR", "RT-DETRv2", "Mask2Former"])
def test_bfloat16_and_autocast(name):
    model, arguments = in_dtype(name, torch.float32)
    omniops.enable("transformers")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), OperatorCalls() as calls:
        model(**arguments)
    assert calls.counts[FORWARD]
    model = model.to(torch.bfloat16)
    with torch.no_grad(), OperatorCalls() as calls:
        outputs = model(**{**arguments, "pixel_values": arguments["pixel_values"].bfloat16()})
    assert calls.counts[FORWARD]
    assert {output.dtype for output in floats(dict(outputs))} >= {torch.bfloat16}


@pytest.mark.slow
def test_compiled_and_exported_it_breaks_no_oftener():
    model, arguments = in_dtype("RT-DETR", torch.float32)
    decoder, decoder_inputs = model.model.decoder, {}

    def graphs():
        """How often the operator is in each graph that runs; layers may share one."""
        found = []

        def backend(graph, _):
            def run(*args):
                found.append(sum(FORWARD in str(node.target) for node in graph.graph.nodes))
                return graph.forward(*args)

            return run

        torch._dynamo.reset()
        compiled = torch.compile(decoder, backend=backend)
        assert_close(compiled(**decoder_inputs).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
        return found

    with torch.no_grad():
        with decoder.register_forward_pre_hook(lambda _, args, kwargs: decoder_inputs.update(kwargs), with_kwargs=True):
            model(**arguments)
        expected = decoder(**decoder_inputs).last_hidden_state
        without = graphs()
        omniops.enable("transformers")
        ours = graphs()
        exported = torch.export.export(decoder, (), decoder_inputs, strict=False)
    assert not any(without)
    assert len(ours) == len(without)
    assert sum(ours) == 2
    assert sum(FORWARD in str(node.target) for node in exported.graph.nodes) == 2


def test_an_attention_compiled_before_is_ours_once_enabled():
    attention = build("RT-DETR").model.decoder.layers[0].encoder_attn.attn
    shapes = [(4, 4), (2, 2)]
    value, locations, weights = torch.randn(1, 20, 2, 8), torch.rand(1, 5, 2, 2, 3, 2), torch.rand(1, 5, 2, 2, 3)
    arguments = value, torch.tensor(shapes), shapes, None, locations, weights, 64
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    expected = compiled(*arguments)

    def served():
        with torch.profiler.profile() as profile:
            assert_close(compiled(*arguments), expected)
        return any(FORWARD in event.key for event in profile.key_averages())

    assert not served()
    omniops.enable("transformers")
    assert served()
    omniops.disable()
    assert not served()


def test_one_compilation_serves_levels_of_other_sizes():
    attention = build("RT-DETR").model.decoder.layers[0].encoder_attn.attn
    omniops.enable("transformers")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(attention, backend=counter, fullgraph=True, dynamic=True)
    for shapes in ([(4, 4), (3, 2)], [(5, 4), (6, 2)], [(7, 6), (3, 3)]):
        value = torch.randn(1, sum(h * w for h, w in shapes), 2, 8)
        locations, weights = torch.rand(1, 5, 2, 2, 3, 2), torch.rand(1, 5, 2, 2, 3)
        arguments = value, torch.tensor(shapes), shapes, None, locations, weights, 64
        assert_close(compiled(*arguments), attention(*arguments))
    assert counter.frame_count == 1
