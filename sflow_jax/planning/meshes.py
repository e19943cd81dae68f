"""The mesh of a placement, made for these devices and this work."""

import dataclasses
import logging
from collections.abc import Sequence

import jax
from etils import epath

from sflow_jax.catalogue import find_info
from sflow_jax.errors import SettingError
from sflow_jax.machine.chips import chip_of
from sflow_jax.machine.meshes import make_mesh, parse_mesh
from sflow_jax.planning.costs import propose_mesh
from sflow_jax.settings import AUTOMATIC, Placement

logger = logging.getLogger(__name__)


def placed(checkpoint: epath.PathLike, placement: Placement, work: str, *, alone: bool = False) -> Placement:
    """The placement with its mesh made: as asked for, or proposed for these devices and this work.

    work: "edit" or "sweep". alone: on this process's devices, whatever others do. A mesh that is one already is
    taken as it is. SettingError where there is no device, or none that fits.
    """
    try:
        devices = jax.local_devices() if alone else jax.devices()
    except RuntimeError as error:
        raise SettingError(f"no usable device: {str(error).splitlines()[0]}") from error
    if not isinstance(placement.mesh, str):
        return placement
    automatic = placement.mesh == AUTOMATIC
    if automatic and len(devices) == 1:
        return dataclasses.replace(placement, mesh=None)
    sizes = _proposed(checkpoint, placement, devices, work) if automatic else parse_mesh(placement.mesh)
    return dataclasses.replace(placement, mesh=make_mesh(sizes, devices))


def _proposed(
    checkpoint: epath.PathLike, placement: Placement, devices: Sequence[jax.Device], work: str
) -> dict[str, int]:
    neighbours = sum(device.process_index == devices[0].process_index for device in devices)
    chip = chip_of(devices[0], neighbours)
    sizes, why = propose_mesh(find_info(str(checkpoint))[0], chip, len(devices), work, placement)
    logger.info("mesh %s", why)
    return sizes
