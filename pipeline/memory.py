"""The memory there is, and how much of it this process has used."""

import os
import resource
from contextlib import suppress
from pathlib import Path

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory_limit() -> int:
    """Return bytes: the machine's memory, or less where a cgroup (a container, a job of Slurm) allows this process less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        # Version 1 mounts a tree for each controller, version 2 one for all. Inside a container the path is often the host's: the
        # limits then lie above it, at the root of the mount. A parent's limit holds as well.
        root, name = (CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (CGROUPS, "memory.max")
        folder = root / path.strip("/")
        for place in (folder, *folder.parents):
            with suppress(OSError, ValueError):  # no such group, or `max`
                limits.append(int((place / name).read_text()))
    return min(limits)


def peak_memory() -> int:
    """Return the most bytes that this process had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
