import math
import re
import threading

import pytest

from omniops.server.metrics import CONTENT_TYPE, Metrics

_SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(,|$)')
_SUFFIXES = {"summary": ("", "_sum", "_count"), "counter": ("",), "gauge": ("",)}


def parsed(text):
    """{family: (type, help, {(sample, labels): value})} of Prometheus' text format; fails where it is not."""
    assert text.endswith("\n")
    families = {}
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            _, _, name, words = line.split(" ", 3)
            assert name not in families
            families[name] = [None, words, {}]
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert list(families)[-1] == name
            assert families[name][0] is None
            assert not families[name][2]
            families[name][0] = kind
        else:
            match = _SAMPLE.match(line)
            assert match, line
            family, (kind, _, samples) = list(families.items())[-1]
            assert match["name"] in [family + suffix for suffix in _SUFFIXES[kind]]
            labels, offset = [], 0
            while offset < len(match["labels"] or ""):
                label = _LABEL.match(match["labels"], offset)
                assert label, line
                labels.append((label[1], re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), label[2])))
                offset = label.end()
            key = match["name"], tuple(labels)
            assert key not in samples
            samples[key] = float(match["value"])
    return {name: tuple(family) for name, family in families.items()}


def figures(metrics, **values):
    nothing = {"sessions": 0, "session_bytes": 0, "queue": 0, "restarts": 0, "device_memory": {}}
    return parsed(metrics.text(**{**nothing, **values}))


def test_every_figure_is_there_with_its_type_and_help():
    found = figures(Metrics(), sessions=3, session_bytes=8_000_000_123, queue=2, restarts=1)
    assert {name: kind for name, (kind, _, _) in found.items()} == {
        "omniops_sessions": "gauge",
        "omniops_session_bytes": "gauge",
        "omniops_queue": "gauge",
        "omniops_frames_total": "counter",
        "omniops_frames_per_second": "gauge",
        "omniops_clicks_total": "counter",
        "omniops_click_seconds": "summary",
        "omniops_device_memory_bytes": "gauge",
        "omniops_predictor_restarts_total": "counter",
    }
    assert all(words.endswith(".") for _, words, _ in found.values())
    values = {sample: value for _, _, samples in found.values() for (sample, labels), value in samples.items()}
    assert values["omniops_sessions"] == 3
    assert values["omniops_session_bytes"] == 8_000_000_123
    assert values["omniops_queue"] == 2
    assert values["omniops_predictor_restarts_total"] == 1
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")


def test_devices_are_labels_whatever_they_are_called():
    name = 'a "GPU"\\0\nof {mine}, 2'
    samples = figures(Metrics(), device_memory={name: 10, "cuda:1": 2**40})["omniops_device_memory_bytes"][2]
    assert samples == {
        ("omniops_device_memory_bytes", (("device", name),)): 10,
        ("omniops_device_memory_bytes", (("device", "cuda:1"),)): 2**40,
    }


def test_a_click_that_never_was_has_no_quantiles():
    samples = figures(Metrics())["omniops_click_seconds"][2]
    assert math.isnan(samples["omniops_click_seconds", (("quantile", "0.5"),)])
    assert samples["omniops_click_seconds_count", ()] == 0


def test_quantiles_are_those_of_the_last_thousand_clicks_and_the_sum_is_of_all():
    metrics = Metrics()
    for _ in range(500):
        metrics.click(1000.0)
    for i in range(1000):
        metrics.click((i * 7919) % 1000 + 1.0)  # 1 to 1000, each once
    found = figures(metrics)
    samples = found["omniops_click_seconds"][2]
    assert samples["omniops_click_seconds", (("quantile", "0.5"),)] == 500
    assert samples["omniops_click_seconds", (("quantile", "0.95"),)] == 950
    assert samples["omniops_click_seconds_sum", ()] == 500 * 1000 + 500 * 1001
    assert samples["omniops_click_seconds_count", ()] == 1500
    assert found["omniops_clicks_total"][2]["omniops_clicks_total", ()] == 1500


def test_one_click_is_every_quantile():
    metrics = Metrics()
    metrics.click(0.25)
    samples = figures(metrics)["omniops_click_seconds"][2]
    assert [samples["omniops_click_seconds", (("quantile", q),)] for q in ("0.5", "0.95")] == [0.25, 0.25]


def test_frames_a_second_are_those_of_the_last_ten():
    now = [100.0]
    metrics = Metrics(lambda: now[0])
    assert metrics.frames_per_second() == 0
    for _ in range(40):
        now[0] += 0.5
        metrics.frame()
    assert metrics.frames_per_second() == pytest.approx(2.0)
    now[0] += 5
    assert metrics.frames_per_second() == pytest.approx(1.0)
    now[0] += 5
    assert metrics.frames_per_second() == 0
    assert figures(metrics)["omniops_frames_total"][2]["omniops_frames_total", ()] == 40


def test_no_count_is_lost_among_threads():
    metrics = Metrics()

    def count():
        for _ in range(500):
            metrics.frame()
            metrics.click(0.5)
            metrics.frames_per_second()

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    found = figures(metrics)
    assert found["omniops_frames_total"][2]["omniops_frames_total", ()] == 4000
    assert found["omniops_click_seconds"][2]["omniops_click_seconds_sum", ()] == 2000
