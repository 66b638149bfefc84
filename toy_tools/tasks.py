"""Task generators in BFCL's categories over the toy tools: seeded, with disjoint train and test splits (held-out entities and phrasings).

A row: messages, tools (schemas), gold (one list of calls per assistant turn to come), category, state (of the ToolBox), and demo (per turn a
clean thought and, where the turn answers, a response), from which the warm start makes its demonstrations."""

import json
import random
import re

from toy_tools.tools import LANGUAGES, RATES, TOOLS, UNITS, ToolBox

CATEGORIES = ("simple", "multiple", "parallel", "irrelevance", "multi_turn")

# ---------------------------------------------------------------------------------------------- entities, every third one held out

FIRST = ("Ana Ben Carla David Elena Felix Grace Hugo Irene Jonas Karin Liam Mara Nils Olga Pablo Quinn Rosa Simon Tara Umar Vera Wanda Xavier "
         "Yara Zoe Amir Bianca Cyrus Dora Emil Fatima Gustav Helga Ivan Julia Kofi Lucia Marek Nadia Oscar Petra Rafael Selma Tomas Ursula").split()
LAST = ("Abbott Berger Castro Dumont Eriksen Fischer Garcia Hansen Ivanov Jansen Keller Lopez Moreau Novak Okafor Petrov Rossi Santos Tanaka "
        "Ueda Vargas Weber Young Zimmer Almeida Bauer Costa Duarte Engel Ferrari Gomez Huber Ilic Jensen Kovac Lindgren Meyer Nilsen").split()
CITY = ("Oslo Lima Cairo Paris Tokyo Delhi Quito Rabat Seoul Turin Vienna Warsaw Zagreb Athens Berlin Chicago Dublin Geneva Havana Istanbul Jakarta "
        "Kyoto Lisbon Madrid Nairobi Ottawa Prague Riga Sofia Tunis Utrecht Venice Bogota Bergen Cardiff Denver Fresno Ghent Hanoi Izmir Kigali Leeds "
        "Malaga Naples Odessa Porto Rouen Split Tampa Uppsala").split()
THING = ("bread milk tickets flowers taxes laundry passport glasses keys battery invoice homework printer garden dentist bicycle novel guitar "
         "charger blanket camera jacket mirror pillow basket candle ladder bucket carpet hammer").split()
PLACE = ("Luna Bistro,Golden Fork,Casa Verde,Blue Lantern,Old Mill,River House,Sakura,Trattoria Roma,The Anchor,Green Olive,Fuego,Le Jardin,Red Dragon,"
         "Harbour Grill,Spice Route,Corner Cafe,Stone Oven,Silver Spoon,Mango Tree,North Star").split(",")
BAND = ("Blue Harbor,Night Owls,Paper Kites,The Sparrows,Velvet Room,Iron Garden,Lost Maps,Silent Drums,Copper Sky,Hollow Pines,Wild Rivers,"
        "Electric Fern,Broken Compass,Winter Coats,Pale Lights").split(",")
SAY = ("see you soon,call me back,happy birthday,I am late,meeting moved,thanks for lunch,good luck,bring the keys,we won,train delayed,all is well,"
       "dinner at eight,check the report,well done,start without me").split(",")


def pool(items, split):
    return [x for i, x in enumerate(items) if (i % 3 == 2) == (split == "test")]


