"""Resumption of a broken stream by another server: marks on events, and the tokens that an answer begins with.

Both are asked for by headers, for programs between client and server, such as `tokenmill.deploy`:

* `x-tokenmill-token-ids`: each event of a stream begins with the ids of its tokens, as SSE's `id: 12,345`.
* `x-tokenmill-resume`: base64 of token ids, three bytes each. The answer begins with these tokens instead of sampled
  ones. They are computed as a prompt is, and their events are sent again.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable

from tokenmill.errors import ValidationError
from tokenmill.server.call import Call

TOKEN_IDS_HEADER = b"x-tokenmill-token-ids"
RESUME_HEADER = b"x-tokenmill-resume"
MAX_RESUMED = 12_000
"""Tokens that fit into the header: all headers of a request may have 64 KiB."""
_ID_BYTES = 3


def encode_ids(ids: Iterable[int]) -> bytes:
    """Return token ids as the value of the header."""
    return base64.b64encode(b"".join(token_id.to_bytes(_ID_BYTES, "little") for token_id in ids))


class Marks:
    """Ids of the tokens since the last event. A token may have no event of its own."""

    def __init__(self) -> None:
        self._ids: list[int] = []

    def add(self, token_id: int) -> None:
        """Add the next token."""
        self._ids.append(token_id)

    def line(self) -> bytes:
        """Return the ids as the first line of an event, and begin anew; b"" if there are none."""
        ids, self._ids = self._ids, []
        return b"id: %s\n" % ",".join(map(str, ids)).encode() if ids else b""


def wants_token_ids(call: Call) -> bool:
    """Return True if events shall carry the ids of their tokens."""
    return bool(call.header(TOKEN_IDS_HEADER))


def resumed_ids(call: Call, num_sequences: int) -> tuple[int, ...]:
    """Return the token ids that the answer begins with. Raises ValidationError.

    `num_sequences`: of the answer; ids of several are not told apart.
    """
    value = call.header(RESUME_HEADER)
    if not value:
        return ()
    if num_sequences > 1:
        raise ValidationError(f"An answer of {num_sequences} sequences cannot be resumed; send the request again")
    try:
        data = base64.b64decode(value, validate=True)
    except binascii.Error:
        data = b"\0"
    ids = tuple(int.from_bytes(data[i : i + _ID_BYTES], "little") for i in range(0, len(data), _ID_BYTES))
    vocab_size = call.service.ready().limits.vocab_size
    if len(data) % _ID_BYTES or any(token_id >= vocab_size for token_id in ids):
        raise ValidationError(
            f"Invalid header x-tokenmill-resume: it must be base64 of token ids below {vocab_size}, three bytes each"
        )
    return ids
