"""HTTP workers tell each other where they place, so a conversation finds its engine through any of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from support_engines import until

from tokenmill.placement.placement import Placement
from tokenmill.placement.prompt import Prompt, prompt_of_tokens
from tokenmill.server.peers import Peers

Told = list[tuple[int, Prompt, int]]


def test_each_worker_gets_what_the_others_placed_and_nothing_of_its_own(tmp_path: Path) -> None:
    async def main() -> None:
        told: list[Told] = [[], [], []]
        workers = [
            Peers(str(tmp_path), index, 3, lambda *placed, index=index: told[index].append(placed))  # type: ignore[misc]
            for index in range(3)
        ]
        for worker in workers:
            worker.listen()
        long, none = prompt_of_tokens(range(100_000)), prompt_of_tokens([])
        workers[0].tell(1, long, 64)
        workers[2].tell(0, none, 0)
        await until(lambda: len(told[1]) == 2)
        assert sorted(told[1]) == sorted([(1, long, 64), (0, none, 0)])
        assert told[0] == [(0, none, 0)]
        assert told[2] == [(1, long, 64)]
        for worker in workers:
            worker.close()
            worker.close()

    asyncio.run(main())


def test_a_worker_that_is_not_there_or_does_not_read_delays_no_other(tmp_path: Path) -> None:
    async def main() -> None:
        told: Told = []
        one, deaf = Peers(str(tmp_path), 0, 3, lambda *placed: None), Peers(str(tmp_path), 1, 3, lambda *placed: None)
        for _ in range(5000):  # more than a socket's buffer
            one.tell(0, prompt_of_tokens(range(2000)), 0)
        deaf.close()
        again = Peers(str(tmp_path), 1, 3, lambda *placed: told.append(placed))  # after a restart of the worker
        again.listen()
        one.tell(1, prompt_of_tokens(range(20)), 0)
        await until(lambda: bool(told))
        assert [engine for engine, _, _ in told] == [1]
        one.close()
        again.close()

    asyncio.run(main())


def test_a_prompt_that_another_router_placed_is_found(tmp_path: Path) -> None:
    talk = prompt_of_tokens(range(500))
    for home in range(4):
        placement: Placement[int] = Placement()
        for name in range(4):
            placement.add(name, 10_000)
        placement.record(home, talk, 0)
        placement.record(99, talk, 0)
        ticket = placement.place(talk, 10)
        assert ticket is not None
        assert (ticket.replica, ticket.num_cached) == (home, 480)
        assert placement.outstanding(home) == 20 + 10
