"""An HTTP worker's client on several engines: placement, engines that stop and come back, aborts, status, metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from support_engines import INFO, TIMINGS, Cluster, until
from support_server import byte_model
from test_server_metrics import samples

from tokenmill.errors import GenerationError, NotReady
from tokenmill.placement.prompt import prompt_of_tokens
from tokenmill.server import client as client_module
from tokenmill.server.peers import Peers
from tokenmill.text.load import load_tokenizer
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import GrammarSpec, Output, PromptDetails, Stats, TokenDetails


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(local_source(byte_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def cluster(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., None]:
    """Return a runner of `scenario(cluster)` on a new cluster."""

    def run(scenario: Callable[[Cluster], Awaitable[None]], count: int = 2, **how: object) -> None:
        async def main() -> None:
            async with Cluster(tmp_path, tokenizer, count, **how) as made:  # type: ignore[arg-type]
                await scenario(made)

        asyncio.run(main())

    return run


Run = Callable[..., None]


def test_requests_are_spread_over_the_engines(cluster: Run) -> None:
    async def scenario(c: Cluster) -> None:
        made = await c.asked(30)
        assert all(9 <= len(engine.received) <= 21 for engine in c.engines)
        for engine in c.engines:
            engine.step()
            engine.step(finish="length")
        await until(lambda: len(c.answers.finished) == 30)
        assert all(c.answers.tokens[one.id] == [2, 3] for one in made)
        assert {one.engine for one in made} == {0, 1}

    cluster(scenario)


def test_a_conversation_goes_to_the_engine_that_holds_it(cluster: Run) -> None:
    async def scenario(c: Cluster) -> None:
        talks = [tuple(range(2 + n, 66 + n)) for n in range(8)]
        homes = []
        for turn in range(3):
            for n, talk in enumerate(talks):
                one = c.ask(talk, new=1)
                await until(lambda one=one: one.id in c.engines[one.engine].requests)  # type: ignore[misc]
                c.engines[one.engine].step(finish="length")
                await until(lambda one=one: one.id in c.answers.finished)  # type: ignore[misc]
                talks[n] = (*talk, *range(100 + turn, 116 + turn))
                homes.append(one.engine)
        assert homes[:8] == homes[8:16] == homes[16:]
        assert set(homes) == {0, 1}

    cluster(scenario)


def test_other_workers_are_told_where_a_prompt_went_and_are_believed(cluster: Run, tmp_path: Path) -> None:
    async def scenario(c: Cluster) -> None:
        told: list[tuple[int, int]] = []
        other = Peers(str(tmp_path), 1, 2, lambda engine, prompt, cached: told.append((engine, prompt.num_tokens)))
        other.listen()
        one = c.ask(tuple(range(100)))
        c.ask((5, 6))  # too short to have a prefix
        await until(lambda: bool(told))
        assert told == [(one.engine, 100)]
        for engine in (0, 1):
            talk = tuple(range(150 + engine, 250))
            other.tell(engine, prompt_of_tokens(talk), 0)
            await until(lambda known=c.client._placement.num_keys: c.client._placement.num_keys > known)  # type: ignore[misc]
            assert c.ask(talk).engine == engine
        other.close()

    cluster(scenario)


def test_salts_divide_the_prefixes(cluster: Run) -> None:
    async def scenario(c: Cluster) -> None:
        seen = []
        placed = c.client._placement.place
        c.client._placement.place = lambda prompt, *more: seen.append(prompt.keys) or placed(prompt, *more)  # type: ignore[method-assign]
        for salt in (b"", b"", b"tenant"):
            c.ask(tuple(range(100)), salt=salt)
        assert seen[0] == seen[1] != seen[2]

    cluster(scenario)


def test_an_engine_that_stops_leaves_its_requests_to_the_others_where_they_stood(cluster: Run) -> None:
    async def scenario(c: Cluster) -> None:
        made = await c.asked(12)
        for engine in c.engines:
            engine.step()
            engine.step()
        await until(lambda: all(len(c.answers.tokens.get(one.id, ())) == 2 for one in made))
        late = await c.asked(4)
        await c.engines[0].stop()
        await until(lambda: len(c.engines[1].requests) == 16)
        moved = [one for one in (*made, *late) if one.num_moves]
        assert moved
        for one in moved:
            request = c.engines[1].requests[one.id]
            assert request.output_ids == ((2, 3) if one in made else ())
            assert request.prompt_ids == one.prepared.prompt_ids
            assert request.stopping.max_new_tokens == 100
        c.engines[1].step()
        c.engines[1].step(finish="length")
        await until(lambda: len(c.answers.finished) == 16)
        assert all(c.answers.tokens[one.id] == [2, 3, 4, 5] for one in made)
        assert all(c.answers.tokens[one.id] == [2, 3] for one in late)
        assert not c.answers.errors
        found = samples(c.metrics.text())
        assert found["tokenmill_resumed_requests_total"] == len(moved)
        assert found["tokenmill_engine_up|engine=0"] == 0
        assert found["tokenmill_engine_up|engine=1"] == 1

    cluster(scenario)


def test_a_moved_request_keeps_its_grammar_and_its_salt(cluster: Run) -> None:
    async def scenario(c: Cluster) -> None:
        one = c.ask(grammar=GrammarSpec("regex", "a+"), salt=b"x")
        await until(lambda: one.id in c.engines[one.engine].requests)
        first, other = c.engines[one.engine], c.engines[1 - one.engine]
        await first.stop()
        await until(lambda: one.id in other.requests)
        assert msgspec.structs.replace(other.received[0], sent_at=0.0) == first.received[0]
        assert other.received[0].sent_at > 0

    cluster(scenario)


def test_without_another_engine_requests_fail_and_new_ones_wait_for_a_restart(cluster: Run) -> None:
    async def scenario(c: Cluster) -> None:
        made = await c.asked(4)
        await c.engines[0].stop()
        await until(lambda: len(c.engines[1].requests) == 4)
        assert c.client.healthy
        assert c.status.phase == "ready"
        c.engines[1].step()
        await until(lambda: len(c.answers.tokens) == 4)
        await c.engines[1].stop()
        await until(lambda: len(c.answers.errors) == 4)
        assert set(c.answers.errors.values()) == {"Server error: the engine stopped"}
        assert (c.client.healthy, c.client.info, c.status.phase) == (False, None, "the engine is restarting")
        with pytest.raises(NotReady):
            c.ask()
        assert all(one.num_moves <= 1 for one in made)
        await c.engines[0].start()
        await until(lambda: c.client.healthy)
        assert c.status.phase == "ready"
        assert c.ask().engine == 0

    cluster(scenario)


def test_one_engine_alone_fails_its_requests_as_ever(cluster: Run) -> None:
    async def scenario(c: Cluster) -> None:
        await c.asked(2)
        await c.engines[0].stop()
        await until(lambda: len(c.answers.errors) == 2)

    cluster(scenario, count=1)


def test_a_request_that_two_engines_die_of_is_not_given_to_a_third(cluster: Run) -> None:
    async def scenario(c: Cluster) -> None:
        bad = c.ask()
        for _ in range(2):
            engine = c.engines[bad.engine]
            await until(lambda engine=engine: bad.id in engine.requests)  # type: ignore[misc]
            before = bad.engine
            await engine.stop()
            await until(lambda before=before: bad.engine != before or bool(c.answers.errors))  # type: ignore[misc]
        assert c.answers.errors == {bad.id: "Server error: the engine stopped"}
        assert c.num_connected == 2

    cluster(scenario, count=4)


def test_a_request_that_goes_on_between_may_be_moved_again_and_again(cluster: Run) -> None:
    async def scenario(c: Cluster) -> None:
        one = c.ask()
        for length in range(1, 4):
            engine = c.engines[one.engine]
            await until(lambda engine=engine: one.id in engine.requests)  # type: ignore[misc]
            engine.step()
            await until(lambda length=length: len(one.token_ids) == length)  # type: ignore[misc]
            await engine.stop()
            await until(lambda length=length: one.num_moves == length)  # type: ignore[misc]
        await until(lambda: one.id in c.engines[one.engine].requests)
        c.engines[one.engine].step(finish="stop")
        await until(lambda: bool(c.answers.finished))
        assert c.answers.tokens[one.id] == [2, 3, 4, 5]

    cluster(scenario, count=4)


def test_aborts_go_to_the_engine_that_has_the_request(cluster: Run) -> None:
    async def scenario(c: Cluster) -> None:
        made = await c.asked(10)
        await c.engines[0].stop()
        await c.engines[0].start()
        await until(lambda: c.num_connected == 2 and len(c.engines[1].requests) == 10)
        made += await c.asked(6)
        for one in made:
            c.client.abort(one.id)
            c.client.abort(one.id)
        c.client.abort(12345)
        await until(lambda: not c.engines[0].requests and not c.engines[1].requests)
        assert len(c.engines[1].aborted) + len(c.engines[0].aborted) == 16
        for engine in c.engines:
            assert set(engine.aborted) <= {request.id for request in engine.received}
        assert c.client._placement.outstanding(0) == c.client._placement.outstanding(1) == 0

    cluster(scenario)


def test_everything_can_be_ended_at_once(cluster: Run) -> None:
    async def scenario(c: Cluster) -> None:
        made = await c.asked(6)
        c.client.abort_all(GenerationError("the end"))
        assert c.answers.errors == dict.fromkeys((one.id for one in made), "the end")
        await until(lambda: len(c.engines[0].aborted) + len(c.engines[1].aborted) == 6)

    cluster(scenario)


def test_an_engine_that_is_silent_gets_no_new_requests(cluster: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_QUIET_S", 0.05)

    async def scenario(c: Cluster) -> None:
        await asyncio.sleep(0.06)
        c.engines[1].send()
        heard = c.client._connections[1].heard
        await until(lambda: c.client._connections[1].heard > heard)
        assert {c.ask().engine for _ in range(8)} == {1}
        await asyncio.sleep(0.06)
        assert {c.ask().engine for _ in range(12)} == {0, 1}  # both are silent

    cluster(scenario)


def test_load_that_other_workers_give_is_seen_in_the_engines_statistics(cluster: Run) -> None:
    async def scenario(c: Cluster) -> None:
        c.engines[0].send(stats=Stats(running=40, waiting=10))
        await until(lambda: c.client._placement.outstanding(0) > 0)
        assert {one.engine for one in await c.asked(8)} == {1}

    cluster(scenario)


def test_limits_are_the_smallest_and_capacity_is_the_sum(cluster: Run) -> None:
    small = msgspec.structs.replace(INFO, max_total_tokens=200, max_input_tokens=150, num_blocks=500)

    async def scenario(c: Cluster) -> None:
        engine = c.status.engine
        assert engine is not None
        assert (engine.limits.max_total_tokens, engine.limits.max_input_tokens) == (200, 150)
        assert engine.capacity == 16 * 1500
        assert engine.digest == c.status.engine_of(0).digest == c.status.engine_of(1).digest
        found = samples(c.metrics.text())
        assert found["tgi_batch_max_total_tokens"] == 16 * 1500
        assert found["tokenmill_kv_blocks|engine=1"] == 500

    cluster(scenario, infos={1: small})


def test_metrics_of_tgi_are_sums_and_our_own_are_by_engine(cluster: Run) -> None:
    async def scenario(c: Cluster) -> None:
        for steps in (1, 2):
            for index, engine in enumerate(c.engines):
                engine.send(stats=Stats(
                    running=3 + index, waiting=10 * index, blocks_used=100, blocks_total=1000, steps=steps,
                    decode_tokens=5 * steps + index, batch_size=3, step_s=0.01,
                ))  # fmt: skip
        await until(lambda: samples(c.metrics.text())["tgi_batch_inference_count|method=decode"] == 4)
        found = samples(c.metrics.text())
        assert found["tgi_batch_current_size"] == 7
        assert found["tgi_queue_size"] == 10
        assert found["tgi_batch_current_max_tokens"] == 3200
        assert found["tgi_batch_inference_duration_count|method=decode"] == 4
        assert [found[f"tokenmill_running_requests|engine={i}"] for i in (0, 1)] == [3, 4]
        assert [found[f"tokenmill_waiting_requests|engine={i}"] for i in (0, 1)] == [0, 10]
        assert [found[f"tokenmill_decode_tokens_total|engine={i}"] for i in (0, 1)] == [10, 11]
        assert found["tokenmill_kv_usage_ratio|engine=1"] == 0.1
        await c.engines[1].stop()
        await until(lambda: c.num_connected == 1)
        found = samples(c.metrics.text())
        assert (found["tgi_batch_current_size"], found["tgi_queue_size"]) == (3, 0)

    cluster(scenario)


def test_prompt_details_and_timings_of_a_moved_request_are_whole_and_come_once(cluster: Run) -> None:
    async def scenario(c: Cluster) -> None:
        one = c.ask((5, 6, 7), timed=True)
        await until(lambda: one.id in c.engines[one.engine].requests)
        first, other = c.engines[one.engine], c.engines[1 - one.engine]
        details = PromptDetails(1, (TokenDetails(-0.5), TokenDetails(-0.25)))
        first.send(Output(one.id, payload=details, num_cached=2))
        first.step()
        await until(lambda: one.num_generated == 1)
        await first.stop()
        await until(lambda: one.id in other.requests)
        other.send(Output(one.id, payload=details, num_cached=9))
        other.step(finish="length")
        await until(lambda: bool(c.answers.finished))
        assert [detail.logprob for detail in one.prompt_details] == [-0.5, -0.25]
        assert one.num_cached == 2
        timings = one.engine_timings
        assert timings is not None
        assert (timings.queue_s, timings.decode_s, timings.num_forced) == (1.0, 0.25, 2 * TIMINGS.num_forced)
        assert (timings.num_preemptions, timings.largest_batch) == (2, 3)

    cluster(scenario)


def test_an_output_that_cannot_be_handled_ends_its_request_alone(cluster: Run) -> None:
    async def scenario(c: Cluster) -> None:
        bad, good = await c.asked(2)
        failed: list[str] = []
        bad._answer = SimpleNamespace(failed=lambda _, error: failed.append(str(error)))  # type: ignore[assignment]
        for engine in c.engines:
            engine.step()
        await until(lambda: c.answers.tokens == {good.id: [2]})
        await until(lambda: c.engines[0].aborted + c.engines[1].aborted == [bad.id])
        assert failed == ["Server error: AttributeError"]

    cluster(scenario)


def test_a_client_that_is_closed_moves_nothing(cluster: Run) -> None:
    async def scenario(c: Cluster) -> None:
        made = await c.asked(6)
        c.client.close()
        await until(lambda: len(c.answers.errors) == 6)
        assert not any(one.num_moves for one in made)

    cluster(scenario)
