"""The type of an entry of the route table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from tokenmill.server.call import Call
from tokenmill.text.options import Dialect

Handler = Callable[[Call], Awaitable[None]]


class Route(msgspec.Struct, frozen=True):
    """One method of one path. A path that ends in "/*" matches every longer one. `protected`: the API key is required;
    `generates`: TGI's metrics count the requests."""

    method: str
    path: str
    handler: Handler
    dialect: Dialect = "native"
    protected: bool = True
    generates: bool = False
