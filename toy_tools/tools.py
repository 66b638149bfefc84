"""Deterministic executable tools with JSON schemas. State (reminders, bookings, messages) lives in a ToolBox, one per episode."""

import copy
import datetime
import json
import math
import zlib
from dataclasses import dataclass

import rest
from toy_tools.schema import check


# ------------------------------------------------------------------------------------------------------------------- calculator

def calculate(expression):
    """Value of an arithmetic expression: + - * / ^, parentheses, decimals; a parser of its own, bounded in length, depth and magnitude.

    Raises ValueError with a sentence for the model."""
    if len(expression) > 200:
        raise ValueError("the expression is longer than 200 characters")
    pos = 0

    def peek():
        nonlocal pos
        while pos < len(expression) and expression[pos] == " ":
            pos += 1
        return expression[pos:pos + 1]

    def take(symbols):
        nonlocal pos
        symbol = peek()
        if symbol and symbol in symbols:
            pos += 1
            return symbol
        return ""

    def bounded(value):
        if isinstance(value, complex) or not abs(value) <= 1e15:
            raise ValueError("the result is not a real number below 1e15")
        return value

    def total(depth):
        value = product(depth)
        while op := take("+-"):
            right = product(depth)
            value = bounded(value + right if op == "+" else value - right)
        return value

    def product(depth):
        value = signed(depth)
        while op := take("*/"):
            right = signed(depth)
            if op == "/" and right == 0:
                raise ValueError("division by zero")
            value = bounded(value * right if op == "*" else value / right)
        return value

    def signed(depth):
        sign = 1
        while op := take("+-"):
            sign = -sign if op == "-" else sign
        return sign * power(depth)

    def power(depth):
        base = atom(depth)
        if not take("^"):
            return base
        exponent = signed(depth)  # right-associative: 2^3^2 = 2^9
        if abs(exponent) > 64:
            raise ValueError("the exponent is larger than 64")
        if base == 0 and exponent < 0:
            raise ValueError("division by zero")
        try:
            return bounded(float(base) ** exponent)
        except OverflowError:  # 1e14^64 is beyond what a float holds
            return bounded(math.inf)

    def atom(depth):
        nonlocal pos
        if depth > 30:
            raise ValueError("parentheses are nested more than 30 deep")
        if take("("):
            value = total(depth + 1)
            if not take(")"):
                raise ValueError("a parenthesis is not closed")
            return value
        peek()
        start = pos
        while pos < len(expression) and expression[pos] in "0123456789.":
            pos += 1
        try:
            value = float(expression[start:pos])
        except ValueError:
            raise ValueError(f"expected a number at position {start + 1}") from None
        return bounded(value)

    value = total(0)
    if peek():
        raise ValueError(f"unexpected {peek()!r} at position {pos + 1}")
    return number(value)


def number(value):
    """A float rounded to 4 decimals; an int where it is whole."""
    value = round(value, 4)
    return int(value) if value == int(value) else value


# ----------------------------------------------------------------------------------------------------------------- plain lookups

UNITS = {"km": ("length", 1000.0), "m": ("length", 1.0), "cm": ("length", 0.01), "mile": ("length", 1609.344), "foot": ("length", 0.3048),
         "kg": ("mass", 1.0), "g": ("mass", 0.001), "pound": ("mass", 0.45359237), "ounce": ("mass", 0.028349523),
         "litre": ("volume", 1.0), "ml": ("volume", 0.001), "gallon": ("volume", 3.785411784), "cup": ("volume", 0.2365882)}
RATES = {"USD": 1.0, "EUR": 1.08, "GBP": 1.27, "JPY": 0.0067, "CHF": 1.13, "CAD": 0.73, "SEK": 0.095, "INR": 0.012}
LANGUAGES = ("French", "German", "Spanish", "Italian", "Dutch", "Polish")
ENDINGS = dict(zip(LANGUAGES, ("eau", "ung", "ado", "ino", "je", "ski")))
SKIES = ("sunny", "cloudy", "rain", "snow", "windy", "fog")


def digest(*parts):
    """A number that is the same in every process (hash() is not)."""
    return zlib.crc32("|".join(map(str, parts)).encode())


def parse_date(text):
    try:
        if len(text) != 10 or text[7] != "-":  # from Python 3.11 on fromisoformat reads other ISO forms too
            raise ValueError
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is not a date of the form 2025-03-14") from None


def convert_units(value, source, target):
    for unit in (source, target):
        if unit not in UNITS:
            raise ValueError(f"unknown unit {unit[:40]!r}; known are {', '.join(UNITS)}")
    if UNITS[source][0] != UNITS[target][0]:
        raise ValueError(f"cannot convert {source} to {target}")
    return number(value * UNITS[source][1] / UNITS[target][1])


def convert_currency(amount, source, target):
    for currency in (source, target):
        if currency not in RATES:
            raise ValueError(f"unknown currency {currency[:40]!r}; known are {', '.join(RATES)}")
    return number(round(amount * RATES[source] / RATES[target], 2))


def add_days(date, days):
    if abs(days) > 100_000:
        raise ValueError("at most 100000 days can be added")
    try:
        return (parse_date(date) + datetime.timedelta(days=days)).isoformat()
    except OverflowError:
        raise ValueError("the result is not a date") from None


