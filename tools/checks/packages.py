"""Checks of the installed packages, which depend on each other in ways that pip does not know."""

import ctypes
import importlib.metadata as metadata
import sys
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from tools.checks.check import INSTALL, Case, Check, Finding, fail, ok, sees_gpu, warn

PROJECT = "multicrop-hjepa"
# By DALI package: its decoder and CUDA's major version.
FLAVOURS = {"nvidia-dali-cuda120": ("nvidia-nvimgcodec-cu12", 12), "nvidia-dali-cuda130": ("nvidia-nvimgcodec-cu13", 13)}


def installed(name: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def unmet(name: str, dependency: str | None = None, extra: str = "") -> list[str]:
    """Return the unmet requirements of the package `name`; only those on `dependency`, if it is given."""
    problems = []
    for need in map(Requirement, metadata.requires(name) or []):
        if (dependency and need.name != dependency) or (need.marker and not need.marker.evaluate({"extra": extra})):
            continue
        version = installed(need.name)
        if version is None or not need.specifier.contains(Version(version).public, prereleases=True):
            problems.append(f"{need.name} is {version or 'missing'}, {name} needs {need.specifier}")
    return problems


def flavour() -> str | None:
    """Return the installed DALI, the first of two."""
    return next((name for name in FLAVOURS if installed(name)), None)


def check_packages(_: Case) -> Finding:
    if installed(PROJECT) is None:
        return fail("the project is not installed", "pip install --no-deps --no-build-isolation -e .")
    extra = (flavour() or "").rpartition("-")[2]  # the extra of the installed DALI
    if problems := unmet(PROJECT, extra=extra) + unmet("torchvision", "torch"):
        return fail("; ".join(problems), INSTALL)
    import torchvision.ops  # noqa: F401  # fails if torchvision was built for another torch

    python = ".".join(map(str, sys.version_info[:3]))
    return ok(f"{PROJECT} {installed(PROJECT)} and its requirements: Python {python}, torch {installed('torch')}")


def check_dali(case: Case) -> Finding:
    names = [name for name in FLAVOURS if installed(name)]
    if len(names) != 1:
        text = f"{' and '.join(names)} overwrite each other's files" if names else "no DALI is installed"
        remove = f"pip uninstall --yes {' '.join(names)}, then " if names else ""
        return fail(text, f"{remove}{INSTALL}, or pip install -e '.[cuda130]'")
    codec, cuda = FLAVOURS[names[0]]
    if problems := unmet(names[0], codec):
        return fail(f"DALI {installed(names[0])} crashes with another decoder: {problems[0]}", INSTALL)
    # DALI opens these by name on first use, so nothing notices earlier that they are missing.
    libraries = [f"lib{name}.so.{cuda}" for name in ("nppc", "nppicc", "nppig", "nvjpeg")]
    libraries += ["libnvcomp.so.5", "libnvimgcodec.so.0"]
    if missing := [library for library in libraries if not library_exists(library, packages_folder())]:
        text = f"{', '.join(missing)} not found: the first batch on a GPU would fail"
        return (fail if sees_gpu() or case.needs_gpu else warn)(text, INSTALL)
    return ok(f"{names[0]} {installed(names[0])}, {codec} {installed(codec)}, and {len(libraries)} libraries")


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


PACKAGE_CHECKS = {"packages": Check(check_packages), "DALI and nvImageCodec": Check(check_dali)}
