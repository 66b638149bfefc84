"""The check of arguments against a tool's schema: what it refuses, leaves alone, and says."""

import pytest

import rest
from toy_tools.schema import check, member, valid_text

STRING, INTEGER = {"type": "string"}, {"type": "integer"}
SCHEMA = {"type": "object", "required": ["n"], "properties": {
    "n": INTEGER, "x": {"type": "number"}, "s": {"type": "string", "enum": ["a", "b"]},
    "b": {"type": "boolean"}, "l": {"type": "array", "items": STRING},
    "o": {"type": "object", "properties": {"k": INTEGER}, "required": ["k"]},
    "free": {"type": "object"}, "any": {}, "maybe": {"type": ["string", "null"]}}}


@pytest.mark.parametrize("more", [
    {}, {"x": 2}, {"x": 2.5}, {"s": "a"}, {"b": False}, {"l": ["a"]}, {"l": []}, {"o": {"k": 3}},
    {"free": {"z": 1}}, {"any": [None]}, {"maybe": None}, {"n": 1.0}, {"n": -3e300}])
def test_arguments_that_fit(more):
    check({"n": 1, **more}, SCHEMA)


@pytest.mark.parametrize("more, reason", [
    ({"n": "1"}, "n must be of type integer"), ({"n": 1.5}, "integer"), ({"n": True}, "integer"),
    ({"n": None}, "integer"), ({"x": "2"}, "number"), ({"x": True}, "number"), ({"b": 0}, "boolean"),
    ({"s": "c"}, "s must be one of a, b"), ({"l": "a"}, "array"), ({"l": ["a", 1]}, r"l\[1\] must be"),
    ({"o": {}}, r"missing argument o\.k"), ({"o": {"k": "x"}}, r"o\.k must be of type integer"),
    ({"o": {"k": 1, "j": 2}}, r"unexpected argument o\.j"), ({"zzz": 1}, "unexpected argument zzz"),
    ({"maybe": 3}, "maybe must be of type string or null")])
def test_arguments_that_do_not_fit(more, reason):
    """The sentence names the place and what is wanted there, since the model reads it."""
    with pytest.raises(ValueError, match=reason):
        check({"n": 1, **more}, SCHEMA)
    with pytest.raises(ValueError, match="missing argument n"):
        check({}, SCHEMA)
    with pytest.raises(ValueError, match="unexpected argument zzz"):  # named before a wrong value
        check({"n": "1", "zzz": 1}, SCHEMA)
    with pytest.raises(ValueError, match="arguments must be of type object"):
        check([], SCHEMA)


@pytest.mark.parametrize("value", [1.0, 2, -1e15])
def test_reward_and_check_have_one_notion_of_equality(value):
    """What the reward calls equal to an integer gold is an integer for the check, as in JSON Schema."""
    assert rest.same_value(value, int(value))
    check(value, INTEGER)
    check(value, {"enum": [int(value)]})
    with pytest.raises(ValueError):
        check(True, {"enum": [1]})


@pytest.mark.parametrize("schema, value", [
    ({"anyOf": [STRING, INTEGER]}, []), ({"oneOf": [STRING]}, 3), ({"allOf": [STRING]}, 3),
    ({"not": STRING}, "x"),
    ({"$ref": "#/$defs/x"}, 3), ({"const": 1}, 2), ({"pattern": "^a$", "type": "string"}, "b"),
    ({"minimum": 3}, 1),
    ({"type": "dict"}, 3), ({"type": ["str", "integer"]}, "x"), ({"type": None}, 3),
    ({"type": {"a": 1}}, 3),
    ({"enum": "abc"}, "x"), ({"required": True}, {}), ({"required": None, "properties": None}, {"a": 1}),
    ({"items": [INTEGER]}, ["x"]), ({"items": None}, [1]),
    ({"items": INTEGER, "prefixItems": [STRING]}, ["x", 1]),
    ({"properties": {"a": True}}, {"a": 3}), ({"properties": {"a": None}}, {"a": 3}), (True, 3), ({}, 3),
    ({"properties": {"a": {"type": "string", "nullable": True}}}, {"a": None})])
def test_what_is_not_understood_is_left_alone(schema, value):
    check(value, schema)


@pytest.mark.parametrize("more, takes, refuses", [
    ({}, [], ["x", 1]), ({"additionalProperties": False}, [], ["x", 1]),
    ({"additionalProperties": True}, ["x", 1], []),
    ({"additionalProperties": {}}, ["x", 1], []), ({"additionalProperties": STRING}, ["x"], [1]),
    ({"patternProperties": {"^X-": STRING}}, ["x", 1], []), ({"anyOf": [{}]}, ["x", 1], []),
    ({"patternProperties": {"^X-": STRING}, "additionalProperties": False}, ["x"], []),
    ({"allOf": [{}]}, ["x"], []), ({"oneOf": [{}]}, ["x"], []), ({"$ref": "#"}, ["x"], []),
    ({"if": {}}, ["x"], []),
    ({"$ref": "#", "additionalProperties": False}, [], ["x"])])
def test_members_beside_the_properties(more, takes, refuses):
    """A map of headers, or parts that are not judged, allow members that the properties do not list;
    else there are none."""
    schema = {"type": "object", "properties": {"a": INTEGER}, **more}
    for value in takes:
        check({"a": 1, "X-b": value}, schema)
    for value in refuses:
        with pytest.raises(ValueError, match="X-b"):
            check({"a": 1, "X-b": value}, schema)
    with pytest.raises(ValueError, match="a must be of type integer"):  # what is known is still held to
        check({"a": "x"}, schema)


def test_objects_without_properties():
    """Such an object is free, but for what additionalProperties and required say."""
    check({"x": 1}, {"type": "object"})
    for schema, reason in (({"additionalProperties": False}, "unexpected argument x"),
                           ({"required": ["y"]}, "missing"),
                           ({"additionalProperties": STRING}, "x must be of type string")):
        with pytest.raises(ValueError, match=reason):
            check({"x": 1}, schema)
    with pytest.raises(ValueError, match="unexpected argument a"):
        check({"a": 1}, {"properties": {"a": False}})
    assert member({"properties": {"a": STRING}}, "a") is STRING and member({}, "a") is True


def test_messages_are_text_that_a_tokenizer_takes():
    """Half a surrogate pair in a key or an option must not end the run when the message is tokenised;
    long keys are cut."""
    half = "\ud83d"
    for value, schema in (({half: 1}, {"properties": {}}), ({}, {"required": [half]}),
                          ("x", {"enum": [half, {half: 1}]}),
                          ({half: 1}, {"properties": {half: STRING}})):
        with pytest.raises(ValueError, match="\ufffd") as error:
            check(value, schema)
        str(error.value).encode("utf-8")
    with pytest.raises(ValueError) as error:
        check({"k" * 10**6: 1}, {"properties": {}})
    assert len(str(error.value)) < 200
    with pytest.raises(ValueError, match='must be one of été, 3, null, true, {"π": 1}'):
        check(0, {"enum": ["été", 3, None, True, {"π": 1}]})


def test_valid_text():
    """Halves become U+FFFD one by one; whole pairs, also in two parts, and all other text stay."""
    assert valid_text("a\ud83d\ude00b") == "a😀b"
    assert valid_text("\ude00\ud83d x\ud83d") == "\ufffd\ufffd x\ufffd"
    for text in ("", "naïve 漢字 😀 \x00 \u2028 \ufeff", "\ufffd"):
        assert valid_text(text) == text
