"""omniops.enable for compiled modules: a stand-in where one is missing, and beside a compiled one."""

import importlib
import sys
import zipimport
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import omniops
from omniops import dropin
from omniops.dropin._extension import Extension

NAMES = [extension.library for extension in dropin.EXTENSIONS]
COMPILED = """
def double(x):
    return "theirs", x.device.type

def other():
    return "theirs"
"""
WITHOUT_CUDA = """
def double(x):
    raise RuntimeError("Not compiled with GPU support")
"""
OTHER_FAULT = """
def double(x):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""
USER = """
try:
    from engine import _C
except ImportError:
    pass

def double(x):
    return _C.double(x)
"""


def double(x):
    return "ours", x.device.type


def give(extension, module):
    if not hasattr(module, "_C"):
        extension.replace(module, "_C", importlib.import_module("engine._C"))


@pytest.fixture
def engine():
    extension = Extension("engine._C", {"double": double}, {"engine.user": give}, lacking=["halve"])
    yield extension
    extension.disable()


def tensor(device="cpu"):
    with FakeTensorMode():
        return torch.empty(2, device=device)


def user():
    return importlib.import_module("engine.user")


@pytest.mark.parametrize("imported", [False, True], ids=["before the import", "after the import"])
def test_a_stand_in_serves_every_device(project, engine, imported):
    project({"engine/user.py": USER})
    assert engine.installed()
    if imported:
        with pytest.raises(NameError):
            user().double(tensor())
    engine.enable(None)
    assert imported or "engine" not in sys.modules
    assert [user().double(tensor(device)) for device in ("cpu", "cuda", "meta")] == [
        ("ours", "cpu"),
        ("ours", "cuda"),
        ("ours", "meta"),
    ]
    assert set(engine.serving().values()) == {"omniops"}


def test_disabling_leaves_what_was(project, engine):
    project({"engine/user.py": USER})
    importlib.import_module("engine.user")
    for _ in range(2):
        engine.enable(None)
        engine.enable(None)
        assert user().double(tensor()) == ("ours", "cpu")
        engine.disable()
        engine.disable()
        assert not engine.enabled()
        assert "_C" not in vars(user())
        assert "engine._C" not in sys.modules
        assert not hasattr(sys.modules["engine"], "_C")
        with pytest.raises(ModuleNotFoundError, match=r"engine\._C"):
            importlib.import_module("engine._C")


def test_a_stand_in_fails_by_name_from_disable_until_it_is_enabled_again(project, engine):
    project({"engine/user.py": USER})
    engine.enable(None)
    assert user().double(tensor()) == ("ours", "cpu")
    engine.disable()
    with pytest.raises(AttributeError, match=r"'double': omniops was told to serve it no longer; .*'engine'"):
        user().double(tensor())
    engine.enable(None)
    assert user().double(tensor()) == ("ours", "cpu")


def test_what_is_lacking_is_said_at_the_call(project, engine):
    project({"engine/user.py": USER})
    engine.enable(None)
    module = importlib.import_module("engine._C")
    from engine._C import halve

    with pytest.raises(NotImplementedError, match=r"no halve for engine: it takes the compiled engine\._C"):
        halve(tensor())
    with pytest.raises(AttributeError, match=r"'engine\._C' has no attribute 'third': .* stand-in .* halve, double"):
        _ = module.third
    assert {"halve", "double"} <= set(dir(module))
    assert not hasattr(module, "__file__")


def test_a_stand_in_is_a_module_as_others_are(project, engine):
    project({"engine/user.py": USER})
    engine.enable(None)
    assert find_spec("engine._C").name == "engine._C"
    module = importlib.import_module("engine._C")
    assert module is sys.modules["engine._C"] is sys.modules["engine"]._C
    assert (module.__name__, module.__package__, module.__spec__.name) == ("engine._C", "engine", "engine._C")
    assert find_spec("engine._D") is None


@pytest.mark.parametrize("imported", [False, True], ids=["before the import", "after the import"])
def test_a_compiled_module_goes_on_to_serve_cuda(project, engine, imported):
    project({"engine/user.py": USER, "engine/_C.py": COMPILED})
    if imported:
        assert user().double(tensor()) == ("theirs", "cpu")
    engine.enable(None)
    assert user().double(tensor()) == ("ours", "cpu")
    assert user().double(tensor("cuda")) == ("theirs", "cuda")
    assert user()._C.other() == "theirs"
    assert user()._C.__file__.endswith("_C.py")
    assert engine.serving() == {"cpu": "omniops", "cuda": "engine", "mps": "omniops", "any other": "omniops"}
    engine.enable(("cuda",))
    assert user().double(tensor("cuda")) == ("ours", "cuda")
    assert set(engine.serving().values()) == {"omniops"}
    engine.disable()
    assert user().double(tensor()) == ("theirs", "cpu")
    assert importlib.reload(sys.modules["engine._C"]) is user()._C


def test_of_one_built_without_cuda_ours_serve_there_too(project, engine):
    project({"engine/user.py": USER, "engine/_C.py": WITHOUT_CUDA})
    engine.enable(None)
    assert [user().double(tensor("cuda")) for _ in range(2)] == [("ours", "cuda")] * 2


def test_another_error_of_the_compiled_module_is_its_own(project, engine):
    project({"engine/user.py": USER, "engine/_C.py": OTHER_FAULT})
    engine.enable(None)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        user().double(tensor("cuda"))


def test_one_that_does_not_load_is_none(project, engine):
    project({"engine/user.py": USER, "engine/_C.py": "raise ImportError('undefined symbol: _ZN3c10')"})
    engine.enable(None)
    assert user().double(tensor("cuda")) == ("ours", "cuda")


def test_a_folder_of_its_name_is_not_the_module(project, engine):
    folder = project({"engine/user.py": USER})
    (folder / "engine" / "_C").mkdir()
    engine.enable(None)
    assert user().double(tensor()) == ("ours", "cpu")


@pytest.fixture
def lone():
    extension = Extension("lone", {"double": double})
    yield extension
    extension.disable()
    sys.modules.pop("lone", None)


def test_a_compiled_module_further_down_the_path_is_found(lone, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    lone.enable(None)
    (tmp_path / "lone.py").write_text(COMPILED)
    importlib.invalidate_caches()
    assert importlib.import_module("lone").double(tensor("cuda")) == ("theirs", "cuda")
    assert lone.serving()["cuda"] == "lone"


def test_a_compiled_module_that_another_finder_knows_is_found(lone, tmp_path, monkeypatch):
    """As of an editable installation."""
    (tmp_path / "lone.py").write_text(COMPILED)
    finder = SimpleNamespace(
        find_spec=lambda name, path, target: (
            spec_from_file_location(name, tmp_path / "lone.py") if name == "lone" else None
        )
    )
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finder])
    lone.enable(None)
    assert importlib.import_module("lone").double(tensor("cuda")) == ("theirs", "cuda")
    lone.disable()
    assert lone.serving()["cuda"] == "lone"


@pytest.mark.parametrize("name", NAMES)
def test_each_is_enabled_by_its_name_without_an_import(project, name):
    extension = dropin.LIBRARIES[name]
    if extension.package:
        project({f"{name}/module.py": "raise RuntimeError('imported')"})
        (project({}) / name / "__init__.py").write_text("raise RuntimeError('imported')")
    assert extension.installed()
    omniops.enable(name)
    assert extension.enabled()
    assert not extension.package or not [module for module in sys.modules if module.partition(".")[0] == name]
    omniops.disable(name)
    assert not extension.enabled()


@pytest.mark.parametrize("name", [name for name in NAMES if "." in dropin.LIBRARIES[name].name])
def test_without_its_package_none_is_served(monkeypatch, name):
    monkeypatch.setattr(dropin._extension, "_found", lambda fullname, path: None)
    assert not dropin.LIBRARIES[name].installed()
    with pytest.raises(ModuleNotFoundError, match=f"libraries must be installed to be enabled, got '{name}'"):
        omniops.enable(name)


@pytest.mark.parametrize("name", [name for name in NAMES if "." in dropin.LIBRARIES[name].name])
def test_a_folder_of_that_name_is_not_the_package(monkeypatch, name):
    monkeypatch.setattr(dropin._extension, "_found", lambda fullname, path: ModuleSpec(fullname, None))
    assert not dropin.LIBRARIES[name].installed()


def test_a_module_that_its_user_forbids_stays_so(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "engine._C", None)
    monkeypatch.setitem(sys.modules, "engine.user", None)
    engine.enable(None)
    assert sys.modules["engine._C"] is None


def test_two_may_change_one_module_and_it_keeps_its_loader(project):
    """Loaded from an archive, whose modules share one loader."""
    folder = project({"engine.py": "", "other.py": ""})
    with ZipFile(folder / "archive.zip", "w") as archive:
        archive.writestr("engine/__init__.py", "")
        archive.writestr("engine/user.py", USER)
        archive.writestr("engine/after.py", "")
    for name in ("engine.py", "other.py"):
        (folder / name).unlink()
    changed = []
    changes = {"engine.user": lambda extension, module: changed.append((extension.name, module.__name__))}
    extensions = Extension("engine._C", {"double": double}, changes), Extension("other", {}, changes)
    sys.path.insert(0, str(folder / "archive.zip"))
    try:
        for extension in extensions:
            extension.enable(None)
        assert user().double(tensor()) == ("ours", "cpu")
        importlib.import_module("engine.after")
        assert changed == [("engine._C", "engine.user"), ("other", "engine.user")]
        assert type(user().__loader__) is type(user().__spec__.loader) is zipimport.zipimporter
    finally:
        for extension in extensions:
            extension.disable()
        sys.path.remove(str(folder / "archive.zip"))


def test_compiled_for_all_devices_it_says_itself_what_it_lacks(project):
    said = "double_impl: implementation for device meta:0 not found."
    theirs = (
        f"def double(x):\n    if x.is_meta:\n        raise RuntimeError('{said}')\n    return 'theirs', x.device.type"
    )
    project({"engine/_C.py": theirs})
    extension = Extension("engine._C", {"double": double}, compiled_for=None, lacking=None)
    try:
        extension.enable(None)
        module = importlib.import_module("engine._C")
        calls = [module.double(tensor(device)) for device in ("meta", "cpu", "meta")]
        assert calls == [("ours", "meta"), ("theirs", "cpu"), ("ours", "meta")]
        extension.enable(("cpu",))
        assert module.double(tensor()) == ("ours", "cpu")
    finally:
        extension.disable()
