"""Compile a kernel for this machine, once, and load it.

A shared object is code, so it is only ever loaded from a directory that belongs to this user and that nobody else may
write to, or swap for another one; or from where the system's libraries are. An image that has no compiler has the
kernels there, made by `python build.py DIRECTORY`, and the system's loader takes those for the best level of x86-64
that the CPU has.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Without -ffinite-math-only NaN stays NaN, which is how a broken request is told from its neighbours.
_FLAGS = ("-O3", "-ffast-math", "-fno-finite-math-only", "-fopenmp", "-shared", "-fPIC", "-std=gnu11")
# OpenMP and libm are already in the process, torch's: with a second OpenMP two pools of threads would fight for cores.
_LINK = ("-nostdlib",)
_NATIVE = "native"
# Levels of x86-64 whose vectors are worth it: AVX2, AVX-512. Of processors below the first there are few.
_LEVELS = ("x86-64-v3", "x86-64-v4")
_SECONDS = 60.0
# Lines of /proc/cpuinfo that tell what -march=native means, on x86 and on ARM.
_CPU = ("model name", "flags", "Features", "CPU implementer", "CPU part")


class NoCompiler(Exception):
    """The kernel cannot be had here; the message says why."""


def cache_directory() -> Path | None:
    """Where what was found out or made on this machine is kept; None: this user has no home."""
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "baton"
    with contextlib.suppress(RuntimeError):
        return Path.home() / ".cache" / "baton"
    return None


def library(source: Path) -> ctypes.CDLL:
    """The compiled form of a C file.

    Raises:
        NoCompiler: there is none, or it fails.
    """
    with contextlib.suppress(OSError):
        return ctypes.CDLL(_installed_name(source))
    compiler = _compiler()
    name = f"{source.stem}-{_digest(source, compiler, *_machine())}.so"
    cache = cache_directory()
    directory = _private(cache / "kernels") if cache is not None else None
    if directory is None:
        try:
            with tempfile.TemporaryDirectory() as scratch:
                return _load(_compile(compiler, source, Path(scratch) / name))
        except OSError as error:
            raise NoCompiler(f"no directory to compile in: {error}") from error
    path = directory / name
    if path.is_file():
        with contextlib.suppress(NoCompiler):  # a file that was cut short is made again
            return _load(path)
    return _load(_compile(compiler, source, path))


def install(directory: Path) -> None:
    """Compile all kernels for machines of any kind, into directories that the loader knows (glibc-hwcaps).

    Args:
        directory: one that the loader looks into. On other machines than x86-64 nothing is put there.

    Raises:
        NoCompiler: there is none, or it fails.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for level in _LEVELS if platform.machine() == "x86_64" else ():
        place = directory / "glibc-hwcaps" / level
        place.mkdir(parents=True, exist_ok=True)
        for source in sorted(Path(__file__).parent.glob("*.c")):
            _compile(_compiler(), source, place / _installed_name(source), level)


def _compiler() -> str:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NoCompiler("no C compiler")
    return compiler


def _installed_name(source: Path) -> str:
    return f"libbaton-{source.stem}-{_digest(source)}.so"


def _compile(compiler: str, source: Path, path: Path, machine: str = _NATIVE) -> Path:
    # Not the process's number: in another container that shares the directory, another one may have the same.
    part = path.with_suffix(f".{secrets.token_hex(8)}")
    command = [*compiler.split(), f"-march={machine}", *_FLAGS, str(source), *_LINK, "-o", str(part)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        part.replace(path)
    except subprocess.CalledProcessError as error:
        first = (error.stderr.strip() or "no message").splitlines()[0]
        raise NoCompiler(f"{compiler} failed: {first}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoCompiler(f"{compiler}: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoCompiler(f"{path.name} cannot be loaded: {error}") from error


def _private(directory: Path) -> Path | None:
    """The directory, made if need be and without links; None if others can change what lies in it."""
    with contextlib.suppress(OSError):
        for part in (directory.parent, directory):
            part.mkdir(mode=0o700, parents=True, exist_ok=True)
        real = directory.resolve(strict=True)
        status = real.stat()
        ours = status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(real, os.W_OK)
        if ours and all(_keeps_its_entries(parent) for parent in real.parents):
            return real
    return None


def _keeps_its_entries(directory: Path) -> bool:
    """Only this user and root can put something else in the place of our directory in this one."""
    status = directory.stat()
    # In a sticky directory, as /tmp is, others can add entries, but not take away ours.
    return status.st_uid in (0, os.getuid()) and (not status.st_mode & 0o022 or bool(status.st_mode & stat.S_ISVTX))


def _digest(source: Path, *others: str) -> str:
    """Changes with everything that the result depends on: the source, how it is compiled, and the others."""
    digest = hashlib.blake2b(digest_size=12)
    for path in (source, *sorted(source.parent.glob("*.h"))):
        digest.update(path.read_bytes())
    digest.update(" ".join((*_FLAGS, *_LINK, *others)).encode())
    return digest.hexdigest()


def _machine() -> Iterator[str]:
    yield platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        yield from (line for line in lines[:40] if line.startswith(_CPU))


if __name__ == "__main__":
    install(Path(sys.argv[1]))
