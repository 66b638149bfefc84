"""The toy tools: the calculator against Python floats on random trees, hostile input, dates and units,
state, masked names."""

import datetime
import json
import math
import operator
import random
import time

import pytest

from toy_tools.tools import TOOLS, UNITS, ToolBox, calculate

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
             "^": operator.pow}
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "neg": 3, "^": 4, "number": 5}


def random_tree(rng, depth):
    if depth == 0 or rng.random() < 0.25:
        numbers = (rng.randrange(10), rng.randrange(200), round(rng.uniform(0, 20), 2))
        return ("number", rng.choice(numbers))
    op = rng.choice("+-*/^+-*/") if rng.random() < 0.85 else "neg"
    return (op, *(random_tree(rng, depth - 1) for _ in range(1 if op == "neg" else 2)))


def value_of(tree):
    """The tree in Python floats, without any text; None where the calculator has to refuse."""
    op, *parts = tree
    if op == "number":
        return float(parts[0])
    parts = [value_of(p) for p in parts]
    if None in parts:
        return None
    if op == "neg":
        return -parts[0]
    a, b = parts
    try:
        if op == "^" and abs(b) > 64:
            return None
        value = OPERATORS[op](a, b)
    except (ZeroDivisionError, OverflowError):
        return None
    return None if isinstance(value, complex) or abs(value) > 1e15 else value


def text_of(tree, rng):
    """The tree as text with no more parentheses than it needs (and at times some more), so that
    precedence and associativity matter."""
    op, *parts = tree
    if op == "number":
        return f"{parts[0]}"

    def child(part, lowest):
        text = text_of(part, rng)
        return f"({text})" if PRECEDENCE[part[0]] < lowest or rng.random() < 0.05 else text
    if op == "neg":
        return "-" + child(parts[0], 3)
    # ^ groups to the right, the others to the left
    left, right = (5, 3) if op == "^" else (PRECEDENCE[op], PRECEDENCE[op] + 1)
    spaces = ("", " ")
    return child(parts[0], left) + rng.choice(spaces) + op + rng.choice(spaces) + child(parts[1], right)


def test_calculator_equals_python_floats_on_random_trees():
    """Same operations in the same order on the same floats: equal to the last bit before the rounding
    to 4 decimals."""
    rng = random.Random(0)
    refused = 0
    compared = 0
    while compared < 2000:
        tree = random_tree(rng, rng.randrange(1, 5))
        text = text_of(tree, rng)
        expected = value_of(tree)
        if len(text) > 200:
            continue
        if expected is None:
            refused += 1
            with pytest.raises(ValueError):
                calculate(text)
        else:
            compared += 1
            assert calculate(text) == round(expected, 4), text
    assert refused > 100  # division by zero, exponents and results out of bounds, complex roots


@pytest.mark.parametrize("text, value", [
    ("2^3^2", 512), ("-2^2", -4), ("2^-1", 0.5), ("10-4-3", 3), ("100/10/5", 2), (" ( 1+2 )*3 ", 9),
    ("--3", 3), (".5+.5", 1), ("1/3", 0.3333)])
def test_calculator_by_hand(text, value):
    assert calculate(text) == value and type(calculate(text)) is type(value)


HOSTILE = [
    "9**9**9", "9^9^9", "99999999999999^64", "(" * 10_000, "1+" * 150 + "1", "(" * 99 + "1" + ")" * 99,
    "1" * 10**6, "1" * 200, "-" * 10**6, "__import__('os')", "NaN", "inf", "1e9",
    "", " ", "()", "(1", "1)", "1 2", "1.2.3", "1+", "*1", "٣+1", "½", "\x00",
    "1/0", "1/(2-2)", "0^-1", "(-8)^0.5"]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: ascii(t[:12]))
def test_hostile_expressions_are_refused_in_milliseconds(text):
    start = time.perf_counter()
    with pytest.raises(ValueError) as error:
        calculate(text)
    assert time.perf_counter() - start < 0.1
    assert 10 < len(str(error.value)) < 100  # a sentence for the model, not an echo of a megabyte


def test_every_tool_refuses_wrong_types_and_values_in_a_sentence():
    """Nothing but ValueError leaves a tool, whatever JSON (or Python's NaN and infinity) comes in."""
    bad = [None, True, [], {}, "", "x" * 10**6, "\x00", "2025-13-01", "20250314",
           10**400, -10**18, 1e308, math.nan, math.inf, -math.inf, [[1]], {"a": 1}]
    for name, tool in TOOLS.items():
        call = ToolBox().functions[name]
        for value in bad:
            try:
                result = call(**{p: value for p in tool.parameters})
            except ValueError as error:
                assert 10 < len(str(error)) < 250, (name, str(error)[:300])
            else:  # only a plain string can be right everywhere
                assert isinstance(value, str) and len(value) <= 1000 and json.dumps(result), (name, value)
        for arguments in ({}, {**dict.fromkeys(tool.parameters, "a"), "extra": 1}):
            with pytest.raises(ValueError, match="argument"):
                call(**arguments)


@pytest.mark.parametrize("name, arguments", [
    ("add_days", {"date": "2025-03-14", "days": 2.5}),
    ("add_days", {"date": "2025-03-14", "days": True}),
    ("add_days", {"date": "9999-12-30", "days": 5}),
    ("get_weekday", {"date": "2025-02-30"}),
    ("get_weekday", {"date": "20250314"}),
    ("get_weekday", {"date": "2025-W11-5"}),
    ("add_reminder", {"text": "x", "date": "soon"}),
    ("book_table", {"restaurant": "Luna", "people": 0}),
    ("cancel_booking", {"code": "B1"}),
    ("find_contact", {"name": "nobody"}),
    ("convert_units", {"value": 1, "source": "km", "target": "kg"}),
    ("convert_currency", {"amount": 1, "source": "USD", "target": "ABC"}),
    ("translate_words", {"words": "a", "language": "Klingon"})], ids=str)
