"""Who imports whom: the layers of the design hold, and the core needs no optional package.

Every import statement of every module is read from its source, those inside functions too: a cycle that is hidden in a function is still one.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = {
    "wandb", "transformers", "zstandard", "pyarrow", "matplotlib", "deepspeed", "megatron", "flash_attn", "tensorboard", "lm_eval", "triton",
    "scipy", "pandas", "sonicmoe", "scattermoe", "megablocks", "tutel", "datasets", "accelerate",
}  # fmt: skip
REQUIRED = {"torch", "numpy", "yaml", "pydantic", "pydantic_core", "safetensors", "tokenizers", "rich"}

# Part -> parts it may import beside itself. A part is a folder of moetrain/ or a module at its top.
CORE = {"config", "ops", "modules", "files"}
MODEL = CORE | {"moe", "attention", "model"}
LIBRARY = MODEL | {"parallel", "data", "checkpoint", "convert", "records", "metrics", "microbatch", "generate", "build"}
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "files": set(),
    "modules": set(),
    "ops": {"__init__"},  # moetrain._C, the compiled extension
    "moe": CORE,
    "attention": CORE | {"moe"},
    "model": CORE | {"moe", "attention"},
    "parallel": MODEL,
    "data": {"files"},
    "records": set(),
    "metrics": CORE | {"records"},
    "checkpoint": CORE,
    "convert": MODEL | {"data"},
    "microbatch": MODEL | {"data"},
    "generate": MODEL,
    "build": LIBRARY - {"build", "microbatch", "generate", "records", "metrics"},
    "evaluate": LIBRARY,
    "guard": MODEL | {"parallel", "records", "metrics"},
    "train": LIBRARY | {"evaluate", "guard", "preempt", "restarts", "stragglers", "watchdog"},
    "preempt": {"files"},
    "restarts": CORE | {"records"},
    "stragglers": set(),
    "watchdog": CORE | {"preempt", "records"},
    "cluster": CORE | {"parallel", "__init__"},
    "doctor": {"attention", "ops", "__init__"},
    "__main__": {"cli"},
    "__init__": set(),
}
# The command files sit on top: cli may import all of them, nobody imports cli but `python -m moetrain`.
COMMANDS = {"cli", "plan", "report", "bench", "submit"}


def modules() -> dict[str, Path]:
    """Dotted name without `moetrain.` -> file; a package by its own name, `__init__` for the top one."""
    found = {}
    for path in sorted((ROOT / "moetrain").rglob("*.py")):
        parts = list(path.relative_to(ROOT / "moetrain").with_suffix("").parts)
        if parts[-1] == "__init__" and len(parts) > 1:
            parts.pop()
        found[".".join(parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> list[tuple[str, int, bool]]:
    """(dotted name imported, line, whether at module level) of every import in a module."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    inside = {n for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) for n in ast.walk(f)}
    found: list[tuple[str, int, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, node not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: a relative import; the whole name says where it is from"
            for alias in node.names:
                # `from moetrain import ops` imports a module, `from moetrain.ops import route` a name of one.
                whole = f"{node.module}.{alias.name}"
                is_module = node.module and node.module.split(".")[0] == "moetrain" and whole.removeprefix("moetrain.") in MODULES
                found.append((whole if is_module else node.module or "", node.lineno, node not in inside))
    return found


def part(module: str) -> str:
    return module.split(".")[0]


def ours(name: str) -> list[tuple[str, int]]:
    """Parts of moetrain that a module imports, its own left out."""
    found = []
    for module, line, _ in imports(name):
        if module == "moetrain":
            found.append(("__init__", line))
        elif module.startswith("moetrain."):
            found.append((part(module.removeprefix("moetrain.")), line))
    return [(p, line) for p, line in found if p != part(name)]


@pytest.mark.parametrize("name", list(MODULES))
def test_layers(name: str) -> None:
    if name.startswith("convert.hf."):
        # It is copied into exported folders and runs where moetrain is not installed.
        for module, line, _ in imports(name):
            assert part(module) in {"torch", "transformers"} | sys.stdlib_module_names, f"{name}:{line} imports {module}"
        return
    own = part(name)
    if own in COMMANDS:
        return
    assert own in ALLOWED, f"moetrain/{own} is new: say in this test what it may import"
    wrong = [f"{name}:{line} imports {p}" for p, line in ours(name) if p not in ALLOWED[own]]
    assert not wrong, wrong


def test_nobody_imports_the_commands() -> None:
    for name in MODULES:
        if part(name) not in COMMANDS | {"__main__"}:
            wrong = [f"{name}:{line} imports {p}" for p, line in ours(name) if p in COMMANDS]
            assert not wrong, wrong
    below = set(MODULES) - {"train", "cli", "__main__"}
    assert not [f"{name}:{line}" for name in below for p, line in ours(name) if p == "train" and part(name) not in COMMANDS]


def test_no_cycle() -> None:
    graph = {name: {m.removeprefix("moetrain.") for m, _, _ in imports(name) if m.startswith("moetrain.")} & set(MODULES) for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name] - {name}):
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("name", list(MODULES))
def test_packages(name: str) -> None:
    """At module level a module imports what moetrain requires, no optional package and none that nobody declared."""
    if name.startswith("convert.hf."):
        return
    for module, line, top in imports(name):
        package = part(module)
        if package == "moetrain" or package in sys.stdlib_module_names:
            continue
        assert package in REQUIRED | OPTIONAL, f"{name}:{line} imports {module}, which pyproject.toml does not know"
        # torch.utils.tensorboard imports the tensorboard package.
        assert not (top and (package in OPTIONAL or module.startswith("torch.utils.tensorboard"))), f"{name}:{line} imports {module} at module level"


def test_programs_start_without_optional_packages(tmp_path: Path) -> None:
    """A fresh interpreter in which no optional package can be imported loads every module and runs `moetrain config`."""
    names = [f"moetrain.{n}" for n in MODULES if n not in ("__init__", "__main__") and not n.startswith("convert.hf.")]
    program = f"""
import sys
for name in {sorted(OPTIONAL)!r}:
    sys.modules[name] = None  # import raises ModuleNotFoundError
import moetrain.cli
assert "torch" not in sys.modules, "moetrain --help would wait for torch"
assert moetrain.cli.main(["config"]) == 0
import importlib
for name in {names!r}:
    importlib.import_module(name)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "run_dir:" in done.stdout
