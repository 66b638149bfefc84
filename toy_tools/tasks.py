"""Task generators in BFCL's categories over the toy tools: seeded, with disjoint train and test splits
(held-out entities and phrasings).

A row:
    messages   the request
    tools      schemas
    gold       one list of calls per assistant turn to come
    category   one of CATEGORIES
    state      of the ToolBox
    demo       per turn a clean thought and, where the turn answers, a response: from these the warm
               start makes its demonstrations
"""

import itertools
import json
import random
import re
from dataclasses import dataclass, field

from toy_tools.tools import TOOLS, ToolBox

CATEGORIES = ("simple", "multiple", "parallel", "irrelevance", "multi_turn")

# ---- entities: word pairs, every third pair held out ----

FIRST = ("Ana Ben Carla David Elena Felix Grace Hugo Irene Jonas Karin Liam "
         "Mara Nils Olga Pablo Rosa Simon Tara Umar Vera Wanda Yara Zoe").split()
LAST = "Adler Bauer Costa Diaz Evans Fisher Gomez Huber Ito Jansen Kim Lopez".split()
AREA = "North South East West Old New Upper Lower".split()
CITY = ("Oslo Lima Cairo Paris Tokyo Delhi Quito Rabat Seoul Turin Vienna Warsaw "
        "Athens Berlin Chicago Dublin Geneva Havana Lisbon Madrid Nairobi Prague Riga Tunis").split()
COLOUR = "red blue green black white yellow brown grey".split()
THING = ("bread milk flowers passport glasses keys battery garden bicycle novel "
         "guitar blanket camera jacket mirror basket candle ladder carpet hammer").split()
KIND = "Golden Silver Happy Little Royal Lucky Quiet Wild".split()
HOUSE = "Fork Lantern Mill Anchor Olive Dragon Oven Spoon Garden Star Kettle Barrel".split()
CROWD = "Kites Owls Rivers Drums Pines Lights Sparrows Maps Coats Engines".split()
TRADE = "Energy Steel Foods Motors Paper Bank Water Air".split()
SAY = "see you,call me,write me,meet me,wait for me,help me".split(",")
WHEN = "soon,today,tonight,tomorrow,at noon,after work,on Monday,next week".split(",")


def address(name):
    return name.lower().replace(" ", "@") + ".com"


class Draw:
    """Random entities of one split. All their words occur in both splits, but each pair of words in one
    of them only."""

    def __init__(self, rng, split):
        self.rng = rng
        self.test = split == "test"

    def two(self, first, second):
        """One of each sequence, a pair of this split."""
        while True:
            i = self.rng.randrange(len(first))
            j = self.rng.randrange(len(second))
            if ((i + j) % 3 == 2) == self.test:
                return first[i], second[j]

    def pair(self, first, second):
        return " ".join(self.two(first, second))

    def number(self):
        return self.rng.randrange(2, 100)

    def name(self):
        return self.pair(FIRST, LAST)

    def email(self):
        return address(self.name())

    def city(self):
        return self.pair(AREA, CITY)

    def thing(self):
        return self.pair(COLOUR, THING)

    def place(self):
        return self.pair(KIND, HOUSE)

    def company(self):
        return self.pair(KIND, TRADE)

    def artist(self):
        return self.pair(KIND, CROWD)

    def say(self):
        return self.pair(SAY, WHEN)

    def date(self):
        return "2025-{:02d}-{:02d}".format(*self.two(range(1, 13), range(1, 29)))

    def code(self):
        return "{}{}".format(*self.two("ABCDEFGH", range(10, 100)))

    def expression(self):
        a, b = self.two(range(2, 100), range(2, 100))
        return f"{a} {self.rng.choice('+-*/')} {b}"

    def amount(self, what, kinds):
        """An amount of one kind, to be changed into another: {what, source, target}."""
        n, source = self.two(range(2, 100), list(kinds))
        others = [k for k in kinds if k != source and kinds[k][0] == kinds[source][0]]
        return {what: n, "source": source, "target": self.rng.choice(others)}

    def phrase(self, train, test):
        """What is said in this split: one of `train`, or `test`."""
        return test if self.test else self.rng.choice(train)


# ---- what is said ----

GREETINGS = ("", "", "", "Hi, ", "Hello, ", "Please: ")

