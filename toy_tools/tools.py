"""Deterministic executable tools with JSON schemas. State (reminders, bookings, messages) lives in a
ToolBox, one per episode."""

import copy
import datetime
import json
import math
import zlib
from dataclasses import dataclass

import rest
from toy_tools.schema import check

# ---- calculator ----

def calculate(expression):
    """Value of an arithmetic expression: + - * / ^, parentheses, decimals; a parser of its own, bounded
    in length, depth and magnitude.

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


# ---- plain lookups ----

UNITS = {  # name: (what it measures, size)
    "km": ("length", 1000.0),
    "m": ("length", 1.0),
    "cm": ("length", 0.01),
    "mile": ("length", 1609.344),
    "foot": ("length", 0.3048),
    "kg": ("mass", 1.0),
    "g": ("mass", 0.001),
    "pound": ("mass", 0.45359237),
    "ounce": ("mass", 0.028349523),
    "litre": ("volume", 1.0),
    "ml": ("volume", 0.001),
    "gallon": ("volume", 3.785411784),
    "cup": ("volume", 0.2365882)}
RATES = {  # value in dollars
    "USD": 1.0, "EUR": 1.08, "GBP": 1.27, "JPY": 0.0067,
    "CHF": 1.13, "CAD": 0.73, "SEK": 0.095, "INR": 0.012}
LANGUAGES = ("French", "German", "Spanish", "Italian", "Dutch", "Polish")
ENDINGS = dict(zip(LANGUAGES, ("eau", "ung", "ado", "ino", "je", "ski")))
SKIES = ("sunny", "cloudy", "rain", "snow", "windy", "fog")


def digest(*parts):
    """A number that is the same in every process (hash() is not)."""
    return zlib.crc32("|".join(map(str, parts)).encode())


def _whole(value):
    # 4.0 is 4 in JSON: a tool must not tell them apart
    return int(value) if isinstance(value, float) and value.is_integer() else value


def parse_date(text):
    try:
        # from Python 3.11 on fromisoformat reads other ISO forms too
        if len(text) != 10 or text[7] != "-":
            raise ValueError
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is not a date of the form 2025-03-14") from None


def convert_units(value, source, target):
    for unit in (source, target):
        if unit not in UNITS:
            raise ValueError(f"unknown unit {unit[:40]!r}; known are {', '.join(UNITS)}")
    kind, size = UNITS[source]
    target_kind, target_size = UNITS[target]
    if kind != target_kind:
        raise ValueError(f"cannot convert {source} to {target}")
    return number(value * size / target_size)


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
    sky = SKIES[digest("sky", city) % len(SKIES)]
    return {"city": city, "sky": sky, "celsius": digest("heat", city) % 40 - 5}


def local_time(city):
    return f"{digest('hour', city) % 24:02d}:{digest('minute', city) % 60:02d}"


def stock_price(company):
    return {"company": company, "price": digest("stock", company) % 50_000 / 100}


def translate(words, language):
    return words.lower() + ENDINGS[language]


def play_music(artist):
    return f"playing {artist}"


# ---- tools with state, one ToolBox each ----

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


# ---- the tools ----

@dataclass
class Tool:
    """One row of the table below: all that there is to say about a tool, and how it is asked for."""

    name: str
    description: str
    parameters: dict         # JSON schema properties: any type, arrays and objects too
    function: callable       # function(**arguments); a stateful one takes the episode's state first
    what: str                # what a thought says that the user wants
    arguments: callable      # tasks.Draw -> arguments of a random request
    train: tuple             # phrasings of it, filled with the arguments, so that each value
    test: str                # stands in the text as it stands in the call; a held-out one
    stateful: bool = False
    optional: tuple = ()     # parameters that a call may leave out
    stand_ins: tuple = ()    # tools that could do its work, so that "nothing fits" would be wrong

    def schema(self):
        """The schema that chat templates render and the toolbox checks."""
        parameters = {
            "type": "object",
            "properties": copy.deepcopy(self.parameters),
            "required": [name for name in self.parameters if name not in self.optional]}
        return {"type": "function", "function": {
            "name": self.name, "description": self.description, "parameters": parameters}}


STRING = {"type": "string"}
NUMBER = {"type": "number"}
INTEGER = {"type": "integer"}
TOOLS = {tool.name: tool for tool in (
    Tool("calculator", "value of an arithmetic expression",
         {"expression": STRING}, calculate,
         what="result", arguments=lambda draw: {"expression": draw.expression()},
         test="compute the result of {expression} for me", train=(
             "what is {expression}?", "compute {expression}", "calculate {expression} for me",
             "the result of {expression}?")),
    Tool("convert_units", "convert length, mass or volume",
         {"value": NUMBER, "source": STRING, "target": STRING}, convert_units,
         what="conversion", arguments=lambda draw: draw.amount("value", UNITS),
         test="convert {value} {source} into {target} for me", train=(
             "convert {value} {source} to {target}", "how much is {value} {source} in {target}?",
             "{value} {source} in {target}", "I have {value} {source}, what is that in {target}?"),
         stand_ins=("calculator",)),
    Tool("convert_currency", "convert money",
         {"amount": NUMBER, "source": STRING, "target": STRING}, convert_currency,
         what="exchange",
         arguments=lambda draw: draw.amount("amount", dict.fromkeys(RATES, ("money",))),
         test="change {amount} {source} to {target} for me", train=(
             "change {amount} {source} into {target}", "I want {amount} {source} in {target}",
             "{amount} {source} in {target}", "I have {amount} {source} and want {target}")),
    Tool("add_days", "the date some days after a date",
         {"date": STRING, "days": INTEGER}, add_days,
         what="later date", arguments=lambda draw: {"date": draw.date(), "days": draw.number()},
         test="when is {days} days after {date}?", train=(
             "which date is {days} days after {date}?", "add {days} days to {date}",
             "{days} days from {date} is when?", "when is it {date} and {days} days?")),
    Tool("get_weekday", "day of the week of a date",
         {"date": STRING}, weekday,
         what="day of the week", arguments=lambda draw: {"date": draw.date()},
         test="tell me the weekday of {date}", train=(
             "what day of the week is {date}?", "which weekday was {date}?",
             "what weekday is {date}?", "tell me the day of {date}")),
    Tool("get_weather", "current weather in a city",
         {"city": STRING}, weather,
         what="weather", arguments=lambda draw: {"city": draw.city()},
         test="what is the weather now in {city}?", train=(
             "how is the weather in {city}?", "weather in {city} now",
             "tell me the weather of {city}", "what is the weather like in {city}?")),
    Tool("local_time", "current time in a city",
         {"city": STRING}, local_time,
         what="time", arguments=lambda draw: {"city": draw.city()},
         test="what is the local time in {city}?", train=(
             "what time is it in {city}?", "local time in {city}", "tell me the time of {city}",
             "how late is it in {city} now?")),
    Tool("stock_price", "stock price of a company",
         {"company": STRING}, stock_price,
         what="price", arguments=lambda draw: {"company": draw.company()},
         test="what is the price of a {company} stock?", train=(
             "price of {company} stock?", "what does a {company} stock cost?",
             "check the stock of {company}", "the stock price of {company} now")),
    Tool("translate_words", "translate words",
         {"words": STRING, "language": {"type": "string", "enum": list(LANGUAGES)}}, translate,
         what="translation",
         arguments=lambda draw: {"words": draw.thing(), "language": draw.rng.choice(LANGUAGES)},
         test="translate {words} to {language} for me", train=(
             "translate {words} into {language}", "what is {words} in {language}?",
             "the {language} word for {words}?", "how do I say {words} in {language}?")),
    Tool("play_music", "play songs of an artist",
         {"artist": STRING}, play_music,
         what="music", arguments=lambda draw: {"artist": draw.artist()},
         test="I want to hear music by {artist}", train=(
             "play something by {artist}", "play music of {artist}", "I want to hear {artist}",
             "a song by {artist}")),
    Tool("find_contact", "city and email of a person",
         {"name": STRING}, find_contact, stateful=True,
         what="contact", arguments=lambda draw: {"name": draw.name()},
         test="look up the contact of {name}", train=(
             "look up {name}", "where does {name} live?", "find the contact of {name}",
             "who is {name}?")),
    Tool("send_message", "send a text to an address",
         {"to": STRING, "text": STRING}, send_message, stateful=True,
         what="message", arguments=lambda draw: {"to": draw.email(), "text": draw.say()},
         test="send a message to {to}: {text}", train=(
             "write {text} to {to}", "send {to} the text {text}", "message {to}: {text}",
             "send a text to {to}, {text}")),
    Tool("add_reminder", "remind of something on a date",
         {"text": STRING, "date": STRING}, add_reminder, stateful=True,
         what="reminder", arguments=lambda draw: {"text": draw.thing(), "date": draw.date()},
         test="set a reminder about {text} on {date}", train=(
             "remind me of the {text} on {date}", "on {date} remind me about {text}",
             "set a reminder for {date}: {text}", "I need a reminder of the {text} on {date}")),
    Tool("book_table", "book a restaurant table",
         {"restaurant": STRING, "people": INTEGER}, book_table, stateful=True,
         what="table",
         arguments=lambda draw: {"restaurant": draw.place(), "people": draw.rng.randrange(2, 13)},
         test="reserve a table at {restaurant} for {people} people", train=(
             "book a table for {people} at {restaurant}",
             "reserve {restaurant} for {people} people",
             "a table at {restaurant}, we are {people}",
             "get me a table at {restaurant} for {people}")),
    Tool("cancel_booking", "cancel a booking by its code",
         {"code": STRING}, cancel_booking, stateful=True,
         what="cancellation", arguments=lambda draw: {"code": draw.code()},
         test="I want to cancel booking {code}", train=(
             "cancel booking {code}", "please cancel my booking {code}",
             "drop the booking {code}", "I do not want booking {code}, cancel it")))}


class ToolBox:
    """The tools of one episode: `.functions` {name: callable(**arguments)} over a private copy of
    `state`.

    state["aliases"], if there, maps each masked tool name to
    [real name, {masked parameter: real parameter}]."""

    def __init__(self, state=None):
        self.state = json.loads(json.dumps(state or {}))
        self.functions = {name: self._bind(tool, {}) for name, tool in TOOLS.items()}
        for alias, (name, parameters) in self.state.get("aliases", {}).items():
            self.functions[alias] = self._bind(TOOLS[name], parameters)

    def _bind(self, tool, parameters):
        masks = {real: mask for mask, real in parameters.items()}
        shown = tool.schema()["function"]["parameters"]  # as the model sees it
        properties = shown["properties"].items()
        shown["properties"] = {masks.get(name, name): part for name, part in properties}
        shown["required"] = [masks.get(name, name) for name in shown["required"]]

        def call(**arguments):
            try:
                check(arguments, shown)
            except ValueError as error:
                raise rest.InvalidArguments(str(error)) from None
            for name, value in arguments.items():
                if isinstance(value, str) and len(value) > 1000:
                    raise ValueError(f"{name} is longer than 1000 characters")
                if isinstance(value, (int, float)) and not abs(value) <= 1e15:
                    raise ValueError(f"{name} must be a number below 1e15")
            real = {parameters.get(name, name): _whole(value) for name, value in arguments.items()}
            if tool.stateful:
                return tool.function(self.state, **real)
            return tool.function(**real)
        return call
