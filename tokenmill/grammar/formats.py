"""String formats of JSON Schema: patterns for those that the grammar library reads loosely or not at all."""

from __future__ import annotations

_YEAR = "([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][48]|[13579][26]|[2468]0)00)"
_DATE = (
    f"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|"
    f"02-(0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+\-]([01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9\\-]{0,%d}[A-Za-z0-9])?"
_LONG, _SHORT = _LABEL % 61, _LABEL % 33
_BASE64 = "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
_UUID = "^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-%s[0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}$"

PATTERNS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "hostname": f"^({_LONG}(\\.{_LONG}){{0,2}}|{_SHORT}(\\.{_SHORT}){{0,6}})$",  # a name has at most 253 characters
    "base64": _BASE64,
    "byte": _BASE64,  # OpenAPI's name for base64
    **{f"uuid{version}": _UUID % version for version in range(1, 9)},
}
"""Formats that are rewritten into patterns, in ECMA's dialect."""

KEPT = frozenset(("duration", "email", "ipv4", "ipv6", "uri", "uuid"))
"""Formats that the grammar library serves exactly."""

OF_INTEGERS = frozenset(("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"))
OF_NUMBERS = OF_INTEGERS | {"float", "double", "decimal"}
"""Formats of numbers. They do not constrain strings."""

ANY_TEXT = frozenset(("binary", "password", "path", "file-path", "directory-path"))
"""Formats that describe a use and allow any text."""

REFUSED = frozenset(("idn-email", "idn-hostname", "iri", "iri-reference", "uri-reference", "uri-template", "regex",
                     "json-pointer", "relative-json-pointer"))  # fmt: skip
"""Formats of JSON Schema that are refused. Other formats are not defined by it, so a `pattern` beside them decides."""

SUPPORTED = ", ".join(sorted([*PATTERNS, *KEPT, *ANY_TEXT]))
