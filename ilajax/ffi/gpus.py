"""What the CUDA kernels were built for, against the GPUs that are here."""

import jax

from ilajax.ffi.registry import extensions


def unfit() -> str:
    """Why the CUDA kernels as they were built cannot run on this machine's GPUs; "" if they can."""
    built = tuple(extensions["cuda"].module.architectures())
    for device in jax.devices("cuda"):
        if built and not runs_on(built, str(device.compute_capability)):
            return (
                f"The CUDA kernels were built for {', '.join(built)}, but {device.device_kind} is of compute "
                f"capability {device.compute_capability}. Install ilajax again on this machine, with nvcc."
            )
    return ""


def runs_on(built: tuple[str, ...], capability: str) -> bool:
    """Whether code for some architectures runs on a device.

    Args:
      built: as CMake names them: "90-real" is machine code, which runs on 9.0 and what is above it within 9;
        "90-virtual" is PTX, which is compiled for any device from 9.0 on; "90" is both.
      capability: such as "9.0".
    """
    device = tuple(map(int, capability.split(".")))
    for name in built:
        number, _, kind = name.partition("-")
        code = divmod(int(number.rstrip("af")), 10)  # "90a" and "100f" are variants
        if code <= device and (kind != "real" or code[0] == device[0]):
            return True
    return False


def shared_memory() -> int:
    """Bytes of shared memory that a block may have on each of this machine's GPUs."""
    devices = extensions["cuda"].module.devices()
    return min((device["max_shared"] for device in devices), default=48 << 10)