class Draw:
    """Random entities of one split."""

    def __init__(self, rng, split):
        self.rng, self.split = rng, split

    def pick(self, items):
        return self.rng.choice(pool(items, self.split))

    def number(self, low, high):
        """Whole numbers; a multiple of 3 only in the test split, never in training."""
        n = 3 * self.rng.randrange(-(-low // 3), high // 3)
        return n if self.split == "test" else n + self.rng.choice((1, 2))

    def name(self):
        return f"{self.pick(FIRST)} {self.pick(LAST)}"

    def date(self):
        return f"20{self.rng.randrange(20, 30)}-{self.rng.randrange(1, 13):02d}-{self.rng.randrange(1, 10) * 3 - (self.split != 'test'):02d}"

    def symbol(self):
        letters = "ABCDEFGHJKLMNPRSTUVWXYZ"
        return "".join(self.rng.choice(letters[self.split == "test"::2]) for _ in range(4))

    def expression(self):
        a, b, c = (self.number(2, 99) for _ in range(3))
        return self.rng.choice((f"{a} + {b}", f"{a} * {b}", f"{a} - {b}", f"({a} + {b}) * {c}", f"{a} / {b}", f"{a} * {b} - {c}"))

    def two_units(self):
        kind = self.rng.choice(("length", "mass", "volume"))
        return self.rng.sample([u for u in UNITS if UNITS[u][0] == kind], 2)


# --------------------------------------------------------------- one single-call request per tool: arguments, train and test phrasings
# A phrasing is filled with the arguments, so that each value stands in the text as it stands in the call.

def _two(draw, a, b, values):
    x, y = draw.rng.sample(list(values), 2)
    return {a: x, b: y}


REQUESTS = {
    "calculator": (lambda d: {"expression": d.expression()},
                   ["What is {expression}?", "Compute {expression}", "Please work out {expression} for me"], ["How much is {expression}?"]),
    "convert_units": (lambda d: dict(zip(("value", "source", "target"), (d.number(2, 300), *d.two_units()))),
                      ["Convert {value} {source} to {target}", "How many {target} are {value} {source}?", "{value} {source} in {target} please"],
                      ["Express {value} {source} in {target}"]),
    "convert_currency": (lambda d: {"amount": d.number(5, 900), **_two(d, "source", "target", RATES)},
                         ["Change {amount} {source} into {target}", "How many {target} do I get for {amount} {source}?", "{amount} {source} in {target} please"],
                         ["What are {amount} {source} worth in {target}?"]),
    "add_days": (lambda d: {"date": d.date(), "days": d.number(2, 90)},
                 ["Which date is {days} days after {date}?", "Add {days} days to {date}", "{days} days from {date} is when?"],
                 ["Starting at {date}, what date comes {days} days later?"]),
    "weekday": (lambda d: {"date": d.date()}, ["What day of the week is {date}?", "Which weekday was {date}?", "Is {date} a Monday or what?"],
                ["Tell me the weekday of {date}"]),
    "weather": (lambda d: {"city": d.pick(CITY)}, ["How is the weather in {city}?", "Weather in {city} now", "Do I need an umbrella in {city}?"],
                ["What is it like outside in {city}?"]),
    "local_time": (lambda d: {"city": d.pick(CITY)}, ["What time is it in {city}?", "Local time in {city} please", "How late is it in {city}?"],
                   ["Tell me the time in {city}"]),
    "stock_price": (lambda d: {"symbol": d.symbol()}, ["Price of {symbol} stock?", "What does {symbol} trade at?", "Check the stock {symbol}"],
                    ["How much does a share of {symbol} cost?"]),
    "translate": (lambda d: {"word": d.pick(THING), "language": d.rng.choice(LANGUAGES)},
                  ["Translate {word} into {language}", "What is {word} in {language}?", "The {language} word for {word}?"],
                  ["How do you say {word} in {language}?"]),
    "play_music": (lambda d: {"artist": d.pick(BAND)}, ["Play something by {artist}", "Put on {artist}", "I want to hear {artist}"],
                   ["Could you start some {artist}?"]),
    "find_contact": (lambda d: {"name": d.name()}, ["Look up {name}", "Where does {name} live?", "Find the contact of {name}"],
                     ["Show me the details of {name}"]),
    "send_message": (lambda d: {"to": f"{d.pick(FIRST).lower()}@mail.com", "text": d.pick(SAY)},
                     ["Write {text} to {to}", "Send {to} the text {text}", "Message {to}: {text}"], ["Let {to} know: {text}"]),
    "add_reminder": (lambda d: {"text": d.pick(THING), "date": d.date()},
                     ["Remind me of the {text} on {date}", "On {date} remind me about {text}", "Set a reminder for {date}: {text}"],
                     ["Don't let me forget {text} on {date}"]),
    "book_table": (lambda d: {"restaurant": d.pick(PLACE), "people": d.number(2, 12)},
                   ["Book a table for {people} at {restaurant}", "Reserve {restaurant} for {people} people", "We are {people}, get us into {restaurant}"],
                   ["I need a table at {restaurant} for {people}"]),
    "cancel_booking": (lambda d: {"code": f"B{d.number(1000, 9990)}"}, ["Cancel booking {code}", "Please drop my reservation {code}", "Delete the booking {code}"],
                       ["I no longer need booking {code}"]),
}

THOUGHTS = ("The user wants the {what}. {tool} can do this.", "This needs {tool}, which gives the {what}.", "I should call {tool} for the {what}.",
            "They ask for the {what}, so {tool} fits best here.", "Looking at the tools, {tool} handles this.",
            "To answer I need the {what}; the tool for it is {tool}.", "One call of {tool} is enough.", "{tool} is the right tool for this.")
PARALLEL = ("There are {n} requests here, I call a tool for each.", "I need {n} calls, first the {what}.", "The user wants {n} things, that makes {n} calls.",
            "These are {n} calls at once.")
NO_TOOL = ("None of the tools can do this.", "The user asks for the {what}, which no tool here offers.", "I have no tool for the {what}.",
           "Looking at the tools, nothing fits.")
REFUSALS = ("Sorry, I have no tool for that.", "I cannot do that with my tools.", "None of my tools can help with this.")


STAND_INS = {"convert_units": ["calculator"]}  # tools that could do another's work, so that "nothing fits" would be wrong


def _request(draw, name):
    """(call, user text) for one tool."""
    make, train, test = REQUESTS[name]
    arguments = make(draw)
    return {"name": name, "arguments": arguments}, draw.rng.choice(test if draw.split == "test" else train).format(**arguments)


WHAT = {"calculator": "result", "convert_units": "conversion", "convert_currency": "exchange", "add_days": "later date", "weekday": "day of the week",
        "weather": "weather", "local_time": "time", "stock_price": "price", "translate": "translation", "play_music": "music", "find_contact": "contact",
        "send_message": "message", "add_reminder": "reminder", "book_table": "table", "cancel_booking": "cancellation"}


def _think(draw, call):
    return draw.rng.choice(THOUGHTS).format(tool=call["name"], what=WHAT[call["name"]])


def _row(draw, category, user, gold, demo, names, state=None):
    names = list(names)
    draw.rng.shuffle(names)
    return {"messages": [{"role": "user", "content": user}], "tools": [TOOLS[n].schema() for n in names], "gold": gold, "category": category,
            "state": state or {}, "demo": demo}


def _others(draw, used, k):
    return draw.rng.sample([n for n in TOOLS if n not in used], k)


def _state_for(draw, calls):
    """A state in which these calls succeed: contacts exist, bookings to cancel are there."""
    state = {}
    for call in calls:
        if call["name"] == "find_contact":
            state.setdefault("contacts", {})[call["arguments"]["name"]] = _contact(draw, call["arguments"]["name"])
        if call["name"] == "cancel_booking":
            state.setdefault("bookings", {})[call["arguments"]["code"]] = [draw.pick(PLACE), 2]
    return state


def _contact(draw, name):
    return {"city": draw.pick(CITY), "email": name.lower().replace(" ", ".") + "@mail.com"}


def _simple(draw, category="simple", distractors=(0, 1)):
    call, user = _request(draw, draw.rng.choice(list(TOOLS)))
    names = [call["name"], *_others(draw, [call["name"]], draw.rng.choice(distractors))]
    return _row(draw, category, user, [[call]], [{"think": _think(draw, call), "response": None}], names, _state_for(draw, [call]))


def _multiple(draw):
    return _simple(draw, "multiple", (2, 3))


def _parallel(draw):
    names = draw.rng.sample(list(TOOLS), 2)
    n = draw.rng.choice((2, 2, 3))
    chosen = (names * 2)[:n] if draw.rng.random() < 0.5 else [names[0]] * n
    requests = [_request(draw, name) for name in chosen]
    while any(a[0] == b[0] for i, a in enumerate(requests) for b in requests[:i]):  # the same call twice is no task
        requests = [_request(draw, name) for name in chosen]
    calls, users = zip(*requests)
    user = " Also, ".join(u.rstrip(".?") if i < n - 1 else u for i, u in enumerate(users)) if draw.split == "train" else " And then: ".join(users)
    think = draw.rng.choice(PARALLEL).format(n=n, what=WHAT[calls[0]["name"]])
    return _row(draw, "parallel", user, [list(calls)], [{"think": think, "response": None}], names, _state_for(draw, calls))


def _irrelevance(draw):
    call, user = _request(draw, draw.rng.choice(list(TOOLS)))
    think = draw.rng.choice(NO_TOOL).format(what=WHAT[call["name"]])
    return _row(draw, "irrelevance", user, [[]], [{"think": think, "response": draw.rng.choice(REFUSALS)}],
                _others(draw, [call["name"], *STAND_INS.get(call["name"], ())], 2))


def _contact_then(draw):
    """Look a person up, then use their city or their address."""
    name = draw.name()
    contact = _contact(draw, name)
    first = {"name": "find_contact", "arguments": {"name": name}}
    kind = draw.rng.choice(("weather", "local_time", "send_message"))
    if kind == "send_message":
        text = draw.pick(SAY)
        second = {"name": kind, "arguments": {"to": contact["email"], "text": text}}
        user = draw.rng.choice([f"Send {name} the text {text}", f"Write {text} to {name}"]) if draw.split == "train" else f"Let {name} know: {text}"
        last, need = f"I sent it to {contact['email']}.", "the email"
    else:
        second = {"name": kind, "arguments": {"city": contact["city"]}}
        noun = {"weather": "weather", "local_time": "time"}[kind]
        user = (draw.rng.choice([f"What is the {noun} where {name} lives?", f"Tell me the {noun} at the home of {name}"])
                if draw.split == "train" else f"I am visiting {name}, what is the {noun} there?")
        result = TOOLS[kind].function(contact["city"])
        now = f"{result['sky']} with {result['celsius']} degrees" if kind == "weather" else result
        last, need = f"It is {now} in {contact['city']}.", "the city"
    thoughts = (f"First I look up {name} to get {need}.", f"Now I have {need}, {kind} can use it.")
    return user, [first, second], thoughts, last, {"contacts": {name: contact}}


def _book_then(draw):
    """Book a table, then cancel it by the code that booking returned."""
    restaurant, people = draw.pick(PLACE), draw.number(2, 12)
    code = ToolBox().functions["book_table"](restaurant=restaurant, people=people)["code"]
    user = (draw.rng.choice([f"Book {restaurant} for {people} and cancel it again", f"Reserve {restaurant} for {people}, then cancel that booking"])
            if draw.split == "train" else f"Get a table for {people} at {restaurant} and then drop it")
    calls = [{"name": "book_table", "arguments": {"restaurant": restaurant, "people": people}}, {"name": "cancel_booking", "arguments": {"code": code}}]
    return user, calls, (f"I book {restaurant} first, which gives a code.", "The code lets me cancel it with cancel_booking."), f"Booking {code} is cancelled.", {}


def _date_then(draw):
    """Find a date, then its weekday or a reminder for it."""
    date, days = draw.date(), draw.number(2, 90)
    later = TOOLS["add_days"].function(date, days)
    first = {"name": "add_days", "arguments": {"date": date, "days": days}}
    if draw.rng.random() < 0.5:
        user = (draw.rng.choice([f"Which weekday is {days} days after {date}?", f"Add {days} days to {date} and tell me the weekday"])
                if draw.split == "train" else f"Starting at {date}, what weekday comes {days} days later?")
        second = {"name": "weekday", "arguments": {"date": later}}
        thoughts = ("First the date, with add_days.", "Now weekday for that date.")
        return user, [first, second], thoughts, f"{later} is a {TOOLS['weekday'].function(later)}.", {}
    thing = draw.pick(THING)
    user = (draw.rng.choice([f"Remind me of the {thing} {days} days after {date}", f"Set a reminder, {thing}, {days} days from {date}"])
            if draw.split == "train" else f"Don't let me forget {thing} {days} days after {date}")
    second = {"name": "add_reminder", "arguments": {"text": thing, "date": later}}
    return user, [first, second], ("I need the date first, add_days gives it.", f"Now the reminder for {thing}."), f"I will remind you on {later}.", {}


def _multi_turn(draw):
    user, calls, thoughts, last, state = draw.rng.choice((_contact_then, _book_then, _date_then))(draw)
    names = [c["name"] for c in calls]
    demo = [{"think": t, "response": None} for t in thoughts] + [{"think": "All is done, I can answer.", "response": last}]
    return _row(draw, "multi_turn", user, [[calls[0]], [calls[1]], []], demo, names + _others(draw, names, draw.rng.choice((0, 1))), state)


MAKERS = {"simple": _simple, "multiple": _multiple, "parallel": _parallel, "irrelevance": _irrelevance, "multi_turn": _multi_turn}


def make_rows(n, split="train", seed=0, categories=CATEGORIES, mask_names=False):
    """n rows, the categories in turn; a function of its arguments alone. mask_names: see masked. Raises ValueError for unknown names."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, not {split!r}")
    unknown = set(categories) - set(CATEGORIES)
    if unknown or not categories:
        raise ValueError(f"unknown categories {sorted(unknown)}: choose from {', '.join(CATEGORIES)}")
    rows = []
    for i in range(n):
        category = categories[i % len(categories)]
        rng = random.Random(f"{split}-{seed}-{category}-{i}")
        row = MAKERS[category](Draw(rng, split))
        rows.append(masked(row, rng) if mask_names else row)
    return rows


def masked(row, rng):
    """The row with tool and parameter names replaced by random strings (Hammer, arXiv 2410.04587): the descriptions must be read.

    Works on any row; the way back for execution is kept in state["aliases"]."""
    row = json.loads(json.dumps(row))

    used = set()

    def word():
        while (text := "".join(rng.choice("abcdefghijkmnpqrstuvwxyz") for _ in range(5))) in used:
            pass
        used.add(text)
        return text
    names, aliases = {}, {}
    for tool in row["tools"]:
        f = tool["function"]
        parameters = {p: word() for p in f["parameters"]["properties"]}
        names[f["name"]] = (word(), parameters)
        aliases[names[f["name"]][0]] = [f["name"], {v: k for k, v in parameters.items()}]
        f["name"] = names[f["name"]][0]
        f["parameters"] = {**f["parameters"], "properties": {parameters[p]: s for p, s in f["parameters"]["properties"].items()},
                           "required": [parameters[p] for p in f["parameters"].get("required", [])]}
    for call in (c for turn in row["gold"] for c in turn):
        call["name"], parameters = names[call["name"]]
        call["arguments"] = {parameters[k]: v for k, v in call["arguments"].items()}
    for turn in row.get("demo", []):
        for name, (alias, _) in names.items():
            turn["think"] = re.sub(rf"\b{re.escape(name)}\b", alias, turn["think"])
    row["state"] = {**(row["state"] or {}), "aliases": aliases}
    return row


# ------------------------------------------------------------------------------------------------------ dialogues as text, and step by step

def completion_text(calls, think, response=None):
    """An assistant turn in the completion format: thought, then calls and/or response."""
    blocks = [f"<think>{think}</think>"]
    if calls:
        blocks.append("<tool_call>\n" + "\n".join(json.dumps({"name": c["name"], "arguments": c["arguments"]}, ensure_ascii=False) for c in calls) + "\n</tool_call>")
    if response is not None:
        blocks.append(f"<response>{response}</response>")
    return "\n".join(blocks)


def toolbox_for(row):
    """A fresh ToolBox in the row's initial state."""
    return ToolBox(row["state"])


def decompose(row):
    """SWiRL (arXiv 2504.04736): a dialogue of K steps as K single-step rows. Step k sees the whole true history before it, in which the gold
    calls of the earlier steps were really executed, and is scored on step k alone."""
    box, history, steps = toolbox_for(row), list(row["messages"]), []
    for calls, demo in zip(row["gold"], row["demo"]):
        steps.append({**row, "messages": list(history), "gold": [calls], "demo": [demo]})
        history.append({"role": "assistant", "content": completion_text(calls, demo["think"], demo["response"])})
        for call in calls:
            result = box.functions[call["name"]](**call["arguments"])
            history.append({"role": "tool", "content": result if isinstance(result, str) else json.dumps(result)})
    return steps


NESTED = ("messages", "tools", "gold", "state", "demo")


def to_dataset(rows):
    """datasets.Dataset; nested columns as JSON strings, since Arrow would merge their structs and fill missing keys with None."""
    from datasets import Dataset
    return Dataset.from_list([{k: json.dumps(v) if k in NESTED else v for k, v in row.items()} for row in rows])


def from_dataset(dataset):
    """The rows of to_dataset, exactly."""
    return [{k: json.loads(v) if k in NESTED else v for k, v in row.items()} for row in dataset]