def weekday(date):
    return parse_date(date).strftime("%A")


def weather(city):
    return {"city": city, "sky": SKIES[digest("sky", city) % len(SKIES)], "celsius": digest("heat", city) % 40 - 5}


def local_time(city):
    return f"{digest('hour', city) % 24:02d}:{digest('minute', city) % 60:02d}"


def stock_price(company):
    return {"company": company, "price": digest("stock", company) % 50_000 / 100}


def translate(words, language):
    return words.lower() + ENDINGS[language]


def play_music(artist):
    return f"playing {artist}"


# --------------------------------------------------------------------------------------------------- tools with state, one ToolBox each

def find_contact(state, name):
    if name not in state.get("contacts", {}):
        raise ValueError(f"no contact named {name[:40]!r}")
    return state["contacts"][name]


def send_message(state, to, text):
    state.setdefault("messages", []).append([to, text])
    return f"sent to {to}"


def add_reminder(state, text, date):
    parse_date(date)
    state.setdefault("reminders", []).append([date, text])
    return f"reminder {len(state['reminders'])} set"


def book_table(state, restaurant, people):
    if not 1 <= people <= 50:
        raise ValueError("people must be between 1 and 50")
    number = digest("book", restaurant, people, len(state.get("bookings", {})))
    code = f"{'ABCDEFGH'[number % 8]}{number // 8 % 90 + 10}"
    state.setdefault("bookings", {})[code] = [restaurant, people]
    return {"code": code}


def cancel_booking(state, code):
    if code not in state.get("bookings", {}):
        raise ValueError(f"no booking with code {code[:40]!r}")
    del state["bookings"][code]
    return f"booking {code} cancelled"


# ---------------------------------------------------------------------------------------------------------------------- the tools

@dataclass
class Tool:
    """A tool: `parameters` are JSON schema properties, all required; a stateful function takes the episode's state first."""
    name: str
    description: str
    parameters: dict
    function: callable
    stateful: bool = False

    def schema(self):
        """The schema that chat templates render and the toolbox checks."""
        return {"type": "function", "function": {"name": self.name, "description": self.description, "parameters": {
            "type": "object", "properties": copy.deepcopy(self.parameters), "required": list(self.parameters)}}}


STRING, NUMBER, INTEGER = {"type": "string"}, {"type": "number"}, {"type": "integer"}
TOOLS = {tool.name: tool for tool in (
    Tool("calculator", "value of an arithmetic expression", {"expression": STRING}, calculate),
    Tool("convert_units", "convert length, mass or volume", {"value": NUMBER, "source": STRING, "target": STRING}, convert_units),
    Tool("convert_currency", "convert money", {"amount": NUMBER, "source": STRING, "target": STRING}, convert_currency),
    Tool("add_days", "the date some days after a date", {"date": STRING, "days": INTEGER}, add_days),
    Tool("get_weekday", "day of the week of a date", {"date": STRING}, weekday),
    Tool("get_weather", "current weather in a city", {"city": STRING}, weather),
    Tool("local_time", "current time in a city", {"city": STRING}, local_time),
    Tool("stock_price", "stock price of a company", {"company": STRING}, stock_price),
    Tool("translate_words", "translate words", {"words": STRING, "language": {"type": "string", "enum": list(LANGUAGES)}}, translate),
    Tool("play_music", "play songs of an artist", {"artist": STRING}, play_music),
    Tool("find_contact", "city and email of a person", {"name": STRING}, find_contact, True),
    Tool("send_message", "send a text to an address", {"to": STRING, "text": STRING}, send_message, True),
    Tool("add_reminder", "remind of something on a date", {"text": STRING, "date": STRING}, add_reminder, True),
    Tool("book_table", "book a restaurant table", {"restaurant": STRING, "people": INTEGER}, book_table, True),
    Tool("cancel_booking", "cancel a booking by its code", {"code": STRING}, cancel_booking, True))}


class ToolBox:
    """The tools of one episode: `.functions` {name: callable(**arguments)} over a private copy of `state`.

    state["aliases"], if there, maps each masked tool name to [real name, {masked parameter: real parameter}]."""

    def __init__(self, state=None):
        self.state = json.loads(json.dumps(state or {}))
        self.functions = {name: self._bind(tool, {}) for name, tool in TOOLS.items()}
        for alias, (name, parameters) in self.state.get("aliases", {}).items():
            self.functions[alias] = self._bind(TOOLS[name], parameters)

    def _bind(self, tool, parameters):
        masks = {real: mask for mask, real in parameters.items()}
        properties = {masks.get(name, name): schema for name, schema in tool.parameters.items()}  # as the model sees them

        def call(**arguments):
            try:
                check(arguments, {"properties": properties, "required": list(properties)})
            except ValueError as error:
                raise rest.InvalidArguments(str(error)) from None
            for name, value in arguments.items():
                if isinstance(value, str) and len(value) > 1000:
                    raise ValueError(f"{name} is longer than 1000 characters")
                if not isinstance(value, str) and not abs(value) <= 1e15:
                    raise ValueError(f"{name} must be a number below 1e15")
            arguments = {parameters.get(k, k): v for k, v in arguments.items()}
            return tool.function(self.state, **arguments) if tool.stateful else tool.function(**arguments)
        return call
