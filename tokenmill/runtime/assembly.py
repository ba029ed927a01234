"""Assembly of an engine from a model on disk: backend, executor and scheduler with matching limits.

The engine worker and the offline engine share it. Limits that the user left open are computed here, once, and
reported in `EngineInfo`.
"""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tokenmill.backends.accounts import forms_of_weights, stored_dtype
from tokenmill.backends.base import Backend, StepLimits
from tokenmill.backends.kind import CPU_DEFAULTS, BackendOptions, Defaults, Job, Report
from tokenmill.backends.steps import state_bytes
from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.engine import Executor as AnyExecutor
from tokenmill.engine.limits import SchedulerLimits
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.tables import Tables
from tokenmill.errors import NotEnoughMemory
from tokenmill.host import available_bytes
from tokenmill.parallel.group import Group
from tokenmill.parallel.mesh import Mesh
from tokenmill.program.cost import Load, cost, state_layout, weights_of
from tokenmill.program.encoded import encodes
from tokenmill.program.ops import Weight
from tokenmill.program.shard import shard
from tokenmill.program.stage import stage
from tokenmill.program.value import Program
from tokenmill.quant._unread import warn_of_unread
from tokenmill.quant.base import reader_of
from tokenmill.runtime import lengths
from tokenmill.runtime.choice import Choice, choose, make_backend
from tokenmill.runtime.constraints import Constraints
from tokenmill.runtime.executor import Executor
from tokenmill.runtime.memory import (
    Demand,
    check_weights,
    count_blocks,
    count_device_blocks,
    fitting_states,
    size,
)
from tokenmill.runtime.programs import programs_for
from tokenmill.runtime.staged import StagedExecutor
from tokenmill.weights.checkpoint import Checkpoint, open_checkpoint
from tokenmill.weights.source import ModelSource
from tokenmill.wire.messages import EngineInfo, Progress

if TYPE_CHECKING:
    from tokenmill.models.base import Programs

_ATTENTION_EFFICIENCY = 0.5  # FLOP/s of a prompt's attention relative to its products, also int8 products on a CPU
_MOCK_CAPACITY = 1 << 20  # tokens

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """User options of an engine. None and "": choose by model and device."""

    backend: BackendOptions = field(default_factory=BackendOptions)
    block_size: int = 16
    max_batch_tokens: int | None = None
    max_batch_size: int | None = None
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    grammars: bool = False  # False: requests with a grammar are refused
    num_stages: int = 1  # of layers, each for an equal number of ranks
    memory_limit: int | None = None  # bytes of weights, step and cache together, over all ranks of this machine
    host_memory: int | None = None  # bytes of the host's memory for this engine, before it loads; None: what is free


@dataclass(frozen=True, slots=True)
class Assembled:
    """Parts of an engine that is ready to run. The owner calls `close`."""

    scheduler: Scheduler
    executor: AnyExecutor[Any]
    info: EngineInfo
    constraints: Constraints | None = None  # on rank 0; shared by the links and the executor
    _resources: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        """End the threads of the backend and free its memory. Idempotent."""
        self._resources.close()


def assemble(source: ModelSource, options: EngineOptions, group: Group, report: Report) -> Assembled:
    """Load a model into a backend, allocate as large a KV cache as memory allows, and warm up.

    Blocks until all is done: seconds to minutes. `report`: receives the progress. Raise a StartError that explains the
    remedy if the model cannot be served as requested.
    """
    backend_options = options.backend
    checkpoint = open_checkpoint(source)
    programs = programs_for(checkpoint, backend_options)
    whole, mesh = programs.decoder, Mesh.of(group, options.num_stages)
    choice = choose(whole, backend_options, options.block_size, mesh.tensor.size, mesh.num_stages)
    program = stage(whole, mesh.stage, mesh.num_stages)
    defaults, length = choice.kind.defaults(choice.device), lengths.of_model(programs.config)
    longest = lengths.longest(source, length, options.max_total_tokens)
    lengths.max_input_tokens(options.max_input_tokens, longest, length)  # fail before minutes of loading
    share, limit = options.host_memory, options.memory_limit
    dtype, needed = measure_weights(choice, programs, checkpoint, backend_options, limit, share)
    free = free_of_ranks(choice, backend_options, share) if limit is None else limit
    limits = _limits(defaults, options, longest, slot_bytes(whole, dtype, mesh.tensor.size), free - needed, group)
    read = reader_of(checkpoint, backend_options.quantize)
    job = Job(program, checkpoint, read, limits, mesh.tensor, backend_options, choice.placement, dtype, report, mesh)
    with ExitStack() as resources:
        backend = _backend(choice, job)
        resources.callback(backend.close)
        num_blocks = _allocate(choice, backend, limits, options, group, (_own_bytes(choice, job, needed), needed))
        report(Progress("warmup", unit="items"))
        backend.warm_up()
        tables = _tables(backend, limits)
        total = tables.longest(num_blocks, longest)
        info = EngineInfo(
            model_id=source.model_id,
            dtype=dtype,
            device=choice.device,
            backend=choice.name,
            num_blocks=num_blocks,
            block_size=options.block_size,
            vocab_size=whole.logits.width,
            max_input_tokens=lengths.max_input_tokens(options.max_input_tokens, total, length),
            max_total_tokens=total,
            max_batch_tokens=limits.max_batch_tokens,
            max_batch_size=limits.max_batch_size,
            num_shard=mesh.tensor.size,
            revision=source.revision,
            quantize=backend_options.quantize,
            isa=choice.kind.instruction_set(backend_options),
            shares_prefixes=not (state_layout(whole) or encodes(whole)),
            weights=_forms(choice, job) if group.rank == 0 else (),
            long_capacity=num_blocks * total // tables.blocks_of(total) if tables.windowed else 0,
        )
        lengths.log_prompt_limit(options.max_input_tokens, total, length)
        scheduler = scheduler_of(info, defaults, whole, backend.windows, mesh.num_stages)
        constraints = _constraints(source, info, options, resources) if group.rank == 0 else None
        executor: AnyExecutor[Any] = Executor(backend, limits.max_batch_size, constraints)
        if mesh.num_stages > 1:
            executor = StagedExecutor(backend, limits.max_batch_size, mesh, Constraints.constrains, constraints)
        return Assembled(scheduler, executor, info, constraints, resources.pop_all())


