"""From a row to tokens with any chat template: rest.Chat that finds out first what the template shows.

A chat template is a program of its model's makers. It may leave out tools, system texts, tools' answers
or earlier thoughts, refuse roles, and close a turn with another token than the tokenizer's eos. Most of
this raises no error by itself, so TemplateChat renders small dialogues when it is made, writes otherwise
what the template would not show, and says so once, by log.warning and in `notes`."""

import json
import re
from itertools import count

from jinja2.exceptions import TemplateError

import rest


# what a model that has not learnt the completion format is told, in front of its tools
INSTRUCTIONS = (
    "First think inside <think> and </think>. Then either call tools, one JSON object per line inside "
    "<tool_call> and </tool_call>, or, where no tool fits or nothing is left to call, answer inside "
    "<response> and </response>.")
TOOLS_TEXT = ('# Tools\nCall tools by one JSON object a line, {"name": ..., "arguments": {...}}, inside '
              '<tool_call> and </tool_call>. The tools are:\n')

OPEN_THOUGHT = re.compile(r"<think>\s*\Z")
CLOSED_THOUGHT = re.compile(r"<think>\s*</think>\s*\Z")

# The probe's words have an é, so that a template that escapes other languages counts as not showing them.
PROBE = {"type": "function", "function": {
    "name": "probe_tool", "description": "Probé: a description.",
    "parameters": {"type": "object", "required": ["probe_key"],
                   "properties": {"probe_key": {"type": "string", "description": "A key."}}}}}
PROBE_WORDS = ("probe_tool", "probe_key", "Probé:")
CALLED = ('<think>probe thought</think>\n'
          '<tool_call>\n{"name": "probe_tool", "arguments": {"probe_key": "probe value"}}\n</tool_call>')

# What a tool's answer may need beside its text, tried in this order; else it is written as a user turn.
# Some templates want an id of nine letters or digits; nothing in a row says more.
TOOL_TURNS = ({}, {"tool_call_id": "call00000"})