# a thought says what is wanted, which tool that takes, and what follows:
# OPENING + NEED + TOOL + one of USE, NO_TOOL, SEVERAL
OPENING = ("", "", "Okay. ", "Let me see. ", "Well. ", "Hm. ", "Fine. ")
NEED = ("The user wants the {what}", "They ask for the {what}", "This is about the {what}",
        "I need the {what}", "It asks for the {what}")
TOOL = (", so {tool}", ", by {tool}", ": {tool}", " and {tool}", ", that is {tool}")
USE = (" can do this.", " gives it.", " is offered.", " works.")
NO_TOOL = (", which is missing.", ", not offered.", ", but I lack it.", ", not here.")
SEVERAL = (". One of {n} calls.", ". In all {n} calls.", ". The first of {n} things.")
REFUSALS = ("Sorry, I have no tool for that.", "I cannot do that with my tools.",
            "None of my tools can help with this.")


# ---- one row of each category ----

def request(draw, name):
    """(call, user text) for one tool."""
    tool = TOOLS[name]
    arguments = tool.arguments(draw)
    phrasings = [tool.test] if draw.test else tool.train
    phrasing = draw.rng.choice(phrasings)
    return {"name": name, "arguments": arguments}, phrasing.format(**arguments)


def _think(draw, call, then, **words):
    text = "".join(draw.rng.choice(part) for part in (OPENING, NEED, TOOL, then))
    return text.format(tool=call["name"], what=TOOLS[call["name"]].what, **words)


def _row(draw, category, user, gold, demo, names, state=None):
    content = draw.rng.choice(GREETINGS) + user
    return {
        "messages": [{"role": "user", "content": content}],
        "tools": [TOOLS[name].schema() for name in names],
        "gold": gold,
        "category": category,
        "state": state or {},
        "demo": demo}


def _calling(think):
    """The demo of a turn that calls."""
    return {"think": think, "response": None}


def _answering(think, response):
    return {"think": think, "response": response}


def _state_for(draw, calls):
    """A state in which these calls succeed: contacts exist, bookings to cancel are there."""
    state = {}
    for call in calls:
        arguments = call["arguments"]
        if call["name"] == "find_contact":
            name = arguments["name"]
            state.setdefault("contacts", {})[name] = _contact(draw, name)
        if call["name"] == "cancel_booking":
            state.setdefault("bookings", {})[arguments["code"]] = [draw.place(), 2]
    return state


def _contact(draw, name):
    return {"city": draw.city(), "email": address(name)}


def _single(draw, names, category="simple"):
    call, user = request(draw, draw.rng.choice(names))
    demo = [_calling(_think(draw, call, USE))]
    return _row(draw, category, user, [[call]], demo, names, _state_for(draw, [call]))


def _multiple(draw, names):
    return _single(draw, names, "multiple")


def _parallel(draw, names):
    first, second = draw.rng.sample(names, 2)
    chosen = draw.rng.choice(([first, second], [first, second], [first, first], [first, second, first]))
    while True:
        calls, users = zip(*[request(draw, name) for name in chosen])
        if all(a != b for a, b in itertools.combinations(calls, 2)):  # the same call twice is no task
            break
    user = draw.phrase((" and ", ", also ", ", then "), ", and ").join(users)
    demo = [_calling(_think(draw, calls[0], SEVERAL, n=len(calls)))]
    return _row(draw, "parallel", user, [list(calls)], demo, names, _state_for(draw, calls))


def _irrelevance(draw, names):
    missing = [name for name in TOOLS if not {name, *TOOLS[name].stand_ins} & set(names)]
    call, user = request(draw, draw.rng.choice(missing))
    think = _think(draw, call, NO_TOOL)
    demo = [_answering(think, draw.rng.choice(REFUSALS))]
    return _row(draw, "irrelevance", user, [[]], demo, names)


@dataclass
class Dialogue:
    """Two calls, the second of which needs the result of the first, and an answer."""
    user: str
    calls: list
    thoughts: tuple     # one before each call
    answer: str
    state: dict = field(default_factory=dict)