def _backend(choice: Choice, job: Job) -> Backend:
    """Load the weights and return the backend. Raise NotEnoughMemory if its state of all slots does not fit."""
    try:
        return make_backend(choice, job)
    except MemoryError as error:  # beside the weights there is no memory for the state of so many sequences
        raise NotEnoughMemory(
            f"There is no memory for {job.limits.max_batch_size} requests of {job.limits.max_total_tokens} tokens "
            f"({error}). Give a smaller --max-total-tokens or --max-batch-size."
        ) from None


def _own_bytes(choice: Choice, job: Job, needed: int) -> int:
    """Return the bytes of the weights of this rank. `needed`: of all ranks."""
    if job.mesh.num_stages == 1:
        return needed // job.group.size
    return choice.kind.weight_bytes(job.of_rank(), job.source, job.dtype, job.options.quantize)


def _forms(choice: Choice, job: Job) -> tuple[str, ...]:
    """Return the forms of the weights of all stages, and log them."""
    forms = forms_of_weights(job.program.model, job.source, job.read, choice.kind.form, job.dtype)
    for line in forms:
        _log.info("Weights: %s.", line)
    return forms


def _constraints(source: ModelSource, info: EngineInfo, options: EngineOptions, resources: ExitStack) -> Constraints:
    """Create the constraints of the engine. `resources` closes the compiler of grammars."""
    grammars = None
    if options.grammars:
        from tokenmill.runtime.grammars import ModelGrammars

        grammars = ModelGrammars(source, info.vocab_size, options.backend.cpus)
        resources.callback(grammars.close)
    return Constraints(info.vocab_size, grammars)


def assemble_mock(
    source: ModelSource, options: EngineOptions, executor: AnyExecutor[Any], vocab_size: int
) -> Assembled:
    """Assemble an engine around `executor`, which has no model. Read at most the configuration of the model."""
    length = lengths.of_mock(source)
    total = options.max_total_tokens or min(lengths.longest(source, length, None), lengths.MOCK_LENGTH)
    info = EngineInfo(
        model_id=source.model_id,
        dtype=options.backend.dtype or "float32",
        device="mock",
        backend="mock",
        num_blocks=max(_MOCK_CAPACITY, total) // options.block_size + 1,
        block_size=options.block_size,
        vocab_size=vocab_size,
        max_input_tokens=lengths.max_input_tokens(options.max_input_tokens, total, length),
        max_total_tokens=total,
        max_batch_tokens=options.max_batch_tokens or CPU_DEFAULTS.batch_tokens,
        max_batch_size=options.max_batch_size or CPU_DEFAULTS.batch_size,
        revision=source.revision,
    )
    return Assembled(scheduler_of(info, CPU_DEFAULTS._replace(prefill_beside=0, max_chunk=0)), executor, info)


def _limits(
    defaults: Defaults, options: EngineOptions, longest: int, state_bytes: int, free: int, group: Group
) -> StepLimits:
    """Return the limits of a step on every rank. `state_bytes`: of a sequence; `free`: bytes for states and cache."""
    tokens, rows = options.max_batch_tokens or defaults.batch_tokens, options.max_batch_size or defaults.batch_size
    if options.max_batch_size is None and (fit := fitting_states(state_bytes, free, rows)) < rows:
        _log.info("The state of a sequence has %s: %d sequences run at once.", size(state_bytes), fit)
        rows = fit
    return StepLimits(tokens, group.minimum(rows), longest, options.block_size)


def slot_bytes(program: Program, dtype: str, ranks: int) -> int:
    """Return the bytes of the state of a sequence, over all ranks."""
    layout = state_layout(shard(program, ranks))
    return state_bytes(layout, 4 if dtype == "float32" else 2) * ranks


