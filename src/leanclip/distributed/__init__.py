"""Devices, process groups, collectives, model wrapping and launching."""

import os


def world_size() -> int:
    """The number of ranks, from the launcher's environment; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank() -> bool:
    """Whether this process is one of several ranks."""
    return world_size() > 1


def rank() -> int:
    """The rank of this process, from the launcher's environment; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))