def _contact_then(draw):
    """Look a person up, then use their city or their address."""
    name = draw.name()
    contact = _contact(draw, name)
    email, city = contact["email"], contact["city"]
    kind = draw.rng.choice(("get_weather", "local_time", "send_message"))
    if kind == "send_message":
        text = draw.say()
        arguments = {"to": email, "text": text}
        user = draw.phrase(
            (f"send {name} the text {text}",
             f"write {text} to {name}"),
            f"send a message to {name}: {text}")
        need = "the email"
        answer = f"I sent it to {email}."
    else:
        arguments = {"city": city}
        noun = {"get_weather": "weather", "local_time": "time"}[kind]
        user = draw.phrase(
            (f"what is the {noun} where {name} lives?",
             f"tell me the {noun} at the home of {name}",
             f"what is the {noun} near {name}?",
             f"how is the {noun} at the home of {name}?"),
            f"what is the {noun} at the home of {name}?")
        need = "the city"
        now = TOOLS[kind].function(city)
        if kind == "get_weather":
            now = f"{now['sky']} with {now['celsius']} degrees"
        answer = f"It is {now} in {city}."
    calls = [{"name": "find_contact", "arguments": {"name": name}},
             {"name": kind, "arguments": arguments}]
    thoughts = (f"First I look up {name} to get {need}.", f"Now I have {need}, {kind} can use it.")
    return Dialogue(user, calls, thoughts, answer, {"contacts": {name: contact}})


def _book_then(draw):
    """Book a table, then cancel it by the code that booking returned."""
    restaurant = draw.place()
    people = draw.rng.randrange(2, 13)
    booking = {"restaurant": restaurant, "people": people}
    code = ToolBox().functions["book_table"](**booking)["code"]
    user = draw.phrase(
        (f"book {restaurant} for {people} and cancel it again",
         f"reserve {restaurant} for {people}, then cancel that booking"),
        f"book a table for {people} at {restaurant}, then cancel that booking")
    calls = [{"name": "book_table", "arguments": booking},
             {"name": "cancel_booking", "arguments": {"code": code}}]
    thoughts = (f"I book {restaurant} first, which gives a code.",
                "The code lets me cancel it with cancel_booking.")
    return Dialogue(user, calls, thoughts, f"Booking {code} is cancelled.")


def _date_then(draw):
    """Find a date, then its weekday or a reminder for it."""
    date = draw.date()
    days = draw.number()
    later = TOOLS["add_days"].function(date, days)
    first = {"name": "add_days", "arguments": {"date": date, "days": days}}
    if draw.rng.random() < 0.5:
        user = draw.phrase(
            (f"which weekday is {days} days after {date}?",
             f"add {days} days to {date} and tell me the weekday",
             f"what weekday is it {days} days from {date}?"),
            f"what weekday is {days} days after {date}?")
        second = {"name": "get_weekday", "arguments": {"date": later}}
        thoughts = ("First the date, with add_days.", "Now get_weekday for that date.")
        answer = f"{later} is a {TOOLS['get_weekday'].function(later)}."
    else:
        thing = draw.thing()
        user = draw.phrase(
            (f"remind me of the {thing} {days} days after {date}",
             f"set a reminder, {thing}, {days} days from {date}"),
            f"set a reminder about {thing} {days} days after {date}")
        second = {"name": "add_reminder", "arguments": {"text": thing, "date": later}}
        thoughts = ("I need the date first, add_days gives it.", f"Now the reminder for {thing}.")
        answer = f"I will remind you on {later}."
    return Dialogue(user, [first, second], thoughts, answer)


def _multi_turn(draw):
    dialogue = draw.rng.choice((_contact_then, _book_then, _date_then))(draw)
    names = [call["name"] for call in dialogue.calls]
    others = [name for name in TOOLS if name not in names]
    names += draw.rng.sample(others, draw.rng.choice((0, 1)))
    draw.rng.shuffle(names)
    gold = [[call] for call in dialogue.calls] + [[]]
    demo = [_calling(thought) for thought in dialogue.thoughts]
    demo.append(_answering("All is done, I can answer.", dialogue.answer))
    return _row(draw, "multi_turn", dialogue.user, gold, demo, names, dialogue.state)


SINGLE_TURN = {  # category: (maker, numbers of tools offered)
    "simple": (_single, (1, 2)),
    "multiple": (_multiple, (3, 4)),
    "parallel": (_parallel, (2,)),
    "irrelevance": (_irrelevance, (1, 2, 3))}


