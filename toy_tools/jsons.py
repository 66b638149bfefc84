"""JSON as models write it: strict decoding that tells where each member stands, equality, and the check against a schema."""

import json
import math
import re

SPACE = re.compile(r"[ \t\r\n]*")
MAX_DEPTH = 64  # nesting of arguments; deeper JSON is refused before anything recurses over it


def _refuse(token):
    raise ValueError(f"{token} is not JSON")


def _finite(token):
    return float(token) if math.isfinite(float(token)) else _refuse(token)


JSON_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)


def scan_object(text, pos):
    """One top-level JSON object: {key: (value, start, end)}, the position behind it, and an error text or None.

    A member that breaks off is kept with end = None, so that its characters still get their region."""
    fields, key = {}, None
    try:
        if text[pos] != "{":
            raise ValueError("a call must be a JSON object that starts with '{'")
        pos = SPACE.match(text, pos + 1).end()
        while text[pos] != "}":
            key, pos = JSON_DECODER.raw_decode(text, pos)
            pos = SPACE.match(text, pos).end()
            if not isinstance(key, str) or key in fields or text[pos] != ":":
                raise ValueError(f"bad or repeated key {str(key)[:40]!r}")
            pos = SPACE.match(text, pos + 1).end()
            fields[key] = (None, pos, None)
            value, end = JSON_DECODER.raw_decode(text, pos)
            if _depth(value) > MAX_DEPTH:
                raise ValueError(f"nested more than {MAX_DEPTH} deep")
            fields[key] = (value, pos, end)
            pos = SPACE.match(text, end).end()
            if text[pos] == ",":
                pos = SPACE.match(text, pos + 1).end()
                if text[pos] == "}":
                    raise ValueError("a comma before '}'")
            elif text[pos] != "}":
                raise ValueError("expected ',' or '}'")
        return fields, pos + 1, None
    except RecursionError:
        return fields, pos, f"nested more than {MAX_DEPTH} deep"
    except IndexError:
        return fields, min(pos, len(text)), "the JSON object is not closed"
    except ValueError as error:  # JSONDecodeError, NaN, Infinity, integers of thousands of digits
        return fields, pos, f"not valid JSON: {str(error)[:100]}"


def _depth(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def same_value(a, b):
    """JSON equality: 1 equals 1.0, but True is not 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict, "null": type(None)}


def check(value, schema, where=""):
    """JSON schema's everyday subset: type (one or a list), enum, required, properties, items. Keys of an object without properties are free.

    Raises ValueError with a sentence for the model."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    fits = [isinstance(value, TYPES[k]) and (k == "boolean" or not isinstance(value, bool)) for k in kinds if k in TYPES]
    if fits and not any(fits):
        raise ValueError(f"{where or 'arguments'} must be of type {' or '.join(kinds)}")
    if "enum" in schema and not any(same_value(value, option) for option in schema["enum"]):
        raise ValueError(f"{where or 'arguments'} must be one of {', '.join(map(str, schema['enum']))}")
    if isinstance(value, dict) and "properties" in schema:
        inside = where + "." if where else ""
        for name in (*schema.get("required", ()), *value):
            if name not in value:
                raise ValueError(f"missing argument {inside + name}")
            if name not in schema["properties"]:
                raise ValueError(f"unexpected argument {(inside + name)[:60]}")
        for name, item in value.items():
            check(item, schema["properties"][name], inside + name)
    if isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            check(item, schema["items"], f"{where}[{i}]")
