"""Tool-call formats, one file for each: the way in which a model family writes calls, found from its chat template or
by name.

`tools/<name>.py` has a `FORMAT` (see base.ToolFormat), whose `matches` recognizes templates that are written for it. At
most one matches; if none does, `generic` reads JSON.
"""

from __future__ import annotations

from functools import cache

from tokenmill.errors import Unsupported
from tokenmill.plugins import find, names
from tokenmill.text.tools.base import ToolFormat

_KIND = "text.tools"
_LAST = "generic"


def by_name(parser: str) -> ToolFormat:
    """Return the format of that name or alias, as other servers take it in `--tool-call-parser`. Raises Unsupported."""
    wanted = parser.lower()
    for form in formats():
        if wanted in (form.name, *form.aliases) or wanted.replace("-", "_") == form.name:
            return form
    raise Unsupported("tool-call parser", parser, known=[form.name for form in formats()])


def of_template(template: str) -> ToolFormat:
    """Return the format for which a chat template is written."""
    return next((form for form in formats() if form.matches(template)), by_name(_LAST))


@cache
def formats() -> tuple[ToolFormat, ...]:
    """Return every format, of this package and of others, by name."""
    found = [find(_KIND, name) for name in names(_KIND)]
    return tuple(getattr(one, "FORMAT", one) for one in found)
