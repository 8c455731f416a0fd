"""The package that setup.py describes: what the code imports is required, what is required is imported, and data files come along."""

import ast
import importlib.metadata
import pathlib
import re
import runpy
import subprocess
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def given() -> dict:
    """The arguments that setup.py calls `setup` with; setuptools itself is there only while a package is built."""
    kept = {}
    packages = [".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "seal_jax").rglob("__init__.py")]
    stand_in = types.SimpleNamespace(setup=lambda **arguments: kept.update(arguments), find_packages=lambda include: packages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools", stand_in)
        runpy.run_path(str(ROOT / "setup.py"))
    return kept


def canonical(requirement: str) -> str:
    """The name of a requirement's distribution as the index compares names."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.\-]+", requirement)[0]).lower()


def imported() -> dict[str, str]:
    """The top-level modules that the package imports, other than its own and the standard library's, with a file that does."""
    found = {}
    for path in (ROOT / "seal_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                found[name.split(".")[0]] = str(path.relative_to(ROOT))
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | {"seal_jax"}}


def extras(given) -> set[str]:
    return {canonical(r) for name, more in given["extras_require"].items() if not name.startswith(("test", "dev")) for r in more}


def test_what_is_imported_is_required_and_nothing_else(given):
    distributions = importlib.metadata.packages_distributions()
    required, optional = {canonical(r) for r in given["install_requires"]}, extras(given)
    here = {name: path for name, path in imported().items() if name in distributions}
    unknown = {name for name in imported() if name not in here} - {name.replace("-", "_") for name in optional}
    assert not unknown, unknown
    providers = {name: {canonical(d) for d in distributions[name]} for name in here}
    missing = {name: here[name] for name, who in providers.items() if not who & (required | optional)}
    assert not missing, missing
    unused = required - set().union(*providers.values())
    assert not unused, unused


def test_nothing_needs_an_extra_before_it_is_asked_for(given):
    distributions, required = importlib.metadata.packages_distributions(), {canonical(r) for r in given["install_requires"]}
    absent = [name for name in imported() if not {canonical(d) for d in distributions.get(name, ())} & required]
    assert "ray" in absent
    modules = [
        "seal_jax.cli",
        "seal_jax.rest_em.loop",
        "seal_jax.experiments.continual",
        "seal_jax.experiments.pretraining",
        "seal_jax.sweep.run",
    ]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent}))\nimport {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_data_files_and_packages_are_included(given):
    root = ROOT / "seal_jax"
    matched = {path for pattern in given["package_data"]["seal_jax"] for path in root.glob(pattern)}
    there = {path for path in root.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert there and there == matched, there ^ matched
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in root.rglob("*.py")}
    assert folders == set(given["packages"]), "a folder without __init__.py is left out of a wheel"


def test_the_command_exists(given):
    assert given["entry_points"]["console_scripts"] == ["seal-jax = seal_jax.cli:main"]
    from seal_jax.cli import main

    assert callable(main)


def test_a_folder_of_the_same_name_does_not_stand_in_for_the_package(tmp_path):
    """Such as a clone, seen from the folder above it."""
    (tmp_path / "seal_jax").mkdir()
    code = "import seal_jax; print(seal_jax.__version__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
