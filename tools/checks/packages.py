"""Checks of the installed packages, which depend on each other in ways that pip does not know."""

import ctypes
import importlib.metadata as metadata
import platform
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from tools.checks.check import INSTALL, Case, Finding, fail, ok, sees_gpu, warn

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


def installed_dalis() -> list[str]:
    return [name for name in FLAVOURS if installed(name)]


def check_packages(_: Case) -> Finding:
    if installed(PROJECT) is None:
        return fail("the project is not installed", "pip install --no-deps --no-build-isolation -e .")
    extra = "".join(installed_dalis()[:1]).rpartition("-")[2]  # the extra of the installed DALI
    if problems := unmet(PROJECT, extra=extra) + unmet("torchvision", "torch"):
        return fail("; ".join(problems), INSTALL)
    import torchvision.ops  # noqa: F401  # fails if torchvision was built for another torch

    versions = f"Python {platform.python_version()}, torch {installed('torch')}"
    return ok(f"{PROJECT} {installed(PROJECT)} and its requirements: {versions}")


def check_dali(case: Case) -> Finding:
    names = installed_dalis()
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
    if missing := [library for library in libraries if not library_exists(library)]:
        text = f"{', '.join(missing)} not found: the first batch on a GPU would fail"
        return (fail if sees_gpu() or case.needs_gpu else warn)(text, INSTALL)
    return ok(f"{names[0]} {installed(names[0])}, {codec} {installed(codec)}, and {len(libraries)} libraries")


def library_exists(library: str, folder: Path | None = None) -> bool:
    """Return True if the library is in `folder`, by default that of DALI's packages, or where the system's loader looks."""
    folder = folder or Path(find_spec("nvidia.dali").origin).parents[1]  # type: ignore[union-attr,arg-type]
    is_found = any(any(folder.glob(f"{place}/{library}")) for place in ("*/lib", "*/lib64", "nvimgcodec"))
    with suppress(OSError):
        is_found = is_found or bool(ctypes.CDLL(library))
    return is_found
