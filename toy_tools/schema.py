"""A tool's arguments against its JSON schema: held to what is understood, the rest is left alone."""

import json

import rest
from rest import valid_text

TYPES = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}
# beside these, an object may have members that its own "properties" do not list
ELSEWHERE = {"allOf", "anyOf", "oneOf", "if", "$ref", "$dynamicRef", "dependentSchemas"}


def check(value, schema, where=""):
    """Hold a JSON value to type, enum, required, properties, additionalProperties and items, at every
    depth. Anything else in a schema (anyOf, $ref, pattern, types of other languages) is not judged.

    1.0 is an integer, True is no number. One rule is stricter than JSON Schema's: an object that lists
    its properties takes no others, unless additionalProperties or a part that is not judged allows them.

    value: any JSON value; schema: dict, True or False; where: its name, "" for all arguments.
    Raises ValueError with a sentence for the model."""
    if schema is False:
        raise ValueError(f"unexpected argument {_shown(where)}")
    if not isinstance(schema, dict) or (value is None and schema.get("nullable")):
        return
    name = _shown(where) or "arguments"
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    known = all(isinstance(kind, str) and kind in TYPES for kind in kinds)
    if kinds and known and not any(_is(value, kind) for kind in kinds):
        raise ValueError(f"{name} must be of type {' or '.join(kinds)}")
    options = schema.get("enum")
    if isinstance(options, list) and not any(rest.same_value(value, option) for option in options):
        raise ValueError(f"{name} must be one of {', '.join(map(_literal, options))}")
    if isinstance(value, dict):
        inside = where + "." if where else ""
        required = schema.get("required")
        for key in required if isinstance(required, list) else ():
            if key not in value:
                raise ValueError(f"missing argument {_shown(inside + str(key))}")
        for key in sorted(value, key=lambda key: member(schema, key) is not False):  # what is too much first
            check(value[key], member(schema, key), inside + key)
    if isinstance(value, list) and "prefixItems" not in schema:
        items = schema.get("items")  # a list of schemas is an older form of prefixItems
        for i, item in enumerate(value):
            check(item, items if isinstance(items, dict) else True, f"{where}[{i}]")


def member(schema, key):
    """The schema of an object's member `key`: a dict, True (anything) or False (it must not be there)."""
    properties = schema.get("properties")
    if isinstance(properties, dict) and key in properties:
        return properties[key]
    if "patternProperties" in schema:
        return True
    closed = isinstance(properties, dict) and ELSEWHERE.isdisjoint(schema)
    return schema.get("additionalProperties", not closed)


def _is(value, kind):
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _shown(name):
    return valid_text(name[:60])


def _literal(option):
    return valid_text(option if isinstance(option, str) else json.dumps(option, ensure_ascii=False))
