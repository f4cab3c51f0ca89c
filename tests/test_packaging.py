"""A wheel, an editable install and a bare checkout bring everything, and shadow nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "fastperturb", "kernels", "csrc")
LEFT_OUT = shutil.ignore_patterns("__pycache__")
CACHES = shutil.ignore_patterns(
    ".*_cache", ".hypothesis", ".benchmarks", "__pycache__", "*.egg-info"
)
PRODUCTS = {".git", ".venv", "build", "dist", "site", "runs"}  # at the root only


# Run in another process: what of FastPerturb it finds there, and where.
PROBE = """
import importlib.util, json
from importlib import resources
import fastperturb, fastperturb.kernels

def files(package):
    return sorted(file.name for file in resources.files(package).iterdir() if file.is_file())

kernels = files("fastperturb.kernels")
print(json.dumps({
    "home": fastperturb.__file__,
    "version": fastperturb.__version__,
    "kernels": kernels,
    "importable": [importlib.util.find_spec(f"fastperturb.kernels.{name[:-3]}") is not None
                   for name in kernels if name.endswith(".py")],
    "csrc": files("fastperturb.csrc"),
}))
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: object, cwd: Path) -> None:
    run(sys.executable, "-m", "pip", *arguments, "--quiet", cwd=cwd)


def names(folder: str) -> list[str]:
    return sorted(file.name for file in (ROOT / folder).iterdir() if file.is_file())


def assert_complete(found: dict, home: Path) -> None:
    assert Path(found["home"]).resolve().is_relative_to(home.resolve())
    assert found["kernels"] == names("kernels") != []
    assert all(found["importable"])
    assert found["csrc"] == names("csrc") != []


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the sources: a build leaves its products beside them."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=LEFT_OUT)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, checkout, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_is_pure_python_and_carries_the_one_version(wheel: Path) -> None:
    from fastperturb.version import __version__

    assert wheel.name == f"fastperturb-{__version__}-py3-none-any.whl"


def test_an_installed_wheel_has_every_kernel_and_every_cpp_source(
    wheel: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    pip("install", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    found = json.loads(run(sys.executable, "-c", PROBE, cwd=tmp_path, PYTHONPATH=str(target)))
    assert_complete(found, target)


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of a copy of the whole repository."""

    def ignored(folder: str, names: list[str]) -> set[str]:
        products = PRODUCTS if Path(folder) == ROOT else set()
        return CACHES(folder, names) | products.intersection(names)

    copy = tmp_path_factory.mktemp("repository") / "copy"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    code = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    name = run(sys.executable, "-c", code, cwd=copy).splitlines()[-1]
    return copy / "dist" / name


def test_a_source_distribution_holds_the_repository(source_distribution: Path) -> None:
    with tarfile.open(source_distribution) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    copy = source_distribution.parents[1]
    files = {str(file.relative_to(copy)) for file in copy.rglob("*") if file.is_file()}
    missing = {name for name in files - inside if not name.startswith(("dist/", "fastperturb.egg"))}
    assert missing <= {".gitignore"}


def test_a_source_distribution_builds_the_wheel_of_the_checkout(
    source_distribution: Path, wheel: Path, tmp_path: Path
) -> None:
    pip(
        *("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source_distribution),
        cwd=tmp_path,
    )
    (built,) = tmp_path.glob("*.whl")
    assert built.name == wheel.name
    assert sorted(zipfile.ZipFile(built).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_an_editable_install_has_every_kernel_and_every_cpp_source(
    checkout: Path, tmp_path: Path
) -> None:
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    # Third parties come from the environment that runs the tests.
    Path(site.strip(), "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # The outer environment may hold an install of ours, which is not to be touched.
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    pip("--python", python, "install", *options, "--editable", checkout, cwd=tmp_path)
    found = json.loads(run(python, "-c", PROBE, cwd=tmp_path))
    assert_complete(found, checkout)


def test_a_bare_checkout_on_the_path_has_every_kernel_and_every_cpp_source(tmp_path: Path) -> None:
    found = json.loads(run(sys.executable, "-c", PROBE, cwd=tmp_path, PYTHONPATH=str(ROOT)))
    assert_complete(found, ROOT)


def test_a_package_called_kernels_is_not_shadowed_in_the_repo_root(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("owner = 'somebody else'\n")
    code = "import sys, kernels; print(sys.path[0] == '', kernels.owner)"
    printed = run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert printed == "True somebody else\n"


def test_importing_everything_public_leaves_the_command_lines_and_extras_packages_alone(
    tmp_path: Path,
) -> None:
    code = (  # what transformers loads by itself depends on what else is installed
        "import json, sys, transformers.modeling_utils; before = set(sys.modules); "
        "from fastperturb import *; print(json.dumps(list(set(sys.modules) - before)))"
    )
    imported = json.loads(run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT)))
    assert "fastperturb.model" in imported
    assert not {"matplotlib", "rich", "tyro", "datasets", "peft"} & set(imported)


def test_a_bare_make_says_what_each_target_does() -> None:
    phony = re.search(r"^\.PHONY: help (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    described = dict(
        line.removeprefix("make ").split(None, 1)
        for line in run("make", "--no-print-directory", cwd=ROOT, MAKEFLAGS="").splitlines()
    )
    assert list(described) == phony[1].split()
    assert set(described) >= {"demo", "test", "lint", "docs", "docs-check", "bench", "gpu", "clean"}


def test_make_names_the_python_that_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9)\n$2"\n'
    )
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "lint", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        env=os.environ | {"MAKEFLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "needs Python 3.11" in done.stderr
    assert not (tmp_path / "venv").exists()
