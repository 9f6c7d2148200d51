"""Checks of the installed packages, which depend on each other in ways that pip does not know."""

import importlib.metadata as metadata
import platform

from packaging.requirements import Requirement
from packaging.version import Version

from tools.checks.check import INSTALL, Case, Finding, fail, ok

PROJECT = "multicrop-hjepa"
FLAVOURS = {"nvidia-dali-cuda120": 12, "nvidia-dali-cuda130": 13}  # CUDA's major version


def installed(name: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def installed_dalis() -> list[str]:
    return [name for name in FLAVOURS if installed(name)]


def unmet(name: str, *extras: str) -> list[str]:
    """Return the unmet requirements of a package and of all that it requires, with the extras, which `pip check` leaves out."""
    problems, waiting, seen = [], [(name, extra) for extra in ("", *extras)], set()
    while waiting:
        seen.add(pair := waiting.pop())
        for need in map(Requirement, metadata.requires(pair[0]) or []):
            if need.marker and not need.marker.evaluate({"extra": pair[1]}):
                continue
            version = installed(need.name)
            if version is None or not need.specifier.contains(Version(version).public, prereleases=True):
                problems.append(f"{need.name} is {version or 'missing'}, {pair[0]} needs {need.specifier}")
            if version is not None:
                waiting += [(need.name, extra) for extra in ("", *need.extras) if (need.name, extra) not in seen]
    return list(dict.fromkeys(problems))


def check_packages(_: Case) -> Finding:
    if installed(PROJECT) is None:
        return fail("the project is not installed", "pip install --no-deps --no-build-isolation -e .")
    if problems := unmet(PROJECT, *(name.rpartition("-")[2] for name in installed_dalis()[:1])):
        return fail("; ".join(problems), INSTALL)
    import torchvision.ops  # noqa: F401  # fails if torchvision was built for another torch

    versions = f"Python {platform.python_version()}, torch {installed('torch')}"
    return ok(f"{PROJECT} {installed(PROJECT)} and its requirements: {versions}")


def check_dali(_: Case) -> Finding:
    names = installed_dalis()
    if len(names) != 1:
        text = f"{' and '.join(names)} overwrite each other's files" if names else "no DALI is installed"
        remove = f"pip uninstall --yes {' '.join(names)}, then " if names else ""
        return fail(text, f"{remove}{INSTALL}, or pip install -e '.[cuda130]'")
    dali, codec = (f"{name} {installed(name)}" for name in (names[0], f"nvidia-nvimgcodec-cu{FLAVOURS[names[0]]}"))
    if problems := unmet(names[0]):
        return fail(f"{dali} fails or crashes with other packages: {'; '.join(problems)}", INSTALL)
    return ok(f"{dali}, {codec}")
