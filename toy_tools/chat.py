"""Prompts through chat templates. Token in, token out: what was sampled is never decoded and encoded again; only prompts and the suffixes
that follow a tool's answer are tokenised here."""

import json
import re

from jinja2.exceptions import TemplateError

TOOLS_TEXT = ('# Tools\nCall tools by one JSON object a line, {"name": ..., "arguments": {...}}, inside <tool_call> and </tool_call>. '
              'The tools are:\n')


def _split_opened_thought(text):
    """Some templates end the prompt with "<think>": it is then a forced start of the completion, not part of the prompt."""
    cut = re.search(r"(<think>\s*)?\Z", text).start()
    return text[:cut], text[cut:]


def _ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _render(tokenizer, messages, tools=None):
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses the roles {', '.join(m['role'] for m in messages)}: {error}") from error


def encode_prompt(tokenizer, messages, tools, instructions=""):
    """Prompt ids and the ids of a forced beginning of the completion (both list[int]; the second is mostly empty).

    The tokenizer's own chat template renders the tools; where it ignores them they are written into the system message as text.
    `instructions` goes first in the system message of rows with tools. Raises ValueError without a chat template."""
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: use a chat model, or set tokenizer.chat_template")

    def render(messages, tools):
        return _render(tokenizer, messages, tools or None)
    instructions = instructions if tools else ""  # a prompt that lists its own tools also says how to call them
    if tools and render(messages, tools) == render(messages, None):
        instructions = "\n\n".join(filter(None, [instructions, TOOLS_TEXT + "\n".join(json.dumps(tool["function"]) for tool in tools)]))
        tools = None
    if instructions:
        old = messages[0]["content"] if messages[0]["role"] == "system" else ""
        messages = [{"role": "system", "content": f"{instructions}\n\n{old}".strip()}, *messages[messages[0]["role"] == "system":]]
    prompt, forced = _split_opened_thought(render(messages, tools))
    return _ids(tokenizer, prompt), _ids(tokenizer, forced)


def encode_results(tokenizer, results, ends):
    """Ids that follow a finished assistant turn when tools have answered: (tool turns and the next turn's header, a forced thought opening).

    Only this suffix is newly tokenised; the sampled ids before it stay as they were sampled. The last of those was one of `ends`, so the
    template's own end-of-turn token is left out."""
    mark = "\u2016turn\u2016"
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": mark}, *({"role": "tool", "content": r} for r in results)]
    suffix, forced = _split_opened_thought(_render(tokenizer, messages).split(mark)[-1])
    ids = _ids(tokenizer, suffix)
    return ids[ids[:1] != [] and ids[0] in ends:], _ids(tokenizer, forced)
