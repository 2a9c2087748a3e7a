"""The control groups of Linux that hold a process to a share of the machine, as containers do."""

from pathlib import Path

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def control_groups(controller: str) -> list[Path]:
    """Folders of the control groups that this process is in, those above them too, whose limits it shares: of version
    2, and of version 1's `controller`. The roots alone where the system says no more, as inside many containers."""
    roots = {"": CGROUPS, controller: CGROUPS / controller}
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        lines = []
    folders = [*roots.values()]
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") > 1):
        for root in {roots[name] for name in controllers.split(",") if name in roots}:
            own = root / path.lstrip("/")
            folders += [folder for folder in (own, *own.parents) if root in folder.parents]
    return folders
