"""Constraint on the next tokens of one sequence: a grammar, a reasoning budget, or both.

This file works on token ids only, not on steps: `Constraints` calls `observe` with every token and sends the returned
messages.
"""

from __future__ import annotations

from collections import deque
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokenmill.wire.messages import Extend, Request

if TYPE_CHECKING:
    from tokenmill.grammar.base import Matcher

_NO_NEXT_TOKEN = "no token can follow by the grammar that was asked for"
_REFUSED = "the grammar that was asked for does not allow the token that was sampled"


class Constraint:
    """Constraint on one sequence.

    `matcher`: of its grammar, in the initial state; None: no grammar. `end_ids`: tokens that end a text. A matcher
    allows them where its grammar may end, even if the request does not stop at them.
    """

    def __init__(self, request: Request, matcher: Matcher | None, end_ids: tuple[int, ...]) -> None:
        stopping, grammar = request.stopping, request.grammar
        self.id, self.matcher = request.id, matcher
        self.num_tokens = self._prompt_length = len(request.prompt_ids)  # length of the sequence, as far as observed
        self.valid_from = 0  # number of the first batch whose sampled token counts
        self.ended = False
        self._max_length = self.num_tokens + stopping.max_new_tokens
        self._min_length = self.num_tokens + stopping.min_new_tokens
        self._stop_ids, self._end_ids = frozenset(stopping.stop_ids), end_ids
        self._final_ids = [i for i in end_ids if i in self._stop_ids]
        self._may_append = request.sampling.logprobs < 0  # False: logprobs need each token to be sampled
        self._after = grammar.after if grammar else ()
        self._unless, self._forced_ids = stopping.unless, stopping.forced_ids
        self._force_after = stopping.force_after if stopping.forced_ids else 0
        self._tail: deque[int] = deque(maxlen=max((len(ids) for ids in (*self._after, *self._unless)), default=0))
        self._pending: deque[int] = deque()  # must come next; each is sampled under a mask of its own
        self._refused = False
        self._grammar_active = matcher is not None and not self._after
        if self._grammar_active:
            forced = self._forced_tokens()
            self._pending.extend(forced[:1] if self._may_append else forced)
        for token_id in request.output_ids:
            self._replay(token_id)

    @property
    def deferred(self) -> bool:
        """True if sampling its next token must wait until the previous token is known."""
        return (self._grammar_active or bool(self._pending)) and not self.ended

    @property
    def needs_matcher(self) -> bool:
        """True if its matcher must fill its row of the mask before `restrict`."""
        return self._grammar_active and not self._pending

    def observe(self, token_id: int, free: bool) -> Extend | None:
        """Record a sampled token. Return the message for the scheduler, if any.

        `free`: the next step, already launched, samples without masks.
        """
        if self._pending:
            self._pending.popleft()
        self._advance(token_id)
        position = self.num_tokens
        token_ids: list[int] = []
        while not (self.ended or self._refused or self._pending) and (forced := self._forced_tokens()):
            if not self._may_append or (len(forced) == 1 and self._grammar_active and not free and not token_ids):
                self._pending.extend(forced)
            else:
                token_ids += self._append(forced)
        reason = self._reason()
        if not (token_ids or reason or (free and self.deferred)):
            return None
        self.ended |= bool(reason)
        return Extend(self.id, position, tuple(token_ids), reason, _REFUSED if reason == "error" else "")

    def restrict(self, bits: NDArray[np.uint32]) -> Extend | None:
        """Restrict a row of a mask, which its matcher has filled if `needs_matcher`, to the tokens allowed next.

        If none is allowed, end the sequence: allow everything in the row, and return the message for the scheduler.
        `bits`: a bit per token id, least significant first; modified in place.
        """
        if self._pending:
            bits[:] = 0
            _allow(bits, self._pending[0])
            return None
        may_end, why = self._forbid(bits, self._end_ids), _NO_NEXT_TOKEN
        if self.matcher is not None and self.matcher.failure:
            bits[:], may_end, why = 0, False, self.matcher.failure
        elif self.matcher is not None and self.matcher.done:
            bits[:] = 0
            may_end = True
        if self.num_tokens < self._min_length:
            self._forbid(bits, tuple(self._stop_ids))
        elif may_end:
            for token_id in self._final_ids:
                _allow(bits, token_id)
        if bits.any():
            return None
        bits[:] = 0xFFFFFFFF
        self.ended = True
        return Extend(self.id, self.num_tokens, (), "stop" if may_end else "error", "" if may_end else why)

    def _replay(self, token_id: int) -> None:
        """Advance by a token that another engine has generated. What must follow it is sampled under masks."""
        if self._pending:
            self._pending.popleft()
        self._advance(token_id)
        if not (self.ended or self._refused or self._pending):
            self._pending.extend(self._forced_tokens())

    def _advance(self, token_id: int) -> None:
        """Advance by one token."""
        self.num_tokens += 1
        if token_id in self._stop_ids or self.num_tokens == self._max_length:
            self.ended = True
            return
        self._tail.append(token_id)
        if self._grammar_active:
            assert self.matcher is not None
            self._refused = not self.matcher.accept(token_id)
        elif self.matcher is not None:
            self._grammar_active = self._has_seen(self._after)
        if self._force_after and self._has_seen(self._unless):
            self._force_after = 0

    def _append(self, token_ids: list[int]) -> list[int]:
        """Advance by tokens up to the first that ends the sequence. Return these tokens."""
        taken = []
        for token_id in token_ids:
            if self.ended or self._refused:
                break
            self._advance(token_id)
            taken.append(token_id)
        return taken

    def _forced_tokens(self) -> list[int]:
        """Return the tokens that must come next; [] if there is a choice."""
        if self._force_after and self.num_tokens - self._prompt_length >= self._force_after:
            self._force_after = 0
            if self._accepts(self._forced_ids):
                return list(self._forced_ids)
        if not self._grammar_active or self.matcher is None or self.matcher.done:
            return []
        forced = self.matcher.forced(self._max_length - self.num_tokens)
        early = self._min_length - self.num_tokens  # number of next tokens that must not be stop ids
        ends = (i for i, t in enumerate(forced) if t in self._end_ids or (i < early and t in self._stop_ids))
        return forced[: next(ends, len(forced))]  # whether it may end here is decided by a mask

    def _accepts(self, token_ids: tuple[int, ...]) -> bool:
        """Return True if the grammar allows `token_ids` next. The state does not change."""
        if not self._grammar_active or self.matcher is None:
            return True
        taken = sum(1 for _ in takewhile(self.matcher.accept, token_ids))
        self.matcher.rollback(taken)
        return taken == len(token_ids)

    def _reason(self) -> str:
        """Return the finish reason if the sequence ends for a cause unknown to the scheduler; else ""."""
        if self._refused:
            return "error"
        complete = self._grammar_active and self.matcher is not None and self.matcher.done
        if self.ended or self._pending or not complete:
            return ""
        return "stop" if not self._final_ids or self.num_tokens < self._min_length else ""

    def _has_seen(self, endings: tuple[tuple[int, ...], ...]) -> bool:
        tail = list(self._tail)
        return any(tail[-len(ids) :] == list(ids) for ids in endings if ids)

    @staticmethod
    def _forbid(bits: NDArray[np.uint32], token_ids: tuple[int, ...]) -> bool:
        """Forbid `token_ids`. Return True if any of them was allowed."""
        allowed = False
        for token_id in token_ids:
            bit = np.uint32(1 << token_id % 32)
            allowed |= bool(bits[token_id // 32] & bit)
            bits[token_id // 32] &= ~bit
        return allowed


def _allow(bits: NDArray[np.uint32], token_id: int) -> None:
    bits[token_id // 32] |= np.uint32(1 << token_id % 32)
