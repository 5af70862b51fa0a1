"""Loading what a stranger wrote executes nothing: no module that could is there to be called, and payloads through the real program stay asleep.
docs/security.md names these tests."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moetrain.cli import main
from moetrain.convert.huggingface import read_config, read_tensors
from tests.test_bad_inputs import write_folder

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "moetrain").rglob("*.py"))


def calls(path: Path) -> list[str]:
    """Names of all functions called in a file, dotted as written."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_executes_data(path: Path) -> None:
    """No pickle, no eval, no YAML but the plain loader, no module loaded by a name from data; --import is the one exception."""
    found = calls(path)
    never = {"eval", "exec", "compile", "__import__", "torch.load", "pickle.load", "pickle.loads", "yaml.full_load", "yaml.unsafe_load", "os.system"}
    assert not never & set(found), f"{path.name} calls {never & set(found)}"
    loaders = [name for name in found if name in ("yaml.load", "yaml.load_all")]
    assert loaders == (["yaml.load"] if path.name == "reading.py" else []), loaders
    dynamic = [name for name in found if name.endswith(("exec_module", "import_module"))]
    assert not dynamic or path.name == "cli.py", f"{path.name} calls {dynamic}"
    assert not any(isinstance(n, ast.keyword) and n.arg == "shell" for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def test_pickles_stay_asleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Under the names of weights, tokenizers and configs; the payload does run when it is unpickled, so the test could fail."""
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    raw = pickle.dumps(Payload(canary))
    pickle.loads(raw)
    assert canary.exists()
    canary.unlink()
    for name in ("model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"):
        folder = tmp_path / name.replace(".", "_")
        write_folder(folder)
        if name in ("pytorch_model.bin", "model.safetensors.index.json"):
            (folder / "model.safetensors").unlink()
        if name == "pytorch_model.bin":
            torch.save({"weights": Payload(canary)}, folder / name)
        else:
            (folder / name).write_bytes(raw)
        status = main(["upcycle", "--upcycle.dense", folder.name, "--upcycle.output", f"out_{folder.name}", "--upcycle.num_experts", "4"])
        # A tokenizer that can't be read is only mentioned: the sample is random ids then.
        assert status == (0 if name.startswith("tokenizer") else 2), capfd.readouterr()
        assert not canary.exists(), name


def test_remote_code_stays_asleep(tmp_path: Path) -> None:
    folder, canary = tmp_path / "evil", tmp_path / "canary"
    write_folder(folder)
    code = f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(code)
    text = (folder / "config.json").read_text()
    auto = '"auto_map": {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}, "trust_remote_code": true'
    (folder / "config.json").write_text(text.rstrip().removesuffix("}") + f", {auto}}}")
    for _ in read_tensors(folder, read_config(folder)):
        pass
    assert not canary.exists()


def test_only_the_command_line_names_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("from pathlib import Path\nPath('canary').touch()\n")
    for text in ("import: mine.py\n", "--import: mine.py\n", "model: {moe: {router: {type: mine.py}}}\n"):
        (tmp_path / "c.yaml").write_text(text)
        assert main(["config", "--config", "c.yaml"]) == 2
        assert not (tmp_path / "canary").exists()
    assert main(["config", "--import", "mine.py"]) == 0
    assert (tmp_path / "canary").exists()


def test_short_fuzz() -> None:
    """Mutated configs and checkpoints through the program; `python -m tests.fuzz` runs thousands. Its process has no threads when it forks."""
    command = [sys.executable, "-m", "tests.fuzz", "--configs", "50", "--checkpoints", "50", "--seed", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
