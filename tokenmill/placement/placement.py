"""Placement: chooses the replica of each request.

The rule: **the replica with the least work before and by the request**, in tokens. That is its outstanding tokens, plus
twice those of the prompt that it does not hold: once because this request waits for them, and once because those behind
it do. Compared are two replicas drawn at random (power of two choices), two that hold the longest prefix, and two that
hold the longest prefix of which there are more holders. So

* a cached prefix decides as long as the replica has at most twice as many tokens more outstanding as it saves;
* no replica is piled on: that is also the most by which the chosen one exceeds the better of two random ones, and with
  a prefix that all hold it is plain power of two choices;
* several routers that do not know each other do not all choose the same replica, because each draws its own.

A token of a prompt and one of a running answer count the same: a step takes about as much longer for either, on the
CPU (0.27 and 0.36 ms for the embedded model) as on a GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from random import Random
from typing import Generic, TypeVar

from tokenmill.placement.prefixes import PrefixIndex
from tokenmill.placement.prompt import Prompt

MAX_KEYS = 1 << 20
"""Keys of a prefix index unless the caller gives a number: about 200 MB, the prefixes of 60 million tokens of prompts
of 2,000 tokens."""

_OWN = 2.0
"""Weight of a request's own tokens. In `bench/cluster_sim.py` with 20 replicas the p99 of the time to first token is
54 ms with it, and 56, 64, 84 with 1, 4, 8; under twice that load 97 ms, and 101, 110, 140."""

_FIRST_MEAN = 128.0  # tokens of an answer, until some have ended
_SHARE = 1 / 64  # of the newest value in a moving mean

NameT = TypeVar("NameT", bound=Hashable)


@dataclass(slots=True)
class _Replica(Generic[NameT]):
    """A replica. `others`: requests of other routers, as of its last report."""

    name: NameT
    number: int
    outstanding: float = 0.0  # tokens of this router's requests
    num_requests: int = 0  # of this router
    others: int = 0
    draining: bool = False


@dataclass(slots=True)
class Ticket(Generic[NameT]):
    """A placed request. `num_cached`: tokens of its prompt that the replica probably holds."""

    replica: NameT
    num_cached: int
    number: int
    prompt_tokens: float  # uncached ones that are not computed yet
    new_tokens: float  # expected


class Placement(Generic[NameT]):
    """The replicas, their outstanding tokens, and the prefixes that each probably caches.

    Names of replicas are the caller's. A decision takes time in the number of the prompt's keys, not in that of the
    replicas. Invariant: decisions are a function of `seed` and the calls so far.
    """

    def __init__(self, *, seed: int = 0, max_keys: int = MAX_KEYS) -> None:
        self._random = Random(seed)
        self._index = PrefixIndex(max_keys)
        self._by_name: dict[NameT, _Replica[NameT]] = {}
        self._by_number: dict[int, _Replica[NameT]] = {}
        self._open: list[_Replica[NameT]] = []  # those that take requests
        self._num_joined = 0
        self._mean_answer = _FIRST_MEAN
        self._outstanding, self._num_requests = 0.0, 0  # of all replicas

    def __len__(self) -> int:
        return len(self._by_name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @property
    def num_keys(self) -> int:
        """Number of prefixes in the index."""
        return len(self._index)

    def add(self, name: NameT, capacity: int) -> None:
        """Add a replica whose cache holds `capacity` tokens and is empty. One of the same name has restarted: it is
        removed first."""
        self.remove(name)
        self._num_joined += 1
        replica = _Replica(name, self._num_joined)
        self._index.join(replica.number, capacity)
        self._by_name[name] = self._by_number[replica.number] = replica
        self._open.append(replica)

    def remove(self, name: NameT) -> None:
        """Remove a replica and all that is recorded of it. Its tickets may still be passed to `started` and `ended`.
        Unknown names are ignored."""
        replica = self._by_name.pop(name, None)
        if replica is not None:
            self._add(replica, -replica.outstanding)
            self._num_requests -= replica.num_requests
            del self._by_number[replica.number]
            self._index.leave(replica.number)
            if not replica.draining:
                self._open.remove(replica)

    def drain(self, name: NameT, draining: bool = True) -> None:
        """Place nothing more on a replica, or, if not `draining`, place on it again. Unknown names are ignored."""
        replica = self._by_name.get(name)
        if replica is not None and replica.draining != draining:
            replica.draining = draining
            if draining:
                self._open.remove(replica)
            else:
                self._open.append(replica)

    def report(self, name: NameT, num_requests: int) -> None:
        """Record the number of requests that a replica has, running and waiting, of all routers.

        Those beyond this router's own count as much as its own do on average. Unknown names are ignored.
        """
        replica = self._by_name.get(name)
        if replica is not None:
            replica.others = max(0, num_requests - replica.num_requests)

    def record(self, name: NameT, prompt: Prompt, num_cached: int) -> None:
        """Record that another router has placed `prompt` on a replica, and what it expected to be cached there.

        Its load is that of `report`. Unknown names are ignored.
        """
        replica = self._by_name.get(name)
        if replica is not None:
            self._index.record(replica.number, prompt, min(num_cached, prompt.num_tokens))

    def outstanding(self, name: NameT) -> float:
        """Return the outstanding tokens of a replica: of prompts not computed yet, and expected of answers."""
        return self._load(self._by_name[name])

    def place(self, prompt: Prompt, max_new_tokens: int, exclude: Collection[NameT] = ()) -> Ticket[NameT] | None:
        """Choose a replica, and count the request as sent to it. None: no replica takes requests.

        `max_new_tokens`: most tokens of the answer. `exclude`: replicas that must not be chosen, such as those that
        have refused this request.
        """
        match = self._index.match(prompt)
        best: _Replica[NameT] | None = None
        least, cached = (0.0, 0), 0
        for replica in self._candidates(match.candidates(self._random), exclude):
            hit = min(match.num_cached(replica.number), prompt.num_tokens)
            work = (self._load(replica) + _OWN * (prompt.num_tokens - hit), -hit)
            if best is None or work < least:
                best, least, cached = replica, work, hit
        if best is None:
            return None
        self._index.record(best.number, prompt, cached)
        ticket = Ticket(
            best.name, cached, best.number, float(prompt.num_tokens - cached), min(max_new_tokens, self._mean_answer)
        )
        best.num_requests += 1
        self._num_requests += 1
        self._add(best, ticket.prompt_tokens + ticket.new_tokens)
        return ticket

    def started(self, ticket: Ticket[NameT]) -> None:
        """Record that the first token of an answer came: its prompt is computed. Idempotent."""
        replica = self._by_number.get(ticket.number)
        if replica is not None:
            self._add(replica, -ticket.prompt_tokens)
        ticket.prompt_tokens = 0.0

    def ended(self, ticket: Ticket[NameT], num_new: int, *, complete: bool = True) -> None:
        """Record the end of a request after `num_new` tokens. Call it once for each ticket.

        Until then an answer counts as one of mean length, as of what is known of running ones. `complete`: the answer
        was not cut off, so its length counts for that mean.
        """
        self.started(ticket)
        if complete:
            self._mean_answer += _SHARE * (num_new - self._mean_answer)
        replica = self._by_number.get(ticket.number)
        if replica is not None:
            replica.num_requests -= 1
            self._num_requests -= 1
            self._add(replica, -ticket.new_tokens if replica.num_requests else -replica.outstanding)
            self._index.advance(ticket.number, num_new)

    def _add(self, replica: _Replica[NameT], tokens: float) -> None:
        replica.outstanding += tokens
        self._outstanding += tokens

    def _load(self, replica: _Replica[NameT]) -> float:
        if not replica.others:
            return replica.outstanding
        mean = self._outstanding / self._num_requests if self._num_requests else self._mean_answer
        return replica.outstanding + replica.others * mean

    def _candidates(self, numbers: list[int], exclude: Collection[NameT]) -> list[_Replica[NameT]]:
        """Return the replicas with these numbers that take requests, and two drawn at random."""
        found = [self._by_number[number] for number in numbers]
        found = [replica for replica in found if not replica.draining and replica.name not in exclude]
        drawn = self._open if not exclude else [one for one in self._open if one.name not in exclude]
        count = len(drawn)
        if count:
            first = self._random.randrange(count)
            found.append(drawn[first])
            if count > 1:
                second = self._random.randrange(count - 1)
                found.append(drawn[second + (second >= first)])
        return found
