"""Proves that the doctor reports a healthy, a missing and a broken package as such, whatever the broken one does, and never raises."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys

import pytest
import torch

from moetrain import doctor


def _fake(folder, name: str, code: str, version: str = "1.2.3") -> None:
    """An installed distribution whose module runs `code` when imported."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """One package that works, several broken in their own way, and one that is not there."""
    codes = {
        "good_one": "",
        "raising": "raise RuntimeError('first line\\nsecond line')",
        "no_library": "raise ImportError('libcudart.so.99: cannot open shared object file')",
        "noisy": "import sys\nprint('hello', file=sys.stderr)\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n"
        "    raise KeyError('inner')\nfinally:\n    print('bye', file=sys.stderr)",
        "aborting": "import os\nos.abort()",
        "leaving": "import sys\nsys.exit(3)",
    }
    for name, code in codes.items():
        _fake(tmp_path, name, code)
    names = [*codes, "surely_not_here"]
    monkeypatch.setattr(doctor, "_PACKAGES", tuple((n, n, f"use of {n}", f"pip install {n}", n == "surely_not_here") for n in names))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(tmp_path)
    return names


def test_broken_packages_are_reported_not_suffered(packages):
    """An exception, a missing library, an abort and an exit at import become one line each."""
    found = doctor._packages()
    assert found["good_one"] == {"version": "1.2.3", "problem": None, "for": "use of good_one"}
    assert found["raising"]["problem"] == "import fails: RuntimeError: first line"
    assert found["no_library"]["problem"] == "import fails: ImportError: libcudart.so.99: cannot open shared object file"
    assert found["noisy"]["problem"] == "import fails: KeyError: 'inner'"
    assert found["aborting"]["problem"] == "import fails: ended by signal 6"
    assert found["leaving"]["problem"] == "import fails: exit status 3"
    assert found["surely_not_here"]["version"] is None


def test_report_and_json(packages, capsys):
    """The report names every package with its state; a package that needs a GPU is proposed only where there is one; JSON has the same facts."""
    status = doctor.main()
    text = capsys.readouterr().out
    assert "docs/troubleshooting.md" in text
    assert "good_one         1.2.3, works (use of good_one)" in text and "1.2.3, import fails: RuntimeError: first line" in text
    assert "surely_not_here  not installed" in text and "pip install --force-reinstall --no-deps raising" in text
    assert ("pip install surely_not_here" in text) == torch.cuda.is_available()
    assert torch.__version__ in text and "communication" in text
    assert doctor.main(as_json=True) == status
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"]["version"] == torch.__version__ and list(facts["packages"]) == packages
    assert facts["disk"]["free"] > 0 and facts["cpu"]["usable_cores"] > 0 and facts["python"] == sys.version.split()[0]


def test_every_look_may_fail(packages, monkeypatch):
    """With each part of the machine unreadable there still is a report, in which each problem has a line, and the status says it can't train."""
    looks = ("_torch", "_gpus", "_extension", "_cpu", "_memory", "_disk", "_attention", "_experts", "_communication")

    def broken(name):
        def look():
            raise OSError(f"{name} is broken\nsecond line")

        return look

    for name in looks:
        monkeypatch.setattr(doctor, name, broken(name))
    facts = doctor.inspect()
    text = doctor.report(facts)
    json.dumps(facts)
    for name in looks:
        assert name in ("_cpu", "_memory", "_disk") or f"OSError: {name} is broken" in text, name
    assert "second line" not in text and doctor.main() == 1 and "pip install -e ." in text


def _facts(**changes):
    facts = {
        "torch": {"version": "2.13.0", "cuda": None, "nccl": False},
        "gpus": [],
        "cpu": {"cores": 8, "usable_cores": 8, "torch_threads": 8, "omp_num_threads": "8", "load": 0.0},
        "disk": {"folder": "/x", "total": 2**40, "free": 2**39, "writable": True},
    }
    for key, change in changes.items():
        facts[key] = {**facts[key], **change} if isinstance(change, dict) else change
    return facts


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"cpu": {"usable_cores": 1.5}}, "set OMP_NUM_THREADS=1 or less"),
        ({"cpu": {"omp_num_threads": None}}, "OMP_NUM_THREADS is not set"),
        ({"cpu": {"load": 9.0}}, "the load is 9.0 on 8 cores"),
        ({"disk": {"free": 2**30}}, "only 1.0 GiB of disk are free"),
        ({"disk": {"writable": False}}, "/x is not writable"),
    ],
)
def test_traps_are_named(monkeypatch, changes, words):
    """Each trap gives its own warning with the way out, and a good machine none."""
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor._warnings(_facts()) == []
    (warning,) = doctor._warnings(_facts(**changes))
    assert words in warning


def test_a_gpu_that_torch_can_not_use(monkeypatch):
    """nvidia-smi without a device in torch says which of the two reasons it is."""
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "built without CUDA" in doctor._warnings(_facts())[0]
    assert "driver older" in doctor._warnings(_facts(torch={"cuda": "12.9"}))[0]
    assert doctor._warnings(_facts(gpus=[{"name": "H200"}])) == []


def test_the_real_packages():
    """Each distribution of the table has the module that the table says, as far as it is installed here; the core works."""
    for name, module, *_ in doctor._PACKAGES:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        assert importlib.util.find_spec(module) is not None, name
    assert doctor._import_problem("safetensors") is None
    assert doctor._extension()["devices"] and doctor._attention() and doctor._experts() and doctor._communication()
