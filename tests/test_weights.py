"""Files of weights: read without running what is in them, and fetched."""

from __future__ import annotations

import hashlib
import http.server
import os
import pickle
import re
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from omniops import weights


class _Hostile:
    def __reduce__(self) -> object:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch, new_format):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "meta": _Hostile()}, "hostile.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=r"hostile.pth is refused: it holds \w+.system, which only running code"):
        weights.read(Path("hostile.pth"))
    assert not os.path.exists("executed")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_is_refused_without_advice_to_run_it(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.pkl"
    path.write_bytes(pickle.dumps(_Hostile(), protocol))
    with pytest.raises(ValueError, match=r"hostile\.pkl is (refused|no checkpoint)") as caught:
        weights.read(path)
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not os.path.exists("executed")


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>Not Found</html>", pickle.dumps([1, 2]), pickle.dumps({"a": 1}), b"PK\x03\x04" + bytes(60)],
    ids=["empty", "html", "list", "numbers", "damaged"],
)
def test_what_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.pth is no checkpoint(, or [^:(]+|: it holds [^()]+)$"):
        weights.read(path)


def test_a_damaged_safetensors(tmp_path):
    pytest.importorskip("safetensors", reason="reads them")
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.safetensors is no checkpoint"):
        weights.read(path)


def test_safetensors_that_are_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(ImportError, match=r"a\.safetensors needs safetensors, which is not installed: pip install"):
        weights.read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ({1: torch.zeros(1)}, r"1 \(Tensor\)"),
        ({"state_dict": {"a": 1}}, r"'a' \(int\)"),
        ({"model": {"a": torch.zeros(1)}, "epoch": 3}, r"'model' \(dict\), 'epoch' \(int\)"),
        ({"a": torch.zeros(1), **dict.fromkeys("vwxyz", 1)}, r"('\w' \(int\), ){4}\.\.\."),
        ([torch.zeros(1)], "one list"),
    ],
)
def test_no_state_dict_names_what_is_there_instead(tmp_path, content, held):
    torch.save(content, tmp_path / "a.pth")
    expected = r"\. Expected are tensors by the names of the model's parameters, alone or in a dict as 'state_dict'"
    with pytest.raises(ValueError, match=rf"a\.pth is no checkpoint: it holds no state dict but {held}{expected}"):
        weights.read(tmp_path / "a.pth")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def server(tmp_path):
    """A web server of a folder: the folder and its address, and how often it was asked."""
    folder = tmp_path / "served"
    folder.mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments: object) -> None:
            asked.append(arguments)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{web.server_address[1]}", asked
        web.shutdown()


def test_a_url_is_fetched_once_and_its_checksum_checked(cache, server):
    folder, address, asked = server
    content = b"the weights"
    good = f"model-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / good).write_bytes(content)
    for _ in range(2):
        path = weights.fetch(f"{address}/{good}", progress=False)
        assert path == cache / good
        assert path.read_bytes() == content
    assert len(asked) == 1

    (folder / good).rename(folder / "model-01234567.pth")
    with pytest.raises(ValueError, match=r"another checksum .*expected .01234567"):
        weights.fetch(f"{address}/model-01234567.pth", progress=False)
    assert [path.name for path in cache.iterdir()] == [good]


def test_files_of_one_name_do_not_serve_each_other(cache, server):
    folder, address, asked = server
    for directory in ("a", "b"):
        (folder / directory).mkdir()
        (folder / directory / "model.pth").write_text(directory)
    for directory in ("a", "b", "a", "b"):
        path = weights.fetch(f"{address}/{directory}/model.pth", progress=False)
        assert path.parent == cache
        assert path.name.endswith("-model.pth")
        assert path.read_text() == directory
    assert len(asked) == 2


def test_a_file_put_where_the_error_says_is_used(cache, server):
    _, address, _ = server
    with pytest.raises(ConnectionError, match="File not found") as caught:
        weights.fetch(f"{address}/c/model.pth", progress=False)
    (path,) = re.findall(r"put it at (.*model\.pth), or", str(caught.value))
    cache.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("c")
    assert weights.fetch(f"{address}/c/model.pth", progress=False).read_text() == "c"


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:9/", "http://127.0.0.1:9/models/", "http://127.0.0.1:9", "http://127.0.0.1:9/m/?a=b/c.pth"],
)
def test_a_url_of_a_folder(cache, url):
    with pytest.raises(ValueError, match=f"{re.escape(url)} names no file: the URL of a checkpoint ends with"):
        weights.fetch(url)


def _serve_half(listener: socket.socket, then: float) -> None:
    """Answer each request with half of what is promised, and close after so many seconds."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # the listener is closed
            return
        with connection:
            connection.recv(2**16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + bytes(50))
            time.sleep(then)


@pytest.mark.parametrize("why", ["refused", "not found", "silent", "no name service", "stalled", "cut short"])
def test_what_cannot_be_fetched_says_so_in_time(cache, server, monkeypatch, why):
    _, address, _ = server
    monkeypatch.setattr(weights, "_PATIENCE", 1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if why in ("silent", "stalled", "cut short"):
            listener.listen()
        if why in ("stalled", "cut short"):
            seconds = 12 if why == "stalled" else 0
            threading.Thread(target=_serve_half, args=(listener, seconds), daemon=True).start()
        if why == "no name service":
            monkeypatch.setattr(weights, "urlopen", lambda *_, **__: time.sleep(4))
        if why != "not found":
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        start = time.perf_counter()
        with pytest.raises(ConnectionError) as caught:
            weights.fetch(f"{address}/weights-01234567.pth")
    assert time.perf_counter() - start < 10
    message = str(caught.value)
    assert f"cannot fetch {address}/weights-01234567.pth: " in message
    assert f"put it at {cache / 'weights-01234567.pth'}, or pass the path of the file" in message
    assert not cache.exists() or not list(cache.iterdir())
