"""Which devices a run uses."""

import torch

from leanclip.errors import ConfigError


def choose_device(name: str = "auto", num_gpus: int | None = None) -> torch.device:
    """The device of a run: "auto" is CUDA where there is a device, and the CPU elsewhere.

    Args:
        name: "auto", "cpu" or "cuda".
        num_gpus: as `--num-gpus`; 0 is the CPU, None is one device.

    Raises:
        ConfigError: more devices are asked for than the machine has, or than are supported.
    """
    found = torch.cuda.device_count()
    wanted = num_gpus if num_gpus is not None else int(name == "cuda")
    if wanted > found:
        has = f"has {found} CUDA device{'' if found == 1 else 's'}"
        instead = f"give --num-gpus {found}" if found else "leave --num-gpus out to use the CPU"
        asked = f"{wanted} GPU{' was' if wanted == 1 else 's were'} asked for"
        raise ConfigError(f"{asked}, this machine {has}; {instead}")
    if wanted > 1:
        raise ConfigError(
            f"--num-gpus {wanted}: training on several devices is not built yet; use --num-gpus 1"
        )
    use_cuda = wanted == 1 or (name == "auto" and num_gpus is None and found > 0)
    return torch.device("cuda" if use_cuda else "cpu")
