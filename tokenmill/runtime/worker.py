"""Process of an engine rank: assemble an engine from the settings and run its steps. The composition root."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from tokenmill.amounts import graph_sizes, memory_bytes
from tokenmill.backends.kind import BackendOptions
from tokenmill.config import Settings
from tokenmill.engine.border import Border
from tokenmill.engine.engine import Engine, Link
from tokenmill.engine.idle import IdleLink
from tokenmill.engine.ranks import Follower, RankServer
from tokenmill.freeze_gc import freeze_gc
from tokenmill.host import usable_cpus
from tokenmill.parallel.group import Group
from tokenmill.runtime.assembly import Assembled, EngineOptions, assemble, assemble_mock
from tokenmill.runtime.choice import num_devices
from tokenmill.runtime.links import links_of
from tokenmill.weights.source import ModelSource
from tokenmill.wire.control import ChildControl
from tokenmill.wire.messages import Configure, Place, Ready, Stop

_log = logging.getLogger(__name__)
_STOP = Stop()
ALONE = Place()
"""Place of the rank of an engine in this process."""


def main(control: ChildControl) -> None:
    """Run the rank `control.configure.index` until the supervisor stops it or is gone.

    Raise a StartError if a restart could not help, and any other exception if this rank failed.
    """
    configure = control.configure
    settings = Settings.from_dict(configure.settings)
    source = msgspec.convert(control.wait_model(), ModelSource)
    options = engine_options(settings, configure.place)
    with ExitStack() as resources:
        group, ranks, follower = _connect(configure, settings, resources)
        if settings.mock:
            parts = _assemble_mock(source, settings, options)
        else:
            parts = assemble(source, options, group, control.send)
        resources.callback(parts.close)
        link: Link | None = follower
        if link is None:
            if ranks is not None:
                ranks.wait()
            border = Border(configure.engine_addresses[0], parts.info, watch=control.fileno())
            resources.callback(border.close)
            link, gated = links_of(border, parts, ranks)
            resources.callback(gated.close)
            if parts.constraints is not None:
                link = IdleLink(link, parts.constraints.prepare)
        freeze_gc()  # before `Ready`, because the first request may follow at once
        control.send(Ready(parts.info if configure.index == 0 else None))
        engine = Engine(parts.scheduler, parts.executor, link, compare_plans=settings.debug_plans)
        _run(engine, control)


def _run(engine: Engine[Any], control: ChildControl) -> None:
    """Run steps until the supervisor sends `Stop` or is gone. Return also if rank 0 of a follower is gone."""
    try:
        while (messages := control.poll()) is not None and _STOP not in messages:
            engine.step()
    except ConnectionError as error:
        _log.info("This rank ends: %s.", error)  # INFO: rank 0 or the supervisor has reported the cause


def _connect(
    configure: Configure, settings: Settings, resources: ExitStack
) -> tuple[Group, RankServer | None, Follower | None]:
    """Connect to the other ranks: the group for tensors, and the links for messages. None without other ranks."""
    rank, folder, size = configure.index, Path(configure.run_dir), settings.ranks_per_engine
    if size == 1:
        return Group(), None, None
    number = f"{configure.place.engine}-{configure.generation}"
    address = str(folder / f"ranks-{number}.sock")
    ranks = follower = None
    if rank == 0:
        ranks = RankServer(address, size)
        resources.callback(ranks.close)
    group = Group()
    if not settings.mock:
        group = Group.connect(rank, size, str(folder / f"group-{number}.sock"), settings.rank_timeout)
        resources.callback(group.close)
    if rank > 0:
        follower = Follower(address, rank)
        resources.callback(follower.close)
    return group, ranks, follower


def _assemble_mock(source: ModelSource, settings: Settings, options: EngineOptions) -> Assembled:
    """Assemble an engine with scripted answers. Does not import torch."""
    from tokenmill.runtime.mock import MockExecutor, parse_faults
    from tokenmill.text.load import load_tokenizer

    tokenizer = load_tokenizer(source)
    executor = MockExecutor(
        tuple(tokenizer.encode(settings.mock_text, add_special_tokens=False)),
        step_s=settings.mock_step_ms / 1000,
        vocab_size=tokenizer.vocab_size,
        faults=parse_faults(settings.mock_fault),
    )
    return assemble_mock(source, options, executor, tokenizer.vocab_size)


def backend_options(settings: Settings, place: Place = ALONE) -> BackendOptions:
    """Return the options that select and configure the backend of the rank at `place`."""
    devices = num_devices() if settings.share_devices else 0
    return BackendOptions(
        backend=settings.backend,
        dtype=settings.dtype,
        quantize=settings.quantize,
        kv_cache_dtype=settings.kv_cache_dtype,
        deterministic=settings.deterministic,
        attention=settings.attention,
        cpu_isa=settings.cpu_isa,
        cpu_threads=settings.cpu_threads,
        cpus=max(1, usable_cpus() // settings.data_parallel_size),
        kernel_cache=settings.kernel_cache,
        device=settings.device,
        cuda_graphs=graph_sizes(settings.cuda_graphs),
        cuda_memory_fraction=settings.cuda_memory_fraction,
        trust_remote_code=settings.trust_remote_code,
        device_index=place.device % devices if devices else place.device,
        device_sharers=-(-place.ranks // devices) if devices else 1,
        local_ranks=place.ranks,
        share_devices=settings.share_devices,
        engine=place.engine,
        engines=settings.data_parallel_size,
        rank_timeout_s=settings.rank_timeout,
    )


def engine_options(settings: Settings, place: Place = ALONE) -> EngineOptions:
    """Return the user's options of an engine, and its share of this machine."""
    limit = memory_bytes(settings.memory_limit)
    return EngineOptions(
        backend=backend_options(settings, place),
        block_size=settings.block_size,
        max_batch_tokens=settings.max_batch_tokens,
        max_batch_size=settings.max_batch_size,
        max_input_tokens=settings.max_input_tokens,
        max_total_tokens=settings.max_total_tokens,
        grammars=not settings.disable_grammar_support,
        memory_limit=None if limit is None else limit // settings.data_parallel_size,
        host_memory=place.host_memory,
    )