def make_rows(n, split="train", seed=0, categories=CATEGORIES, mask_names=False):
    """n rows, the categories in turn; a function of its arguments alone. mask_names: see masked. Raises
    ValueError for unknown names."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, not {split!r}")
    unknown = set(categories) - set(CATEGORIES)
    if unknown or not categories:
        raise ValueError(f"unknown categories {sorted(unknown)}: choose from {', '.join(CATEGORIES)}")
    rows = []
    for i in range(n):
        category = categories[i % len(categories)]
        rng = random.Random(f"{split}-{seed}-{category}-{i}")
        if category == "multi_turn":
            row = _multi_turn(Draw(rng, split))
        else:
            make, sizes = SINGLE_TURN[category]
            names = rng.sample(list(TOOLS), rng.choice(sizes))
            row = make(Draw(rng, split), names)
        rows.append(masked(row, rng) if mask_names else row)
    return rows


def masked(row, rng):
    """The row with tool and parameter names replaced by random strings (Hammer, arXiv 2410.04587): the
    descriptions must be read.

    Works on any row; the way back for execution is kept in state["aliases"]."""
    row = json.loads(json.dumps(row))
    used = set()

    def word():
        while True:
            text = "".join(rng.choice("abcdefghijkmnpqrstuvwxyz") for _ in range(5))
            if text not in used:
                used.add(text)
                return text

    names = {}    # tool name -> (its mask, {parameter: its mask})
    aliases = {}  # and the way back
    for tool in row["tools"]:
        function = tool["function"]
        name = function["name"]
        schema = function["parameters"]
        masks = {parameter: word() for parameter in schema["properties"]}
        alias = word()
        names[name] = (alias, masks)
        aliases[alias] = [name, {mask: parameter for parameter, mask in masks.items()}]
        function["name"] = alias
        schema["properties"] = {masks[key]: part for key, part in schema["properties"].items()}
        schema["required"] = [masks[key] for key in schema.get("required", [])]
    for turn in row["gold"]:
        for call in turn:
            call["name"], masks = names[call["name"]]
            call["arguments"] = {masks[key]: value for key, value in call["arguments"].items()}
    for turn in row.get("demo", []):
        for name, (alias, _) in names.items():
            turn["think"] = re.sub(rf"\b{re.escape(name)}\b", alias, turn["think"])
    row["state"] = {**(row["state"] or {}), "aliases": aliases}
    return row


# ---- dialogues as text, and step by step ----

def completion_text(calls, think, response=None):
    """An assistant turn in the completion format: thought, unless empty, then calls and/or response."""
    blocks = [f"<think>{think}</think>"] if think else []
    if calls:
        shown = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
        lines = [json.dumps(call, ensure_ascii=False) for call in shown]
        blocks.append("\n".join(["<tool_call>", *lines, "</tool_call>"]))
    if response is not None:
        blocks.append(f"<response>{response}</response>")
    return "\n".join(blocks)


def toolbox_for(row):
    """A fresh ToolBox in the row's initial state."""
    return ToolBox(row["state"])


def decompose(row):
    """SWiRL (arXiv 2504.04736): a dialogue of K steps as K single-step rows. Step k sees the whole true
    history before it, in which the gold calls of the earlier steps were really executed, and is scored
    on step k alone."""
    box = toolbox_for(row)
    history = list(row["messages"])
    steps = []
    for calls, demo in zip(row["gold"], row["demo"]):
        steps.append({**row, "messages": list(history), "gold": [calls], "demo": [demo]})
        text = completion_text(calls, demo["think"], demo["response"])
        history.append({"role": "assistant", "content": text})
        for call in calls:
            result = box.functions[call["name"]](**call["arguments"])
            text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
            history.append({"role": "tool", "content": text})
    return steps


NESTED = ("messages", "tools", "gold", "state", "demo")


def to_dataset(rows):
    """datasets.Dataset; nested columns as JSON strings, since Arrow would merge their structs and fill
    missing keys with None."""
    from datasets import Dataset

    def cell(key, value):
        return json.dumps(value, ensure_ascii=False) if key in NESTED else value
    return Dataset.from_list([{key: cell(key, value) for key, value in row.items()} for row in rows])


def from_dataset(dataset):
    """The rows of to_dataset, exactly."""
    def value(key, cell):
        return json.loads(cell) if key in NESTED else cell
    return [{key: value(key, cell) for key, cell in row.items()} for row in dataset]
