"""The doors of the house: who may import whom, what stands where, and how long a reader must read."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("nanotrain/**/*.py"), *ROOT.glob("kernels/**/*.py")])
TOP_LEVEL = {"pyproject.toml", "csrc", "nanotrain", "kernels", "benchmarks", "tests", "README.md", ".ci", ".gitignore", "LICENSE"}

RANKS = {"kernels": 0, "leaf": 1, "model": 2, "parallel": 3, "services": 4, "stages": 5, "entry": 6}
"""A module may import its own rank and lower ones."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("nanotrain", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts).removesuffix(".__init__")


def rank(module: str) -> str:
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else "leaf"
    if module in ("nanotrain.__main__", "nanotrain.quickstart", "nanotrain.report", "nanotrain.watch") or room == "reporting":
        return "entry"
    if room in ("kernels", "model", "parallel", "stages"):
        return room
    if room in ("optim", "losses", "memory", "stability"):
        return "model"
    if room in ("data", "eval", "quant", "checkpoint", "run", "session", "pretrained", "graphs"):
        return "services"
    return "leaf"


def imports(path: Path) -> set[str]:
    """Modules of nanotrain that a file imports, wherever in it."""
    found = set()
    names = {module_of(p) for p in SOURCES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in names else node.module for a in node.names}
    return {m for m in found if m.split(".")[0] == "nanotrain"}


GRAPH = {module_of(p): imports(p) for p in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_go_through_the_doors(path):
    module = module_of(path)
    for target in GRAPH[module]:
        assert RANKS[rank(target)] <= RANKS[rank(module)], f"{module} imports {target}"
        if rank(module) == "kernels":
            assert rank(target) == "kernels", f"{module} imports {target}"
        if rank(module) == "stages" and target != module and module != "nanotrain.stages":
            assert rank(target) != "stages", f"{module} imports another stage, {target}"
        if target in ("nanotrain.quickstart", "nanotrain.report", "nanotrain.watch"):
            assert module == "nanotrain.__main__", f"{module} imports {target}"
        if target.startswith("nanotrain.reporting"):
            assert module in ("nanotrain.report", "nanotrain.watch") or module.startswith("nanotrain.reporting"), f"{module} imports {target}"
        assert not (module.startswith("nanotrain.model") and target.split(".")[1] in ("parallel", "data")), f"{module} imports {target}"


def test_no_cycle():
    done: set[str] = set()

    def visit(module, trail):
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for target in GRAPH.get(module, ()):
                visit(target, [*trail, module])
            done.add(module)

    for module in GRAPH:
        visit(module, [])


def test_the_package_itself_imports_nothing():
    assert not [n for n in ast.walk(ast.parse((ROOT / "nanotrain/__init__.py").read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_forbidden_things(path):
    text = path.read_text()
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not [m for m in modules if m.split(".")[0] in ("pickle", "marshal", "shelve", "dill")], f"{path}: pickle"
            distributed = [m for m in modules if m.startswith("torch.distributed")]
            assert not distributed or path.name == "collectives.py", f"{path}: torch.distributed outside collectives.py"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{path}:{node.lineno}: {node.func.id}"
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            assert dotted not in ("torch.load", "torch.save"), f"{path}:{node.lineno}: {dotted} unpickles"
            assert not dotted.startswith("torch.distributed") or path.name == "collectives.py", f"{path}:{node.lineno}"
        assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}: a bare assertion reaches the user"
    # The environment is read only where another program's protocol is: torchrun's world size, cuBLAS's workspace.
    names = set(re.findall(r"(?:environ\S*?[\[(]|getenv\()\s*['\"](\w+)['\"]", text))
    assert names <= {"WORLD_SIZE", "CUBLAS_WORKSPACE_CONFIG"}, f"{path}: {names}"


def test_no_device_query_file_or_network_at_import():
    """Importing every module opens nothing of ours, starts no CUDA and no thread."""
    code = (
        "import sys, threading, socket, builtins, importlib, torch\n"
        "def refuse(*a, **k): raise SystemExit('touched at import')\n"
        "torch.cuda.is_available = torch.cuda.device_count = socket.socket.connect = refuse\n"
        f"[importlib.import_module(m) for m in {sorted(m for m in GRAPH if m != 'nanotrain.__main__')!r}]\n"
        "assert threading.active_count() == 1\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_stay_short_and_the_top_level_fixed():
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if tracked.returncode == 0 and tracked.stdout:
        assert {line.split("/")[0] for line in tracked.stdout.splitlines()} <= TOP_LEVEL
    for path in [*SOURCES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]:
        assert len(path.read_text().splitlines()) <= 800, f"{path} is over 800 lines"


def follow_one_step() -> list[tuple[str, int]]:
    """The README's "Follow one step": files and the line counts it claims."""
    section = (ROOT / "README.md").read_text().split("## Follow one step")[1].split("\n## ")[0]
    return [(name, int(count.replace(",", ""))) for name, count in re.findall(r"\| `([^`]+)` \| ([\d,]+) \|", section)]


def test_a_training_step_is_read_in_under_1500_lines():
    rows = follow_one_step()
    names = [name for name, _ in rows]
    for needed in ("stages/pretrain.py", "model/transformer.py", "losses.py", "optim.py", "data/loader.py", "run.py"):
        assert f"nanotrain/{needed}" in names
    for name, claimed in rows:
        assert len((ROOT / name).read_text().splitlines()) == claimed, f"README says {claimed} lines for {name}"
    assert sum(count for _, count in rows) < 1500


def test_one_kernel_file_keeps_its_order():
    for path in sorted((ROOT / "kernels").glob("*.py")):
        # What is too long for one file has parts, attention_forward.py beside attention.py; attention_reference.py is read first.
        part = (path.parent / f"{path.stem.split('_')[0]}.py").exists() and "_" in path.stem
        if path.name in ("__init__.py", "runtime.py", "random.py", "native.py", "cpu.py", "multi_tensor.py") or part:
            continue
        tree = ast.parse(path.read_text())
        functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
        apart = path.with_name(f"{path.stem}_reference.py")
        if apart.exists():
            functions = [n.name for n in ast.parse(apart.read_text()).body if isinstance(n, ast.FunctionDef)] + functions
        public = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_") and n.name != "cost"]
        public = [f for f in public if not f.endswith("_reference")]
        assert public and "cost" in functions and ast.get_docstring(tree), path
        assert path.stem not in public, f"{path}: a module must not bear a public function's name"
        for name in public:
            reference = name.rstrip("_") + "_reference"
            assert functions.index(reference) < functions.index(name), f"{path}: {reference} must stand before {name}"
            arguments = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name).args
            assert "impl" in [a.arg for a in arguments.kwonlyargs], f"{path}: {name} takes no impl"
        assert any(isinstance(n, ast.Assign) and n.targets[0].id == "EXAMPLES" for n in tree.body if isinstance(n, ast.Assign)), path


def test_public_things_have_docstrings():
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}:{node.lineno}: {node.name} has no docstring"


def test_every_room_is_packaged():
    """A wheel holds each package, `kernels/` under the name nanotrain.kernels, and the C++ of csrc/."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {module_of(p) for p in SOURCES if p.name == "__init__.py"}
    assert set(setup["packages"]) == rooms | {"nanotrain.csrc"} and setup["package-data"] == {"nanotrain.csrc": ["*.cpp", "*.h"]}
    assert setup["package-dir"] == {"nanotrain": "nanotrain", "nanotrain.kernels": "kernels", "nanotrain.csrc": "csrc"}
