"""How much memory this process may have: the machine's, or what a container or the shell allows of it."""

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

# Where Linux mounts the control groups -> the file with a group's limit: of version 1, and of version 2.
_V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
_V2 = ("sys/fs/cgroup", "memory.max")


def memory_allowed(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may have at most.

    Args:
      root: where /proc and /sys lie; tests have their own.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shell, _ = resource.getrlimit(resource.RLIMIT_AS)  # ulimit -v
    return min([machine, *_limits(root), *([] if shell == resource.RLIM_INFINITY else [shell])])


def _limits(root: Path) -> Iterator[int]:
    """The limits of the control groups that this process is in, each of them inside the one before it."""
    for mount, file, group in _groups(root):
        # Inside a container the group may be named as the host sees it; then the mount itself is this group.
        for name in (group, *group.parents):
            with suppress(OSError, ValueError):  # no such folder here; "max", which is no limit
                yield int((root / mount / name.relative_to("/") / file).read_text())


def _groups(root: Path) -> Iterator[tuple[str, str, PurePosixPath]]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux, or no control groups
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            mount, file = _V1 if controllers else _V2
            yield mount, file, PurePosixPath(group)
