"""Who may import whom. A module that is missing from the table fails, and so does an import inside a function."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_hinm"

# module: the modules of this package that it may import
ALLOWED: dict[str, set[str]] = {
    "__init__": {
        "pattern", "layout", "saliency", "schedule", "mask", "gyro", "format", "prune",
        "ops", "modules", "plan", "store", "passes", "twins", "traced", "options", "backend", "explain", "streams",
        "callback", "metrics",
    },
    "__main__": {"explain", "format", "kernels", "ops"},
    # core
    "pattern": set(),
    "layout": {"pattern"},
    "saliency": set(),
    "schedule": {"pattern"},
    "mask": {"pattern", "layout"},
    "cache": set(),
    "gyro": {"pattern", "layout", "mask", "cache"},
    "format": {"pattern", "layout", "mask", "prune"},
    "prune": {"pattern", "layout", "saliency", "mask", "gyro"},
    # inference arm
    "kernels": {"cache"},
    "ops": {"pattern", "layout", "format", "kernels", "cache"},
    "workload": {"pattern", "format", "prune", "ops"},
    "plan": {"pattern", "kernels", "ops", "workload"},
    "modules": {"pattern", "layout", "format", "prune", "ops", "plan", "workload"},
    "store": {"pattern", "format", "prune", "modules"},
    "passes": {"pattern", "layout", "format", "kernels", "ops", "modules", "workload"},
    "twins": {"layout", "format", "modules"},
    "traced": {"pattern", "ops", "modules", "prune"},
    "options": set(),
    "backend": {
        "pattern", "layout", "format", "prune", "ops", "modules", "plan", "workload", "passes", "twins", "traced",
        "options",
    },
    "explain": {
        "pattern", "layout", "format", "prune", "ops", "plan", "workload", "passes", "traced", "options", "backend",
    },
    "streams": {"pattern", "prune", "passes", "traced"},
    # training arm
    "callback": {"pattern", "layout", "saliency", "schedule", "mask", "gyro", "format", "prune", "metrics"},
    "metrics": {"pattern", "layout", "mask"},
}  # fmt: skip

# third-party package (or part of one): the only modules that may import it; what is not named here is free
ONLY_IN: dict[str, set[str]] = {
    "cuda": {"kernels"},
    "jsonargparse": {"__main__"},
    "lightning": {"__main__", "callback"},
    "matplotlib": set(),
    "numpy": {"gyro"},
    "pytorch_lightning": set(),
    "safetensors": {"format", "gyro"},
    "scipy": {"gyro"},
    "torch.fx": {"passes", "traced", "backend", "explain"},
    "torchmetrics": {"metrics"},
}

# never loaded by `import lightning_hinm` alone
HEAVY = {"lightning", "pytorch_lightning", "torchmetrics", "scipy", "matplotlib", "jsonargparse", "cuda"}


def imported_names(source: str) -> set[str]:
    """Absolute dotted names of everything a module of this package imports, at any depth of nesting."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in ("lightning_hinm" if node.level else "", node.module) if part)
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("import_module", "importlib.import_module", "__import__")
            and isinstance(node.args[0], ast.Constant)
        ):
            name = node.args[0].value
            names.add(f"lightning_hinm{name}" if name.startswith(".") else name)
    return names


def module_names() -> list[str]:
    # A file that became a package of the same name counts as one module.
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    return sorted({file.parts[0].removesuffix(".py") for file in files})


def sources(module: str) -> list[str]:
    paths = [PACKAGE / f"{module}.py", *(PACKAGE / module).rglob("*.py")]
    return [path.read_text() for path in paths if path.exists()]


def imports_of(module: str) -> set[str]:
    return set().union(*(imported_names(source) for source in sources(module)))


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_every_module_has_its_row_in_the_table() -> None:
    assert set(module_names()) <= set(ALLOWED), "add the new module to ALLOWED, with what it may import"


@pytest.mark.parametrize("module", module_names())
def test_a_module_imports_only_what_its_row_allows(module: str) -> None:
    own = {name.removeprefix("lightning_hinm.") for name in imports_of(module) if is_within(name, "lightning_hinm")}
    # `from lightning_hinm import X` goes through the front door and would be circular: name the module.
    assert "lightning_hinm" not in own
    assert {name.split(".")[0] for name in own} - {module} <= ALLOWED[module]


@pytest.mark.parametrize("module", module_names())
def test_a_third_party_package_is_imported_only_where_it_may_live(module: str) -> None:
    offenders = {
        (name, package)
        for name in imports_of(module)
        for package, homes in ONLY_IN.items()
        if is_within(name, package) and module not in homes
    }
    assert not offenders


def test_the_table_has_no_cycle() -> None:
    inside = {name: set(row) for name, row in ALLOWED.items() if not name.startswith("__")}
    while inside:
        ready = {name for name, row in inside.items() if not row & set(inside)}
        assert ready, f"these import each other: {sorted(inside)}"
        inside = {name: row for name, row in inside.items() if name not in ready}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import scipy.optimize as o", {"scipy.optimize"}),
        ("from .mask import hinm_mask", {"lightning_hinm.mask.hinm_mask"}),
        ("from . import mask", {"lightning_hinm.mask"}),
        ("def f():\n    from torch import fx", {"torch.fx"}),
        ("import importlib\nimportlib.import_module('.mask', __package__)", {"importlib", "lightning_hinm.mask"}),
    ],
)
def test_imports_are_found_in_every_form_and_at_every_depth(source: str, expected: set[str]) -> None:
    assert imported_names(source) == expected


def test_importing_the_package_loads_nothing_heavy_and_starts_no_cuda() -> None:
    # What torch itself brings along (with some builds, the CUDA bindings) is not counted.
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import lightning_hinm\n"
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        f"print(loaded & {HEAVY})\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (result.returncode, result.stdout.strip()) == (0, "set()"), result.stderr
