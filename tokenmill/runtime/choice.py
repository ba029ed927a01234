"""Choice of the backend for a program: the first kind for the device that supports it.

Each folder of `backends/` is a kind. A GPU is preferred over the CPU. If the preferred kind for the device does not
support the program, another one is used, and the log gives the reason.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from tokenmill import plugins
from tokenmill.backends.base import Backend
from tokenmill.backends.kind import BackendOptions, Job, Kind, Placement
from tokenmill.errors import ArgumentError, NotEnoughDevices, Unsupported
from tokenmill.host import check_cpus
from tokenmill.program.foreign import body_of
from tokenmill.program.value import Program

_DEVICES = ("cuda", "cpu")
"""Devices in order of preference."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """A kind of backend and the device to run on.

    `reason`: why the preferred kind is not used; "" if it is, or if the user chose this one.
    """

    kind: Kind
    placement: Placement
    reason: str = ""

    @property
    def name(self) -> str:
        """Name of the kind."""
        return self.kind.name

    @property
    def device(self) -> str:
        """Name of the device."""
        return self.placement.device


def kinds() -> list[Kind]:
    """Return all kinds of backends, in order of preference."""
    found: list[Kind] = [plugins.find("backends", name).KIND for name in plugins.names("backends")]
    return sorted(found, key=lambda kind: kind.preference)


def choose(program: Program, options: BackendOptions, block_size: int, ranks: int, stages: int = 1) -> Choice:
    """Return the backend kind and device for a program, without reading weights.

    Raise a StartError if the options cannot be met.
    """
    placement = Placement(_device(options), block_size, ranks, stages)
    reason = ""
    for kind in kinds():
        if placement.device not in kind.devices or options.backend not in ("auto", kind.name):
            continue
        why = kind.refusal(program, options, placement)
        if not why:
            check_ranks(options, kind.num_devices(placement.device))
            kind.check(options, placement, reason)
            return Choice(kind, placement, "" if body_of(program) else reason)  # only one kind is for such a program
        if options.backend == kind.name:
            others = [other for other in kinds() if placement.device in other.devices]
            able = [other.name for other in others if not other.refusal(program, options, placement)]
            raise Unsupported("backend", kind.name, able, f"It cannot serve this: {why}.")
        reason = reason or why
    raise Unsupported("backend", options.backend, [kind.name for kind in kinds()])


def num_devices() -> int:
    """Return the number of devices that this process sees, besides the host; 0 if there are none."""
    return max((kind.num_devices(device) or 0 for kind in kinds() for device in kind.devices), default=0)


def check_machine(options: BackendOptions) -> int | None:
    """Return the number of devices that ranks may take, None if they compute on CPUs. Needs no model.

    Raise a StartError if this machine lacks the device, or devices for all ranks.
    """
    devices = None if _device(options) == "cpu" else num_devices()
    check_ranks(options, devices)
    return devices


def check_ranks(options: BackendOptions, num_devices: int | None) -> None:
    """Raise a StartError if this machine has too few devices, or CPUs, for the ranks of all engines.

    `num_devices`: that this process sees; None: ranks compute on CPUs.
    """
    ranks = options.local_ranks
    if options.share_devices or ranks == 1:
        return
    if num_devices is not None and ranks > num_devices:
        raise NotEnoughDevices(
            f"{ranks} ranks need as many devices, but {num_devices} of them are visible here (CUDA_VISIBLE_DEVICES "
            "and the container decide which are). Make more visible, or lower --num-shard, --pipeline-parallel-size "
            "or --data-parallel-size; --device cpu computes on CPUs."
        )
    if num_devices is None:
        check_cpus(ranks)


def make_backend(choice: Choice, job: Job) -> Backend:
    """Load the weights and return the backend. Log the reason if it is not the preferred kind."""
    if job.options.attention and choice.name != "cuda":
        _log.warning("`attention` %s has no effect: the %s backend has its own.", job.options.attention, choice.name)
    if choice.reason:
        _log.warning("The %s backend serves this model, for the %s backend cannot: %s.", choice.name,
                     choice.device.upper(), choice.reason)  # fmt: skip
    return choice.kind.make(job)


def _device(options: BackendOptions) -> str:
    """Return the device to use. Raise Unsupported if the requested one is not available."""
    own = next((kind.devices for kind in kinds() if kind.name == options.backend), _DEVICES)
    asked = options.device if options.device != "auto" else own[0] if len(own) == 1 else ""
    if asked and asked not in own:
        raise ArgumentError(f"`backend` is {options.backend}, but `device` is {options.device}. Leave one of them out.")
    if not asked and options.backend != "auto":
        return own[0]
    missing = {device: _missing(device) for device in _DEVICES}
    if asked and missing.get(asked):
        here = [name for name, why in missing.items() if not why]
        raise Unsupported("device", asked, here, f"Here, {missing[asked]}.")
    return asked or next(device for device, why in missing.items() if not why)


def _missing(device: str) -> str:
    """Return why no kind made for `device` alone can use it; "" if one can."""
    own = [kind for kind in kinds() if kind.devices == (device,)]
    return next((why for why in (kind.missing() for kind in own) if why), "")
