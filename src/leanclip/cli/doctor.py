"""`leanclip doctor`: the machine, and which of leanclip's dependencies are installed."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version

from leanclip.report.text import count


def diagnose() -> str:
    """A table of the machine and the packages, with commands that install missing ones."""
    lines = [
        f"leanclip {version('leanclip')}, Python {platform.python_version()}, "
        f"{platform.platform()}",
        f"devices: {_devices()}",
        "",
    ]
    missing: dict[str, list[str]] = {}
    for extra, name in _requirements():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "missing"
            missing.setdefault(extra, []).append(name)
        lines.append(f"{f'[{extra}]' if extra else 'required':14} {name:14} {found}")
    lines.append("")
    for extra, names in missing.items():
        project = f"'.[{extra}]'" if extra else "."
        lines.append(
            f"install {', '.join(names)} with: pip install -c constraints.txt -e {project}"
        )
    return "\n".join(lines if missing else [*lines, "nothing is missing"])


def _requirements() -> list[tuple[str, str]]:
    """(extra or "", package) of every requirement in leanclip's metadata."""
    found = []
    for text in requires("leanclip") or []:
        name = re.match(r"[\w.-]+", text)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", text)
        assert name, text
        found.append((extra[1] if extra else "", name[0]))
    return found


def _devices() -> str:
    cores = count(os.cpu_count() or 1, "CPU core")
    try:
        import torch
    except ImportError:
        return f"{cores}; GPUs unknown, as torch is missing"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join((f"{cores} ({count(torch.get_num_threads(), 'thread')})", *gpus))
