"""The hardened way from a row to tokens: rest.Chat for templates that ignore tools or refuse a role."""

import json

from jinja2.exceptions import TemplateError

import rest

TOOLS_TEXT = ('# Tools\nCall tools by one JSON object a line, {"name": ..., "arguments": {...}}, inside '
              '<tool_call> and </tool_call>. The tools are:\n')


class TemplateChat(rest.Chat):
    """rest.Chat whose system message begins with `instructions` (for rows with tools), and with the tools as text
    where the template does not show them. Raises ValueError without a chat template."""

    def __init__(self, tokenizer, instructions="", model=None):
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: use a chat model, or set tokenizer.chat_template")
        super().__init__(tokenizer)
        self.instructions = instructions
        more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self.end_ids |= set(more if isinstance(more, list) else [more]) - {None}

    def render(self, messages, tools):
        system = self.instructions if tools else ""
        if tools and self._template(messages, tools) == self._template(messages, []):
            listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
            system = f"{system}\n\n{TOOLS_TEXT}{listed}".strip()
            tools = []
        if system:
            first = messages[0]["role"] == "system"
            old = messages[0]["content"] if first else ""
            messages = [{"role": "system", "content": f"{system}\n\n{old}".strip()}, *messages[first:]]
        return self._template(messages, tools)

    def _template(self, messages, tools):
        try:
            return super().render(messages, tools)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"the tokenizer's chat template refuses the roles {roles}: {error}") from error
