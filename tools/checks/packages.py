"""Checks of what is installed: Python, and the packages that depend on each other."""

import ctypes
import importlib.metadata as metadata
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from tools.checks.check import LOCKED, Case, Finding, check, fail, ok, sees_gpu, skipped, warn

OLDEST_PYTHON = (3, 11)
# Of each DALI: its decoder, the major version of CUDA, and the package of the library that pip does not install with it.
CUDA_12 = "nvidia-dali-cuda120"
FLAVOURS = {
    CUDA_12: ("nvidia-nvimgcodec-cu12", 12, "nvidia-npp-cu12"),
    "nvidia-dali-cuda130": ("nvidia-nvimgcodec-cu13", 13, "nvidia-npp"),
}


def installed(name: str) -> str | None:
    """The version of a package, None when it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def unmet(name: str, wanted: str | None = None, extra: str = "") -> list[str]:
    """Requirements of the package `name` that are not met; only those on `wanted` if given."""
    problems = []
    for line in metadata.requires(name) or []:
        need = Requirement(line)
        if (wanted and need.name != wanted) or (need.marker and not need.marker.evaluate({"extra": extra})):
            continue
        found = installed(need.name)
        if found is None:
            problems.append(f"{need.name} is missing")
        elif not need.specifier.contains(Version(found).public, prereleases=True):
            problems.append(f"{need.name} is {found}, {name} needs {need.specifier}")
    return problems


def flavour() -> str | None:
    """The installed DALI; the first of two."""
    return next((name for name in FLAVOURS if installed(name)), None)


@check("python")
def python(_: Case) -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        return fail(f"Python {version}, 3.11 or newer is needed", "make PYTHON=python3.11 quickstart")
    return ok(f"Python {version}, {sys.executable}")


@check("packages")
def packages(_: Case) -> Finding:
    if installed("multicrop-hjepa") is None:
        return fail("the project is not installed", "pip install --no-deps --no-build-isolation -e .")
    extra = (flavour() or "").rpartition("-")[2]  # of the DALI that is installed
    if problems := unmet("multicrop-hjepa", extra=extra):
        return fail("; ".join(problems), LOCKED)
    return ok(f"multicrop-hjepa {installed('multicrop-hjepa')} and all its requirements")


@check("torch and torchvision")
def torch_pair(_: Case) -> Finding:
    torch_version, vision_version = installed("torch"), installed("torchvision")
    if not torch_version or not vision_version:
        return fail(f"torch {torch_version}, torchvision {vision_version}: both are needed", LOCKED)
    if problems := unmet("torchvision", "torch"):
        return fail(f"torchvision {vision_version} is of another release: {problems[0]}", LOCKED)
    try:
        import torchvision.ops  # a torchvision built for another torch fails here, by an operator it cannot register
    except (ImportError, RuntimeError, AttributeError) as error:
        return fail(f"torchvision {vision_version} does not load with torch {torch_version}: {error}", LOCKED)
    return ok(f"torch {torch_version}, torchvision {torchvision.__version__}")


@check("DALI and nvImageCodec")
def dali_pair(_: Case) -> Finding:
    both = [name for name in FLAVOURS if installed(name)]
    if not both:
        return fail("no DALI is installed", f"{LOCKED}, or pip install -e '.[cuda130]'")
    if len(both) > 1:
        fix = f"pip uninstall --yes {' '.join(both)}, then install one: {LOCKED}, or pip install -e '.[cuda130]'"
        return fail(f"{' and '.join(both)} are both installed and overwrite each other's files", fix)
    codec = FLAVOURS[both[0]][0]
    if problems := unmet(both[0], codec):
        return fail(f"DALI {installed(both[0])} crashes with another decoder: {problems[0]}", LOCKED)
    import nvidia.dali

    return ok(f"{both[0]} {nvidia.dali.__version__}, {codec} {installed(codec)}")


def opened_by_name(cuda: int) -> list[str]:
    """The libraries that DALI opens by name on first use: nothing notices earlier that they are missing."""
    npp = [f"libnpp{part}.so.{cuda}" for part in ("c", "icc", "ig")]
    return [*npp, f"libnvjpeg.so.{cuda}", "libnvcomp.so.5", "libnvimgcodec.so.0"]


def packages_folder() -> Path:
    """The folder `nvidia`, in which DALI and its libraries lie side by side."""
    spec = find_spec("nvidia.dali") if find_spec("nvidia") else None
    return Path(spec.origin).parents[1] if spec is not None and spec.origin is not None else Path("nvidia")


def is_found(library: str, folder: Path) -> bool:
    """In `folder`, where DALI's run path looks, or wherever the system's loader does."""
    if any(any(folder.glob(f"{place}/{library}")) for place in ("*/lib", "*/lib64", "nvimgcodec")):
        return True
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


@check("libnpp and other libraries")
def libraries(case: Case) -> Finding:
    name = flavour()
    if name is None:
        return skipped("no DALI")
    _, cuda, package = FLAVOURS[name]
    wanted = opened_by_name(cuda)
    missing = [library for library in wanted if not is_found(library, packages_folder())]
    if not missing:
        return ok(f"{len(wanted)} libraries that {name} opens by name")
    fix = f"pip install {package}" if all("npp" in library for library in missing) else LOCKED
    text = f"{', '.join(missing)} not found: the first batch on a GPU would fail"
    return (fail if sees_gpu() or case.needs_gpu else warn)(text, fix)


@check("compiler")
def compiler(case: Case) -> Finding:
    found = next((path for name in ("g++", "clang++", "gcc", "clang") if (path := shutil.which(name))), None)
    if found:
        return ok(f"{found}, for training.compile=true")
    if not case.compiles:
        return ok("none, and none is needed: training.compile is false")
    fix = "apt-get install g++ (in the image: --build-arg EXTRA_PACKAGES=g++), or training.compile=false"
    return fail("training.compile=true needs a C compiler, and there is none", fix)
