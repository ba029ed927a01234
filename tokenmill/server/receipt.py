"""Receipts: timings, parameters and digests of an answer, for requests that ask for one. Others pay nothing for it.

A client asks by `"receipt": true` in the body or by the header `x-receipt: 1`. A route passes `requested(...)` to
`answering.Prompts`; `answering.py` does the rest, for every shape of answer: the receipt becomes the last key of a
whole answer, or of the last event of a stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tokenmill.server.call import Call
from tokenmill.server.generation import Generation
from tokenmill.server.schema.receipts import Receipt, SequenceReceipt
from tokenmill.wire.messages import RequestTimings

_OPENAI_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
_encode = msgspec.json.Encoder().encode


def requested(call: Call, field: bool | None = None) -> bool:
    """Return True if the client asks for a receipt: by `field` of its body, or, if that is None, by the header."""
    return call.header(b"x-receipt").lower() in (b"1", b"true") if field is None else field


def attach(answer: bytes, call: Call, generations: Sequence[Generation]) -> bytes:
    """Return `answer`, the JSON text of an object or of a list of one, with the receipt as the object's last key."""
    end = b"}]" if answer.endswith(b"]") else b"}"
    comma = b"" if answer[-len(end) - 1 :] == b"{" + end else b","
    return answer[: -len(end)] + comma + b'"receipt":' + _encode(receipt_of(call, generations)) + end


def receipt_of(call: Call, generations: Sequence[Generation]) -> Receipt:
    """Return the receipt of a call whose sequences, at least one, have ended."""
    service, model = call.service, call.service.model
    assert model is not None  # because it has generated
    engine = service.status.engine_of(generations[0].engine)
    prompts = {g.prompt_index: g for g in reversed(generations)}.values()  # the first of each has computed it
    sequences = [_sequence(g) for g in generations]
    times = [g.timings for g in generations]
    return Receipt(
        request_id=call.request_id,
        model=model.id,
        model_revision=model.revision or None,
        model_digest=model.digest,
        engine=engine.name,
        engine_digest=engine.digest,
        engines=sorted({g.engine for g in generations}),
        resumed=sum(g.num_moves for g in generations),
        version=service.options.version,
        queue_ms=max(s.queue_ms for s in sequences),
        prefill_ms=max(s.prefill_ms for s in sequences),
        decode_ms=max(s.decode_ms for s in sequences),
        total_ms=_milliseconds(max(t.last for t in times) - times[0].arrived),
        prompt_tokens=sum(g.prepared.num_prompt for g in prompts),
        truncated_tokens=sum(g.prepared.num_truncated for g in prompts),
        cached_tokens=sum(g.num_cached for g in prompts),
        generated_tokens=sum(g.num_generated for g in generations),
        forced_tokens=sum(s.forced_tokens for s in sequences),
        preemptions=sum(s.preemptions for s in sequences),
        largest_batch=max(s.largest_batch for s in sequences),
        parameters=_parameters(generations[0], call.dialect == "openai"),
        sequences=sequences if len(sequences) > 1 else msgspec.UNSET,
    )


def _sequence(generation: Generation) -> SequenceReceipt:
    timings = generation.engine_timings or RequestTimings()
    return SequenceReceipt(
        index=generation.index,
        prompt=generation.prompt_index,
        engine=generation.engine,
        resumed=generation.num_moves,
        seed=generation.prepared.seed,
        finish_reason=generation.finish,
        prompt_tokens=generation.prepared.num_prompt,
        cached_tokens=generation.num_cached,
        generated_tokens=generation.num_generated,
        queue_ms=_milliseconds(timings.queue_s),
        prefill_ms=_milliseconds(timings.prefill_s),
        decode_ms=_milliseconds(timings.decode_s),
        forced_tokens=timings.num_forced,
        preemptions=timings.num_preemptions,
        largest_batch=timings.largest_batch,
    )


def _parameters(generation: Generation, openai: bool) -> dict[str, Any]:
    """Return everything that decided the answer, by the names of the API that was called."""
    prepared = generation.prepared
    sampling: dict[str, Any] = {name: getattr(prepared.sampling, name) for name in prepared.sampling.__struct_fields__}
    sampling["logit_bias"] = {str(token_id): bias for token_id, bias in prepared.sampling.logit_bias}
    for name in ("logprobs", "prompt_logprobs"):
        sampling[name] = None if sampling[name] < 0 else sampling[name]
    stopping: dict[str, Any] = {
        "max_new_tokens": prepared.stopping.max_new_tokens,
        "min_new_tokens": prepared.stopping.min_new_tokens,
    }
    if openai:
        stopping = {_OPENAI_NAMES[name]: value for name, value in stopping.items()}
    if prepared.stopping.force_after:
        stopping["thinking_budget"] = prepared.stopping.force_after
    if prepared.grammar is not None:
        grammar = prepared.grammar
        stopping["grammar"] = {"kind": grammar.kind, "source": grammar.source, "after": grammar.after}
    chosen = {"do_sample": not prepared.sampling.greedy, **sampling, "seed": prepared.seed}
    return {**stopping, **chosen, "stop": prepared.stop, "ignore_eos": not prepared.stopping.stop_ids}


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