class TemplateChat(rest.Chat):
    """rest.Chat for any chat template.

    instructions: begin the system message of rows with tools. model: its generation_config knows more
    tokens that end a turn, and its config how long a prompt may be.
    end_ids: every id that ends a turn; end_id: the one that the template writes, which is taught.
    notes: what the template does not show or writes otherwise, in sentences.
    Raises ValueError for a tokenizer without a chat template, or one that loses turns of a dialogue."""

    def __init__(self, tokenizer, instructions="", model=None):
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: use a chat model, "
                             "or set tokenizer.chat_template")
        super().__init__(tokenizer)
        self.instructions = instructions
        self.notes = []
        self.options = {}   # variables for the template
        self.header = ""    # what opens an assistant turn where the template forgets to
        self._find_thought()
        self.ways = {bool(tools): self._find_way(tools) for tools in ([], [PROBE])}
        self._judge_ways()
        self._find_header()
        self._find_end(model)
        self._look_back()
        for note in self.notes:
            rest.warn_once(note)

    # ---- a row's tokens ----

    def target(self, row, text):
        """What a supervised step learns: (ids given, ids to learn) of the completion `text` for the row.

        Given are the prompt and what the template forces, whose content is cut from the text; the learnt
        ids end with end_id. Raises ValueError where the text does not begin as the template forces it."""
        prompt, opening = self.prompt(row)
        forced = self.decode(opening)
        tag = forced.strip()
        begun = text.lstrip() if tag else text
        if not begun.startswith(tag):
            raise ValueError(f"the chat template opens every completion with {tag}, but this one to "
                             f"imitate begins with {text[:40]!r}: give it a thought")
        cut = len(forced) if begun.startswith(forced) else len(tag)
        return prompt + opening, self.encode(begun[cut:]) + [self.end_id]

    def reply(self, row, results, last):
        """See rest.Chat. Exactly what the template renders there; only the end token that was sampled is
        left out, with the space the template would put in front of it."""
        answers = [{"role": "tool", "content": text} for text in results]
        for number in count():  # a tool's answer may contain any text: a mark that stands there once
            mark = f"turn{number}mark"
            turn = {"role": "assistant", "content": mark}
            text, opening = self.render([*row["messages"], turn, *answers], row["tools"])
            if text.count(mark) == 1:
                break
            if mark not in text:
                roles = ", ".join(message["role"] for message in row["messages"])
                raise ValueError(f"the chat template does not show an assistant turn behind {roles}")
        ids = self.encode(text.partition(mark)[2])
        for k, token in enumerate(ids):
            if token == last:
                return ids[k + 1:], self.encode(opening)
            if self.text(token).strip():
                break
        return ids, self.encode(opening)

    def encode(self, text):
        return super().encode(rest.valid_text(text))

    def render(self, messages, tools):
        """See rest.Chat. Raises ValueError for roles that the template refuses."""
        text = self._template(*self._written(messages, tools)) + self.header
        thought = OPEN_THOUGHT.search(text)
        cut = thought.start() if thought else len(text)
        return text[:cut], text[cut:]

    # ---- what the template does not show, written otherwise ----

    def _written(self, messages, tools):
        """(messages, tools) such that the template shows all of them."""
        system = self.instructions if tools else ""
        if tools and not self.ways[True]:
            listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
            system = f"{system}\n\n{TOOLS_TEXT}{listed}".strip()
            tools = []
        has_system, tool_turn = self.ways[bool(tools)]
        messages = _with_system(messages, system, has_system)
        return _with_tool_turns(messages, tool_turn), tools

    def _template(self, messages, tools, **options):
        """The template's own text of a dialogue, with the beginning of the turn that follows."""
        options = {"add_generation_prompt": True, **self.options, **options}
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools or None, tokenize=False, **options)
        except (TemplateError, TypeError, AttributeError, LookupError) as error:  # it is a program
            roles = ", ".join(message["role"] for message in messages)
            names = ", ".join(tool["function"]["name"] for tool in tools)
            names = f" (tools: {names})" if names else ""
            raise ValueError(f"the tokenizer's chat template refuses the roles {roles}{names}: "
                             f"{error}") from error

    # ---- the probe ----

    def _shows(self, messages, tools):
        """Whether the template shows the tools, and each message's content once and in order (a system
        text anywhere)."""
        try:
            text = self._template(messages, tools)
        except ValueError:
            return False
        contents = [message["content"] for message in messages]
        order = [text.find(message["content"]) for message in messages if message["role"] != "system"]
        listed = not tools or all(word in text for word in PROBE_WORDS)
        once = all(text.count(content) == 1 for content in contents)
        return listed and once and order == sorted(order)

    def _find_way(self, tools):
        """(whether the template shows a system text, a value of TOOL_TURNS or None for user turns), or
        None if it does not show a dialogue in any way."""
        dialogue = _probe("user", "assistant", "tool", "tool", "assistant", "tool", "assistant", "user",
                          "assistant", "tool")
        asked = (dialogue[:1], dialogue[:8], dialogue)  # a policy is asked behind a user or a tool
        system = {"role": "system", "content": "Probé."}
        for tool_turn in (*TOOL_TURNS, None):
            written = [_with_tool_turns(messages, tool_turn) for messages in asked]
            if all(self._shows(messages, tools) for messages in written):
                return all(self._shows([system, *messages], tools) for messages in written), tool_turn
        return None

    def _judge_ways(self):
        if not self.ways[False]:
            raise ValueError("the tokenizer's chat template does not show each turn of a dialogue between "
                             "user and assistant once and in order: set tokenizer.chat_template to one "
                             "that does, with texts as content")
        if not self.ways[True]:
            self._note("the chat template does not show tools: they are listed in the system text")
        ways = [way for way in self.ways.values() if way]
        if not all(has_system for has_system, _ in ways):
            self._note("the chat template does not show a system text: it is put in front of the first "
                       "user turn")
        if not all(tool_turn is not None for _, tool_turn in ways):
            self._note("the chat template does not show every turn of a dialogue with tool turns: the "
                       "tools' answers are written as user turns, inside <tool_response>")

    def _find_thought(self):
        """A thought that the template closes before the policy writes anything: have it left open."""
        def closes(**options):
            texts = [self._template(_probe("user"), [], **options)]
            try:
                texts.append(self._template(_probe("user"), [PROBE], **options))
            except ValueError:  # it refuses tools: judged later
                pass
            return any(map(CLOSED_THOUGHT.search, texts))

        if not closes():
            return
        if not closes(enable_thinking=True):
            self.options = {"enable_thinking": True}
            self._note("the chat template closes an empty thought in front of a completion, so it is "
                       "rendered with enable_thinking=True, which leaves the thought to the policy")
        else:
            self._note("the chat template closes an empty thought in front of every completion; it stays "
                       "a part of the prompt and earns nothing: for the format reward the policy must "
                       "write a thought of its own behind it")

    def _find_header(self):
        """What opens an assistant turn, if the template has no branch for add_generation_prompt."""
        user, assistant, reaction = _probe("user", "assistant", "user")
        past = self._template([user, assistant, reaction], [])
        past = past.partition(user["content"])[2].partition(assistant["content"])[0]
        present = self._template([user], [])
        ignored = present == self._template([user], [], add_generation_prompt=False)
        missing = past.removeprefix(present.partition(user["content"])[2])
        if ignored and missing.strip() and missing != past:
            self.header = missing
            self._note(f"the chat template does not open the turn that follows: {missing!r} is added, as "
                       "in front of earlier ones")

    def _find_end(self, model):
        """The token with which the template closes an assistant turn, and others that end one."""
        user, assistant, reaction = _probe("user", "assistant", "user")
        text = self._template([user, assistant, reaction], [])
        closing = text.partition(assistant["content"])[2].partition(reaction["content"])[0]
        header = [*filter(self._is_special, self.encode(text.partition(user["content"])[0]))]
        found = self._first_special(closing)
        eos = self.tokenizer.eos_token_id
        opens = [found] == header[-1:] or found == self.tokenizer.bos_token_id != eos  # the next turn
        closes = found is not None and not opens
        more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self.end_ids = {eos, found, *(more if isinstance(more, list) else [more])} - {None}
        self.end_id = found if closes else eos
        if self.end_id is None:
            raise ValueError("the chat template closes a turn with no token of its own and the tokenizer "
                             "has no eos_token, so no turn could end: set tokenizer.eos_token")
        name = self.tokenizer.convert_ids_to_tokens(self.end_id)
        if not closes:
            self._note(f"behind an assistant turn the chat template writes {closing!r}, in which no "
                       f"token closes the turn: the tokenizer's eos {name!r} is taught as its end")
        elif found != eos:
            self._note(f"the chat template closes a turn with {name!r}, not with the tokenizer's eos: "
                       "both end a turn, the template's is taught")
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        if embedding is not None and self.end_id >= embedding.weight.shape[0]:
            raise ValueError(f"{name!r}, which ends a turn, is not in the model's vocabulary: call "
                             "model.resize_token_embeddings(len(tokenizer)) and save the model")

    def _is_special(self, token):
        return token in self.tokenizer.added_tokens_decoder or token in self.tokenizer.all_special_ids

    def _first_special(self, text):
        """The id of the added token with which the text begins, space aside, or None."""
        for token in self.encode(text):
            if self._is_special(token):
                return token
            if self.text(token).strip():
                return None
        return None

    def _look_back(self):
        """Say what the template makes of past assistant turns."""
        user, assistant, tool, reaction = _probe("user", "assistant", "tool", "user")
        called = {**assistant, "content": CALLED}
        for behind, where in ((reaction, "followed by a user turn"), (tool, "that a tool has answered")):
            text = "".join(self.render([user, called, behind], [PROBE]))
            lost = [what for what in ("thought", "value") if f"probe {what}" not in text]
            names = " and ".join({"thought": "thoughts", "value": "calls"}[what] for what in lost)
            live = "live episodes keep them token by token"
            if lost:
                self._note(f"the chat template leaves out the {names} of assistant turns {where}: rows "
                           f"cut from dialogues do not show them, {live}")
            elif CALLED not in text:
                self._note(f"the chat template does not write assistant turns {where} as they were "
                           f"written: so they stand in rows cut from dialogues, {live}")

    def _note(self, text):
        if text not in self.notes:
            self.notes.append(text)


