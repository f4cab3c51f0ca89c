"""The C++ kernels' library: built on first use, cached, loaded.

The sources in `csrc/` use torch's stable ABI, so one text serves every torch from 2.10 on. They
are compiled by ninja in a few seconds and cached for the user under a name that hashes the
sources, the flags, the compiler, torch and the CPU. The ninja file is our own:
`torch.utils.cpp_extension.load` needs ninja on the PATH, where pip does not put it, needs
setuptools, and leaves a lock behind when the process that builds is killed.

`FASTPERTURB_EXT=1` (the default) falls back to torch with one warning where the library cannot be
built, `0` never builds it, `require` makes a failure an error.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import torch

MODES = ("0", "1", "require")

_FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
# The compilers' own choice is half as wide on many CPUs with AVX-512.
_FLAGS_X86 = ("-mprefer-vector-width=512",)


def availability() -> tuple[bool, str]:
    """Tell whether the C++ kernels are to be called, and why; build nothing.

    A library that is not built yet counts: its first use builds it. Under FASTPERTURB_EXT=require
    the answer is always yes, so that a failure is an error.
    """
    mode = _mode()
    if mode == "0":
        return False, "switched off by FASTPERTURB_EXT=0"
    if _load.cache_info().currsize:
        failure = _load()
    else:
        try:
            built = _intact(_cache_file(compiler_command()))
            return True, "built" if built else "not built yet: builds on first use"
        except (OSError, RuntimeError) as error:
            failure = str(error)
    return not failure or mode == "require", failure or "built"


def prepare() -> bool:
    """Build and load the library if need be; return whether its kernels can be called.

    If they cannot, warn once, or raise under FASTPERTURB_EXT=require.
    """
    mode = _mode()
    if mode == "0":
        return False
    failure = _load()
    if failure and mode == "require":
        raise RuntimeError(f"FASTPERTURB_EXT=require, but the C++ kernels cannot run: {failure}")
    if failure:
        _warn(failure)
    return not failure


def _mode() -> str:
    mode = os.environ.get("FASTPERTURB_EXT", "1")
    if mode not in MODES:
        raise ValueError(f"FASTPERTURB_EXT must be one of {MODES}, got {mode!r}")
    return mode


@functools.cache
def _warn(failure: str) -> None:
    message = f"the C++ kernels cannot run, torch runs instead and is slower: {failure}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)


@functools.cache
def _load() -> str:
    """Load the library, building it if need be; return "" or the error in a line."""
    try:
        compiler = compiler_command()
        library = _cache_file(compiler)
        if not _intact(library):
            with _lock(library.with_suffix(".lock")):
                # Another process may have built it while this one waited.
                if not _intact(library):
                    _build(compiler, library)
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return str(error)
    return ""


@functools.cache
def _sources() -> dict[str, bytes]:
    files = resources.files("fastperturb.csrc").iterdir()
    return {
        file.name: file.read_bytes()
        for file in sorted(files, key=lambda file: file.name)
        if file.name.endswith((".cpp", ".h"))
    }


def compiler_command() -> list[str]:
    """Return the C++ compiler: CXX, or the first of the usual names; raise if there is none."""
    return _find_compiler(os.environ.get("CXX"), os.environ.get("PATH"))


@functools.cache
def _find_compiler(chosen: str | None, path: str | None) -> list[str]:
    if sys.platform == "win32":
        raise RuntimeError("the C++ kernels are not built on Windows")
    commands = [shlex.split(chosen)] if chosen else [["c++"], ["g++"], ["clang++"]]
    for command in commands:
        if command and shutil.which(command[0], path=path):
            return command
    remedy = f"CXX is {chosen}" if chosen else "install g++ or clang++, or set CXX"
    raise RuntimeError(f"no C++ compiler found ({remedy})")


def _flags() -> list[str]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    include = Path(torch.__file__).parent / "include"
    return [*_FLAGS, *(_FLAGS_X86 if x86 else ()), "-isystem", str(include)]


def _cache_file(compiler: list[str]) -> Path:
    """Return the path of the library for these sources, flags, compiler, torch and CPU."""
    digest = hashlib.sha256()
    for name, text in _sources().items():
        digest.update(f"{name} {len(text)} ".encode() + text)
    for fact in (*_flags(), _version(tuple(compiler)), torch.__version__, _cpu()):
        digest.update(fact.encode() + b"\0")
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    root = Path(folder) if folder else Path.home() / ".cache"
    return root / "fastperturb" / f"fastperturb_cpp-{digest.hexdigest()[:20]}.so"


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    done = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"no C++ compiler found ({shlex.join(compiler)} --version fails)")
    return f"{shlex.join(compiler)}\n{done.stdout}"


@functools.cache
def _cpu() -> str:
    """Return the facts that -march=native depends on: CPUs that agree in them share a library."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kinds = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part")
    facts = (line for line in lines if line.split(":")[0].strip() in kinds)
    return "\n".join(dict.fromkeys(facts))


def _intact(library: Path) -> bool:
    """Tell whether the file exists and ends in the digest of all that precedes it."""
    if not library.exists():
        return False
    content = library.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that one process has at a time, and that a dying process releases."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(compiler: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        folder = Path(name)
        for source, text in _sources().items():
            (folder / source).write_bytes(text)
        (folder / "build.ninja").write_text(_ninja_file(compiler))
        done = subprocess.run(
            [ninja_command(), "-C", name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            lines = done.stdout.splitlines()
            errors = [line for line in lines if "error" in line] or lines[-1:]
            raise RuntimeError(f"build failed: {errors[0] if errors else 'ninja printed nothing'}")
        built = folder / "library.so"
        content = built.read_bytes()
        # The loader ignores bytes after the ELF sections, so the digest can be in the file.
        built.write_bytes(content + hashlib.sha256(content).digest())
        built.replace(library)


def ninja_command() -> str:
    """Return the path of ninja, from its Python package or the PATH; raise if there is none."""
    with contextlib.suppress(ImportError):
        import ninja

        path = os.pathsep.join([os.environ.get("PATH", os.defpath), ninja.BIN_DIR])
        if command := shutil.which("ninja", path=path):
            return command
    if command := shutil.which("ninja"):
        return command
    raise RuntimeError("ninja not found (pip install ninja)")


def _ninja_file(compiler: list[str]) -> str:
    units = [name for name in _sources() if name.endswith(".cpp")]
    objects = [name.replace(".cpp", ".o") for name in units]
    libraries = ["-L" + str(Path(torch.__file__).parent / "lib"), "-ltorch_cpu"]

    def command(*arguments: str) -> str:
        return shlex.join(arguments).replace("$", "$$")

    return "\n".join(
        [
            "rule compile",
            f"  command = {command(*compiler, *_flags(), '-c')} $in -o $out",
            "rule link",
            f"  command = {command(*compiler, '-shared')} $in {command(*libraries)} -o $out",
            *(f"build {o}: compile {unit}" for o, unit in zip(objects, units, strict=True)),
            f"build library.so: link {' '.join(objects)}",
            "default library.so",
            "",
        ]
    )