def test_what_a_tool_cannot_do_is_refused(name, arguments):
    with pytest.raises(ValueError):
        ToolBox().functions[name](**arguments)


def test_dates_against_datetime():
    rng = random.Random(1)
    box = ToolBox().functions
    names = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
    for _ in range(300):
        day = datetime.date(1900, 1, 1) + datetime.timedelta(rng.randrange(80_000))
        n = rng.randrange(-5000, 5000)
        later = datetime.date.fromordinal(day.toordinal() + n)
        assert box["add_days"](date=str(day), days=n) == str(later)
        assert box["get_weekday"](date=str(day)) == names[(day.toordinal() - 1) % 7]


def test_units_and_currencies():
    convert = ToolBox().functions["convert_units"]
    money = ToolBox().functions["convert_currency"]
    assert convert(value=5, source="mile", target="m") == 8046.72
    assert convert(value=2.5, source="km", target="cm") == 250_000
    assert money(amount=100, source="GBP", target="USD") == 127
    assert money(amount=10, source="USD", target="EUR") == 9.26
    rng = random.Random(2)
    for _ in range(300):
        a = rng.choice(list(UNITS))
        b = rng.choice([u for u in UNITS if UNITS[u][0] == UNITS[a][0]])
        value = rng.uniform(1000, 9999)
        there = convert(value=value, source=a, target=b)
        slack = 1e-4 * (1 + UNITS[b][1] / UNITS[a][1])  # both results are rounded to 4 decimals
        assert abs(convert(value=there, source=b, target=a) - value) <= slack


def test_lookups_are_the_same_everywhere():
    """Pinned values: a hash that depended on the process, the platform or the Python version would
    change them."""
    box = ToolBox().functions
    assert box["get_weather"](city="Oslo") == {"city": "Oslo", "sky": "windy", "celsius": 24}
    assert box["local_time"](city="Lima") == "11:42"
    assert box["stock_price"](company="ABCD") == {"company": "ABCD", "price": 402.77}
    assert box["translate_words"](words="Bread", language="Dutch") == "breadje"


def test_a_whole_number_is_the_same_however_it_is_written():
    """JSON's 4.0 fits the schema of an integer and equals gold's 4: the tool answers and does the same."""
    (one, whole), (other, written) = ((box, box.functions["book_table"](restaurant="Luna", people=people))
                                      for box, people in ((ToolBox(), 4), (ToolBox(), 4.0)))
    assert whole == written and json.dumps(one.state) == json.dumps(other.state)


def test_state_belongs_to_one_episode():
    initial = {"contacts": {"Ana": {"city": "Oslo"}}, "bookings": {"B7": ["Luna", 2]}}
    before = json.dumps(initial)
    a = ToolBox(initial)
    b = ToolBox(initial)
    a.functions["cancel_booking"](code="B7")
    code = a.functions["book_table"](restaurant="Sakura", people=4)["code"]
    a.functions["add_reminder"](text="milk", date="2025-03-14")
    a.functions["send_message"](to="x@mail.com", text="hi")
    a.functions["find_contact"](name="Ana")["city"] = "changed"
    assert a.state["bookings"] == {code: ["Sakura", 4]}
    assert a.state["reminders"] == [["2025-03-14", "milk"]]
    assert a.state["messages"] == [["x@mail.com", "hi"]]
    assert json.dumps(initial) == before and json.dumps(b.state) == before
    assert b.functions["book_table"](restaurant="Sakura", people=4)["code"] in b.state["bookings"]
    with pytest.raises(ValueError, match="no booking"):
        a.functions["cancel_booking"](code="B7")
    assert ToolBox().state == {}


def test_masked_names_reach_the_real_tool_and_errors_speak_in_masked_names():
    aliases = {"qwert": ["convert_currency", {"aa": "amount", "bb": "source", "cc": "target"}],
               "zzz": ["book_table", {"x": "restaurant", "y": "people"}]}
    box = ToolBox({"aliases": aliases})
    assert box.functions["qwert"](aa=100, bb="GBP", cc="USD") == 127
    assert box.functions["zzz"](x="Luna", y=3)["code"] in box.state["bookings"]
    refused = (({"aa": "100", "bb": "GBP", "cc": "USD"}, "aa"),
               ({"aa": 1, "bb": "GBP"}, "cc"),
               ({"amount": 1, "bb": "GBP", "cc": "USD"}, "aa"))
    for arguments, word in refused:
        with pytest.raises(ValueError, match=rf"\b{word}\b"):
            box.functions["qwert"](**arguments)


def test_schemas_are_short_and_complete():
    assert 14 <= len(TOOLS) <= 18
    for name, tool in TOOLS.items():
        schema = tool.schema()
        function = schema["function"]
        parameters = function["parameters"]
        assert schema["type"] == "function" and function["name"] == name
        assert parameters["type"] == "object" and 1 <= len(tool.parameters) <= 3
        assert parameters["required"] == list(parameters["properties"])
        assert len(function["description"].split()) <= 8
        parameters["properties"].clear()
        assert tool.schema()["function"]["parameters"]["properties"]  # callers get a copy
