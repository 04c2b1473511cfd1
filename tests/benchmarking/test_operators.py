"""Measuring operators from Python."""

import doctest
import json

import pytest
import torch

from omniops.benchmarking import operators, timing
from omniops.benchmarking.contenders import DIRECTIONS, FLOOR, FORWARD, OURS
from omniops.cli.cases import carafe as case

CPU = torch.device("cpu")


def test_operators_are_measured_as_asked():
    started, measured = [], []
    for results in operators.measure([case], CPU, 0, quick=True, bytes_per_second=1e9, on_start=started.append):
        assert len(started) == len(measured) + 1  # said before, and yielded when it is done
        measured.append(results)
    assert len(measured) == operators.measurement_count([case], CPU, quick=True)
    shape = (1, 16, 12, 16)
    settings = {results[0].setting for results in measured if results[0].mode == timing.CALL}
    assert settings == {
        ("carafe", shape, dtype, direction) for dtype in ("float32", "float16", "bfloat16") for direction in DIRECTIONS
    }
    assert f"carafe {shape} float32 {FORWARD}" in started
    for results in measured:
        assert results[0].contender == OURS
        assert len({result.setting for result in results}) == 1
        floors = [result for result in results if result.contender == FLOOR]
        if results[0].mode == timing.HOST:
            assert not floors
        else:
            (floor,) = floors
            size = {"float32": 4, "float16": 2, "bfloat16": 2}[floor.dtype]
            assert floor.median_ms == pytest.approx(case.traffic(shape)[floor.direction] * size / 1e9 * 1e3)
            assert (floor.measured, floor.label) == (False, FLOOR)


def test_a_report_is_read_as_of_another_run(tmp_path):
    row = {"operator": "carafe", "shape": [1, 2], "dtype": "float32", "direction": FORWARD, "mode": "call"}
    rows = [{**row, "contender": OURS, "median_ms": 1.5}, {**row, "contender": FLOOR, "median_ms": 1.0}]
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"device": "a CPU", "command": "omniops bench", "date": "today", "results": rows}))
    (result,), device, origin = operators.read_report(path)
    assert (result.shape, result.median_ms, result.measured, result.label) == ((1, 2), 1.5, False, f"{OURS}*")
    assert device == "a CPU"
    assert origin == "not measured in this run, but with omniops bench on today"
    path.write_text('{"results": [{}]}')
    with pytest.raises(ValueError, match="not a file that omniops bench --json wrote"):
        operators.read_report(path)
    with pytest.raises(FileNotFoundError):
        operators.read_report(tmp_path / "none.json")


@pytest.mark.parametrize("quick", [True, False])
def test_no_more_is_copied_than_memory_allows(monkeypatch, quick):
    copied = []
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device, size: copied.append(size) or 1e9)
    for limit in (None, 2**40, 2**22):
        monkeypatch.setattr(operators.devices, "memory", lambda device, limit=limit: type("", (), {"limit": limit}))
        operators.copy_bandwidth(CPU, quick)
    largest = 2**24 if quick else 2**28
    assert copied == [largest, largest, 2**19]


@pytest.mark.parametrize("module", [operators, timing])
def test_the_examples_print_what_they_say(module):
    tested = doctest.testmod(module)
    assert tested.attempted
    assert not tested.failed
