"""Checks of the installed packages, which depend on each other in ways that pip does not know."""

import ctypes
import importlib.metadata as metadata
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from tools.checks.check import INSTALL, Case, CheckList, Finding, fail, ok, sees_gpu, skip, warn

PROJECT = "multicrop-hjepa"
# By DALI package: its decoder, CUDA's major version, and the package of a library that pip does not install with it.
FLAVOURS = {
    "nvidia-dali-cuda120": ("nvidia-nvimgcodec-cu12", 12, "nvidia-npp-cu12"),
    "nvidia-dali-cuda130": ("nvidia-nvimgcodec-cu13", 13, "nvidia-npp"),
}


def installed(name: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def unmet(name: str, dependency: str | None = None, extra: str = "") -> list[str]:
    """Return the unmet requirements of the package `name`; only those on `dependency`, if it is given."""
    problems = []
    for line in metadata.requires(name) or []:
        need = Requirement(line)
        if (dependency and need.name != dependency) or (need.marker and not need.marker.evaluate({"extra": extra})):
            continue
        version = installed(need.name)
        if version is None:
            problems.append(f"{need.name} is missing")
        elif not need.specifier.contains(Version(version).public, prereleases=True):
            problems.append(f"{need.name} is {version}, {name} needs {need.specifier}")
    return problems


def flavour() -> str | None:
    """Return the installed DALI, the first of two."""
    return next((name for name in FLAVOURS if installed(name)), None)


def check_packages(_: Case) -> Finding:
    python = ".".join(map(str, sys.version_info[:3]))
    if installed(PROJECT) is None:
        return fail("the project is not installed", "pip install --no-deps --no-build-isolation -e .")
    extra = (flavour() or "").rpartition("-")[2]  # the extra of the installed DALI
    if problems := unmet(PROJECT, extra=extra) + unmet("torchvision", "torch"):
        return fail("; ".join(problems), INSTALL)
    try:
        import torchvision.ops  # noqa: F401  # fails if torchvision was built for another torch
    except (ImportError, RuntimeError, AttributeError) as error:
        return fail(f"torchvision {installed('torchvision')} does not load: {error}", INSTALL)
    return ok(f"{PROJECT} {installed(PROJECT)} and its requirements: Python {python}, torch {installed('torch')}")


def check_dali(case: Case) -> Finding:
    both = [name for name in FLAVOURS if installed(name)]
    if not both:
        return fail("no DALI is installed", f"{INSTALL}, or pip install -e '.[cuda130]'")
    if len(both) > 1:
        fix = f"pip uninstall --yes {' '.join(both)}, then install one: {INSTALL}, or pip install -e '.[cuda130]'"
        return fail(f"{' and '.join(both)} are both installed and overwrite each other's files", fix)
    name, (codec, cuda, npp) = both[0], FLAVOURS[both[0]]
    if problems := unmet(name, codec):
        return fail(f"DALI {installed(name)} crashes with another decoder: {problems[0]}", INSTALL)
    # DALI opens these by name on first use, so nothing notices earlier that they are missing.
    libraries = [f"libnpp{part}.so.{cuda}" for part in ("c", "icc", "ig")]
    libraries += [f"libnvjpeg.so.{cuda}", "libnvcomp.so.5", "libnvimgcodec.so.0"]
    missing = [library for library in libraries if not library_exists(library, packages_folder())]
    if missing:
        fix = f"pip install {npp}" if all("npp" in library for library in missing) else INSTALL
        text = f"{', '.join(missing)} not found: the first batch on a GPU would fail"
        return (fail if sees_gpu() or case.needs_gpu else warn)(text, fix)
    import nvidia.dali

    return ok(f"{name} {nvidia.dali.__version__}, {codec} {installed(codec)}, and {len(libraries)} libraries")


def packages_folder() -> Path:
    """Return the folder `nvidia`, in which DALI and its libraries are installed side by side."""
    spec = find_spec("nvidia.dali") if find_spec("nvidia") else None
    return Path(spec.origin).parents[1] if spec is not None and spec.origin is not None else Path("nvidia")


def library_exists(library: str, folder: Path) -> bool:
    """Return True if the library is in `folder`, where DALI's run path looks, or where the system's loader does."""
    if any(any(folder.glob(f"{place}/{library}")) for place in ("*/lib", "*/lib64", "nvimgcodec")):
        return True
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def check_compiler(case: Case) -> Finding:
    if case.config is None or not case.config.training.compile:
        return skip("training.compile is false")
    if compiler := next(filter(None, map(shutil.which, ("g++", "clang++", "gcc", "clang"))), None):
        return ok(f"{compiler}, for training.compile=true")
    fix = "apt-get install g++ (in the image: --build-arg EXTRA_PACKAGES=g++), or training.compile=false"
    return fail("training.compile=true needs a C compiler, and there is none", fix)


PACKAGE_CHECKS: CheckList = (
    ("packages", check_packages),
    ("DALI and nvImageCodec", check_dali),
    ("compiler", check_compiler),
)
