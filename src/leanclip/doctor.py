"""What is installed: the machine, the packages, and the line that gets what is missing."""

import os
import platform
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement


def diagnose() -> str:
    """A table of the machine and of leanclip's needed and optional packages."""
    lines = [
        f"leanclip {version('leanclip')}, Python {platform.python_version()}, {platform.platform()}",
        f"CPU: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
        f"CUDA devices: {_devices()}",
        "",
    ]
    missing: dict[str, list[str]] = {}
    for text in requires("leanclip") or []:
        requirement = Requirement(text)
        extra = str(requirement.marker).partition("extra == ")[2].strip("\"'") or ""
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "missing"
            missing.setdefault(extra, []).append(requirement.name)
        label = f"[{extra}]" if extra else "needed"
        lines.append(f"{label:14} {requirement.name:14} {found}")
    lines.append("")
    for extra, names in missing.items():
        package = f"'leanclip[{extra}]'" if extra else "leanclip"
        lines.append(f"get {', '.join(names)} with: pip install -c constraints.txt {package}")
    return "\n".join(lines if missing else [*lines, "nothing is missing"])


def _devices() -> str:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names) or "none"
