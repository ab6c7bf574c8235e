"""What reports of several commands say in the same way: durations, and the versions that a result depends on."""

import platform
from importlib.metadata import PackageNotFoundError, version


def duration(seconds: float) -> str:
    """Such as 3.2 s, 75 s, 40 min or 2.5 h."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of packages; `missing` if one is not installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # also a checkout on PYTHONPATH
            found[name] = "missing"
    return found