def measure_weights(
    choice: Choice, programs: Programs, checkpoint: Checkpoint, options: BackendOptions, memory_limit: int | None,
    share: int | None = None,
) -> tuple[str, int]:  # fmt: skip
    """Return the dtype to compute in, and the bytes of all ranks' weights in the backend's format. Reads no weight.

    `share`: see `free_bytes`.

    Log tensors that the model does not read. Raise ModelError as `Kind.weight_bytes`, and NotEnoughMemory.
    """
    dtype = choice.kind.dtype(stored_dtype(programs.config.dtype, checkpoint), options.dtype)
    ranks = choice.placement.ranks
    of_rank = shard(programs.decoder, ranks, whole_experts=options.expert_parallel)
    needed = ranks * choice.kind.weight_bytes(of_rank, checkpoint, dtype, options.quantize)
    warn_of_unread(weights_of(programs.decoder), checkpoint)
    check_weights(needed, free_of_ranks(choice, options, share), memory_limit)
    return dtype, needed


def free_bytes(choice: Choice, options: BackendOptions, share: int | None = None) -> int:
    """Return the free bytes of the memory in which weights and cache will be.

    `share`: bytes of the host's memory that the engine may take; None: all that are free.
    """
    free = choice.kind.room(options, choice.device)
    return free if free is not None else min(available_bytes(), share or sys.maxsize)


def free_of_ranks(choice: Choice, options: BackendOptions, share: int | None = None) -> int:
    """Return the free bytes for the weights and the cache of all ranks: each has a device, or all have the host.

    `share`: see `free_bytes`.
    """
    each = choice.kind.defaults(choice.device).owns_memory
    return free_bytes(choice, options, share) * (choice.placement.ranks * choice.placement.stages if each else 1)


def _allocate(
    choice: Choice,
    backend: Backend,
    limits: StepLimits,
    options: EngineOptions,
    group: Group,
    weight_bytes: tuple[int, int],
) -> int:
    """Allocate the cache with as many blocks as fit on every rank. Return their number.

    `weight_bytes`: of this rank, and of all ranks.
    """
    own_bytes, all_bytes = weight_bytes
    demand = Demand(
        backend.block_bytes(),
        backend.step_bytes(),
        _tables(backend, limits),
        limits.max_batch_size,
        limits.max_total_tokens,
        backend.claimed_bytes(),
        options.max_total_tokens or 2,
    )
    group.minimum(0)  # a barrier: free memory is measured once all ranks have loaded their weights
    limit = options.memory_limit
    if limit is not None:  # ranks have equal shares of what the weights leave
        limit = own_bytes + (limit - all_bytes) // group.size
    free = free_bytes(choice, options.backend)
    if choice.kind.defaults(choice.device).owns_memory:
        num_blocks = count_device_blocks(demand, free, own_bytes, limit)
    else:
        if options.host_memory is not None:  # other engines take theirs
            free = min(free, options.host_memory - all_bytes)
        num_blocks = count_blocks(demand, free // group.size, own_bytes, limit, group.size)
    num_blocks = group.minimum(num_blocks)
    backend.allocate(num_blocks)
    return num_blocks


def _tables(backend: Backend, limits: StepLimits) -> Tables:
    """Return the block tables of a sequence."""
    return Tables.of(backend.windows, limits.block_size, limits.max_batch_tokens)


def scheduler_of(
    info: EngineInfo,
    defaults: Defaults,
    program: Program | None = None,
    windows: tuple[int, ...] = (0,),
    num_stages: int = 1,
) -> Scheduler:
    """Return a scheduler for the engine `info`.

    `defaults`: of its device. `program`: of its model, None for a mock engine. `windows`: of its backend's tables.
    `num_stages`: steps on the device at the same time, one for each stage.
    """
    if not info.shares_prefixes:
        _log.info(
            "The prefix cache is off: blocks do not hold all that the model keeps for a sequence (a state), or their "
            "content depends on later tokens of the prompt (an encoder)."
        )
    limits = SchedulerLimits(
        info.max_batch_tokens,
        info.max_batch_size,
        info.max_total_tokens,
        info.block_size,
        prefill_beside=defaults.prefill_beside,
        max_chunk=defaults.max_chunk,
        context_weight=context_weight(program) if program is not None else 0,
        shares_prefixes=info.shares_prefixes,
        windows=windows,
        stride=num_stages,
    )
    return Scheduler(BlockPool(info.num_blocks, info.block_size), limits)


def context_weight(program: Program) -> int:
    """Return the position at which the attention of a prompt token costs as much as its products.

    Return 0 if all layers have sliding windows. The attention of such layers is not counted.
    """
    token, pair = Load(tokens=1, samples=0, context=0, pairs=0), Load(tokens=0, samples=0, context=0, pairs=1)
    products = sum(cost(op, token, _bits).flops for op in program.ops if op.keeps() is None)
    unbounded = [op for op in program.ops if (spec := op.keeps()) is not None and not spec.window]
    attention = sum(cost(op, pair, _bits).flops for op in unbounded)
    return int(products * _ATTENTION_EFFICIENCY / attention) if attention else 0


def _bits(weight: Weight) -> float:
    return 16.0  # any value: only operations are counted, not bytes
