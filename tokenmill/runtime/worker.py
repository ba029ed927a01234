"""Process of an engine rank: assemble an engine from the settings and run its steps. The composition root."""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import msgspec

from tokenmill.amounts import graph_sizes, memory_bytes
from tokenmill.backends.kind import BackendOptions
from tokenmill.config import Settings
from tokenmill.engine.border import Border
from tokenmill.engine.engine import Engine, Link
from tokenmill.engine.idle import IdleLink
from tokenmill.engine.ranks import Follower, RankServer
from tokenmill.engine.watched import ALONE_S, LEAST_S, Watched
from tokenmill.freeze_gc import freeze_gc
from tokenmill.heartbeat import SLACK_S, Heartbeat, heartbeat_path, stack_path
from tokenmill.host import usable_cpus
from tokenmill.parallel.agreement import agree
from tokenmill.parallel.group import Group
from tokenmill.runtime.assembly import Assembled, EngineOptions, assemble, assemble_mock
from tokenmill.runtime.choice import check_machine, num_devices
from tokenmill.runtime.identity import facts_of
from tokenmill.runtime.links import links_of
from tokenmill.weights.source import ModelSource
from tokenmill.wire.control import ChildControl
from tokenmill.wire.messages import Configure, Place, Progress, Ready, Stop

_log = logging.getLogger(__name__)
_STOP = Stop()
ALONE = Place()
"""Place of the rank of an engine in this process."""
LOAD_S = 1800.0
"""Seconds without a sign of life in which a model may be loaded, compiled or warmed up."""


def main(control: ChildControl) -> None:
    """Run the rank `control.configure.index` until the supervisor stops it, or it or another rank is gone.

    Raise a StartError if a restart could not help, and any other exception if this rank failed.
    """
    configure = control.configure
    settings = Settings.from_dict(configure.settings)
    heartbeat = _heartbeat(configure)
    heartbeat.note("the wait for the model", math.inf)
    if not settings.mock:
        check_machine(backend_options(settings, configure.place))
    source = msgspec.convert(control.wait_model(), ModelSource)
    with ExitStack() as resources:
        try:
            _run(source, settings, control, heartbeat, resources)
        except ConnectionError as error:
            if settings.ranks_per_engine == 1:
                raise
            _log.info("This rank ends: %s.", error)  # INFO: the rank that was first, or the supervisor, reports why


def _heartbeat(configure: Configure) -> Heartbeat:
    """Return this rank's heartbeat. From now on, SIGUSR1 writes its stack to a file, however it is stuck."""
    place = (configure.run_dir, configure.place.engine, configure.index)
    stack = os.open(stack_path(*place), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    faulthandler.register(signal.SIGUSR1, file=stack)
    return Heartbeat(heartbeat_path(*place))


def _run(
    source: ModelSource, settings: Settings, control: ChildControl, heartbeat: Heartbeat, resources: ExitStack
) -> None:
    """Start, and run steps until the supervisor sends `Stop` or is gone. Raise ConnectionError if a rank is gone."""

    def report(progress: Progress) -> None:
        heartbeat.note(f"the phase {progress.phase!r}", LOAD_S)
        control.send(progress)

    configure = control.configure
    heartbeat.note("the join of the ranks", settings.rank_timeout + SLACK_S)
    group, ranks, follower = _connect(configure, settings, resources)
    agree(group, facts_of(settings, source))
    heartbeat.note("the start of its engine", LOAD_S)
    options = engine_options(settings, configure.place)
    if settings.mock:
        parts = _assemble_mock(source, settings, options, configure.index)
    else:
        parts = assemble(source, options, group, report)
    resources.callback(parts.close)
    link: Link | None = follower
    if link is None:
        border = Border(configure.engine_addresses[0], parts.info, watch=control.fileno())
        resources.callback(border.close)
        link, gated = links_of(border, parts, ranks)
        resources.callback(gated.close)
        if parts.constraints is not None:
            link = IdleLink(link, parts.constraints.prepare)
    freeze_gc()  # before `Ready`, because the first request may follow at once
    least_s = LEAST_S if group.size > 1 else ALONE_S
    watched = Watched(parts.executor, heartbeat, parts.scheduler.limits.context_weight, least_s)
    engine = Engine(parts.scheduler, watched, link, compare_plans=settings.debug_plans)
    watched.note()
    control.send(Ready(parts.info if configure.index == 0 else None))
    while (messages := control.poll()) is not None and _STOP not in messages:
        if not watched.busy:  # a step on the device is noted when it is collected
            watched.note()
        engine.step()


def _connect(
    configure: Configure, settings: Settings, resources: ExitStack
) -> tuple[Group, RankServer | None, Follower | None]:
    """Connect to the other ranks: the group that starts together, and the links for messages of steps."""
    rank, folder, size = configure.index, Path(configure.run_dir), settings.ranks_per_engine
    if size == 1:
        return Group(), None, None
    number, timeout_s = f"{configure.place.engine}-{configure.generation}", settings.rank_timeout
    address, meeting, secret = str(folder / f"ranks-{number}.sock"), str(folder / f"group-{number}.sock"), b""
    if settings.num_nodes > 1:
        nodes = settings.nodes
        address, meeting, secret = nodes.steps_address(), nodes.group_address(), nodes.secret()
    ranks = follower = None
    if rank == 0:
        ranks = RankServer(address, size, secret)
        resources.callback(ranks.close)
    group = Group.connect(rank, size, meeting, timeout_s, secret)
    resources.callback(group.close)
    if ranks is not None:
        ranks.wait(timeout_s)
    else:
        follower = Follower(address, rank, timeout_s, secret)
        resources.callback(follower.close)
    return group, ranks, follower


def _assemble_mock(source: ModelSource, settings: Settings, options: EngineOptions, rank: int) -> Assembled:
    """Assemble an engine with scripted answers. Does not import torch."""
    from tokenmill.runtime.mock import MockExecutor, parse_faults
    from tokenmill.text.load import load_tokenizer

    tokenizer = load_tokenizer(source)
    executor = MockExecutor(
        tuple(tokenizer.encode(settings.mock_text, add_special_tokens=False)),
        step_s=settings.mock_step_ms / 1000,
        vocab_size=tokenizer.vocab_size,
        faults=parse_faults(settings.mock_fault),
        rank=rank,
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
        expert_parallel=settings.enable_expert_parallel,
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
        nodes=settings.num_nodes,
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
        num_stages=settings.pipeline_parallel_size,
        memory_limit=None if limit is None else limit // settings.data_parallel_size,
        host_memory=place.host_memory,
    )