def _probe(*roles):
    """Messages of these roles; no content holds another."""
    return [{"role": role, "content": f"probé {n}."} for n, role in enumerate(roles)]


def _with_system(messages, text, has_system):
    """The messages whose system text begins with `text`; without that role if the template has none."""
    if messages[0]["role"] == "system":
        text = f"{text}\n\n{messages[0]['content']}".strip() if text else messages[0]["content"]
        messages = messages[1:]
    if not text:
        return messages
    if has_system:
        return [{"role": "system", "content": text}, *messages]
    if messages and messages[0]["role"] == "user":
        text = f"{text}\n\n{messages[0]['content']}"
        messages = messages[1:]
    return [{"role": "user", "content": text}, *messages]


def _with_tool_turns(messages, tool_turn):
    """The messages whose tool turns have the members of `tool_turn`. If None, they are user turns, one for
    all answers to a turn and what the user adds to them: many templates want roles to alternate."""
    if tool_turn is not None:
        return [{**message, **tool_turn} if message["role"] == "tool" else message
                for message in messages]
    written = []
    before = ""
    for message in messages:
        role, text = message["role"], message["content"]
        if role == "tool":
            text = f"<tool_response>\n{text}\n</tool_response>"
        if (before, role) in (("tool", "tool"), ("tool", "user"), ("user", "tool")):
            text = written.pop()["content"] + "\n" + text
        written.append({"role": "user" if role == "tool" else role, "content": text})
        before = role
    return written
