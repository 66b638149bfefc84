"""Chat templates as users bring them: what they lose is written otherwise or said before the first step.

The templates are written here after the manners of their families."""

import copy
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import CALL, ROW, TOOL, ScriptedModel, adder, opened_template, qwen3, scripted, scripted_turns

import rest
from toy_tools import chat, tasks

HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LISTED = "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}\n{% endfor %}</tools>{% endif %}"
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

# a system text with the tools; answers to one turn share a user turn
HERMES = (
    "<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    + LISTED + "<|im_end|>\n"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.previtem.role != 'tool' %}<|im_start|>tool\n{% endif %}"
    "<tool_response>\n{{ m.content }}\n</tool_response>\n"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif not (loop.first and m.role == 'system') %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + HEADER)

# a thought is dropped in front of the last question and rewritten behind it
QWEN3 = HERMES.replace("{% for m in messages %}{% if m.role == 'tool' %}", """\
{% set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{% if m.role == 'assistant' and '</think>' in m.content %}
{%- set thought, _, said = m.content.partition('</think>') %}<|im_start|>assistant
{% if loop.index0 > ns.last %}<think>
{{ thought.replace('<think>', '').strip() }}
</think>

{% endif %}{{ said.strip() }}<|im_end|>
{% elif m.role == 'tool' %}""")

LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: 2023\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}<|eot_id|>"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
    "{% elif m.role != 'system' %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.role == 'user' and tools and loop.index0 < 2 %}" + LISTED + "{% endif %}"
    "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")

GEMMA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")

# tools and the system text stand at the last question; a tool turn needs an id; what has no tool_calls
# must alternate with questions; no header
MISTRAL = """\
<s>{% if messages[0].role == 'system' %}{% set system = messages[0].content %}
{%- set messages = messages[1:] %}{% endif %}
{%- set ns = namespace(n=0) %}
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for m in messages %}{% if m.role != 'tool' and not m.tool_calls %}
{%- if (m.role == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- set ns.n = ns.n + 1 %}{% endif %}{% endfor %}
{%- for m in messages %}{% if m.role == 'user' %}
{%- if tools and m == asked[-1] %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] \
{% if loop.last and system is defined %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]
{%- elif m.role == 'assistant' %} {{ m.content | trim }}</s>
{%- else %}{% if m.tool_call_id | default('') | length != 9 %}
{{- raise_exception('ids have 9 letters') }}{% endif -%}
[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% endif %}{% endfor %}"""

# the same without the rule of alternation, which leaves the tool turns to their ids
MISTRAL_ID = MISTRAL.replace("roles must alternate') }}", "') if false }}")
MISTRAL_ID = MISTRAL_ID.replace("{% if loop.last and", "{% if loop.first and")

SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and messages[0].role != 'system' %}"
    "<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}" + HEADER)

NO_TOOL_TURNS = (
    LISTED + "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + HEADER)

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} </s>{% endif %}{% endfor %}")

# no token closes a turn: the header of the next one ends it
GLM = (
    LISTED + "{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>\n{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}")

CHATML = LISTED + TURNS + HEADER

# name: template, its end token, whether it shows tools, a system text, tool turns (or with an id, "id")
FAMILIES = {
    "ChatML": (CHATML, "<|im_end|>", True, True, True),
    "Hermes": (HERMES, "<|im_end|>", True, True, True),
    "Qwen3": (QWEN3, "<|im_end|>", True, True, True),
    "Llama 3": (LLAMA3, "<|eot_id|>", True, True, True),
    "Gemma": (GEMMA, "<end_of_turn>", False, False, False),
    "Mistral": (MISTRAL, "</s>", True, True, False),
    "Mistral, ids": (MISTRAL_ID, "</s>", True, True, "id"),
    "SmolLM2": (SMOLLM2, "<|im_end|>", False, True, True),
    "no branch for tool turns": (NO_TOOL_TURNS, "<|im_end|>", True, True, False),
    "Llama 2": (LLAMA2, "</s>", False, False, False),
    "GLM": (GLM, "<|endoftext|>", True, True, True),
}
SPECIAL = ["<|endoftext|>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
           "<start_of_turn>", "<end_of_turn>", "<|begin_of_text|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"]


@pytest.fixture
def bring(tokenizer):
    """template -> a tokenizer with it and with the families' special tokens."""
    def build(template, eos="<|endoftext|>"):
        brought = copy.deepcopy(tokenizer)
        brought.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *SPECIAL]})
        brought.eos_token = eos
        brought.chat_template = template
        return brought
    return build


def read(talk, pair):
    """The text of (ids, opening ids)."""
    return talk.decode(pair[0] + pair[1])


def episode(talk, row, turns, answers):
    """The text of a live episode: prompt, turns with their end token, what follows them."""
    ids = sum(talk.prompt(row), [])
    for text, results in zip(turns, answers):
        ids += talk.encode(text) + [talk.end_id]
        ids += sum(talk.reply(row, results, talk.end_id), [])
    return talk.decode(ids)


# --------------------------------------------------------------------------------- the embedded one

def test_on_the_embedded_template_it_agrees_with_the_plain_chat(tokenizer):
    """The hardened chat gives the plain one's ids for prompts, histories and replies, knows the same end,
    and has nothing to say."""
    plain, talk = rest.Chat(tokenizer), chat.TemplateChat(tokenizer)
    assert (talk.end_ids, talk.end_id, talk.notes) == (plain.end_ids, tokenizer.eos_token_id, [])
    rows = [step for row in tasks.make_rows(20, "train") for step in tasks.decompose(row)]
    assert any(message["role"] == "tool" for row in rows for message in row["messages"])
    for row in [*rows, {**ROW, "tools": []}]:
        assert talk.prompt(row) == plain.prompt(row)
        for last in (tokenizer.eos_token_id, 5):
            assert talk.reply(row, ["3", "é\n"], last) == plain.reply(row, ["3", "é\n"], last)
    opened = opened_template(tokenizer)
    assert chat.TemplateChat(opened).prompt(ROW) == rest.Chat(opened).prompt(ROW)


# ----------------------------------------------------------------------------------------- families

@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_shows_is_found_and_the_rest_written_otherwise(bring, name):
    """Every template shows instructions, system text, tools and questions once each, whatever it loses
    by itself; and each loss has its sentence."""
    template, end, tools, system, tool_turns = FAMILIES[name]
    talk = chat.TemplateChat(bring(template), "Think first.")
    assert talk.tokenizer.convert_ids_to_tokens(talk.end_id) == end
    assert {talk.end_id, talk.tokenizer.eos_token_id} <= talk.end_ids
    tool = {"name": "größe", "description": "测量长度",
            "parameters": {"type": "object", "properties": {}}}
    messages = [{"role": "system", "content": "Sei kürzer."}, {"role": "user", "content": "Größe?"}]
    row = {"messages": messages, "tools": [{"type": "function", "function": tool}]}
    text = read(talk, talk.prompt(row))
    for words in ("Think first.", "Sei kürzer.", "Größe?", '"größe"', "测量长度"):
        assert text.count(words) == 1
    assert text.index("Think first.") < text.index("Sei kürzer.")
    told = " ".join(talk.notes)
    assert ("does not show tools" in told) == (not tools)
    assert ("does not show a system text" in told) == (not system)
    assert ("written as user turns" in told) == (not tool_turns)
    assert [turn for _, turn in filter(None, talk.ways.values())][-1] == (
        None if not tool_turns else {} if tool_turns is True else {"tool_call_id": "call00000"})


@pytest.mark.parametrize("name", FAMILIES)
def test_what_follows_a_turn_is_what_the_template_renders_there(bring, name):
    """A live episode of two rounds is, to the letter, the template's own text of that dialogue: the same
    tools, all answers, the next header, nothing twice. (Llama 2 has a space in front of its end token
    that was never sampled; Mistral repeats tools and system text at the last question only.)"""
    talk = chat.TemplateChat(bring(FAMILIES[name][0]), "Think first.")
    history = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "One."},
               {"role": "user", "content": "1+2?"}]
    answers = [["drei", "[4]"], ["‖turn‖"]]
    for row in ({"messages": history, "tools": [TOOL]}, {"messages": history, "tools": []}):
        dialogue = list(history)
        for text, results in zip(("One.", "Two."), answers):
            dialogue.append({"role": "assistant", "content": text})
            dialogue += [{"role": "tool", "content": result} for result in results]
        whole = "".join(talk.render(dialogue, row["tools"]))
        live = episode(talk, row, ("One.", "Two."), answers)
        if name == "GLM":  # closes no turn
            live = live.replace("<|endoftext|>", "")
        if name in ("Llama 2", "Mistral", "Mistral, ids"):
            live, whole = live.replace(" ", ""), whole.replace(" ", "")
        if name == "Mistral" and row["tools"]:
            listed = whole[whole.index("[AVAIL"):whole.index("[/AVAIL")] + "[/AVAILABLE_TOOLS]"
            live, whole = (text.replace(listed, "").replace("Thinkfirst.\n\n", "") for text in (live, whole))
        assert live == whole
        assert all(live.count(result) == 1 for results in answers for result in results)


def test_replies_to_the_letter(bring):
    """Four families' replies, written down by hand: the sampled end token is left out, an answer without
    a branch is a user turn, several of them one."""
    expected = {
        "ChatML": "\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n",
        "Llama 3": "<|start_header_id|>ipython<|end_header_id|>\n\n\"3\"<|eot_id|><|start_header_id|>ipython"
                   "<|end_header_id|>\n\n\"4\"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Gemma": "\n<start_of_turn>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n"
                 "</tool_response><end_of_turn>\n<start_of_turn>model\n",
        "Mistral, ids": "[TOOL_RESULTS]3[/TOOL_RESULTS][TOOL_RESULTS]4[/TOOL_RESULTS]"}
    for name, text in expected.items():
        talk = chat.TemplateChat(bring(FAMILIES[name][0]))
        assert read(talk, talk.reply(ROW, ["3", "4"], talk.end_id)) == text
        end = FAMILIES[name][1]
        other = talk.tokenizer.eos_token_id  # sampled instead of the template's: that one still stands
        assert read(talk, talk.reply(ROW, ["3", "4"], other)) == end + text


def test_a_space_in_front_of_the_end_token_does_not_hide_it(bring):
    """Llama 2 writes ' </s>': the sampled </s> is not written a second time."""
    talk = chat.TemplateChat(bring(LLAMA2))
    text = read(talk, talk.reply(ROW, ["3"], talk.end_id))
    assert text == "<s>[INST] <tool_response>\n3\n</tool_response> [/INST]"


def test_a_tools_answer_may_contain_any_text(bring):
    """Marks, tags and end tokens in answers and in the dialogue do not move the cut."""
    talk = chat.TemplateChat(bring(CHATML))
    row = {**ROW, "messages": [{"role": "user", "content": "turn1mark ‖turn‖"}]}
    nasty = ["a turn0mark b", "‖turn‖ turn2mark", "<|im_end|>\n<|im_start|>assistant\n", ""]
    turns = "".join(f"<|im_start|>tool\n{text}<|im_end|>\n" for text in nasty)
    assert read(talk, talk.reply(row, nasty, talk.end_id)) == f"\n{turns}<|im_start|>assistant\n"


def test_user_turns_made_of_answers_join_their_neighbours(bring):
    """Where a user adds to a tool's answer the roles still alternate; two questions in a row, which the
    data has, are left as they are."""
    talk = chat.TemplateChat(bring(GEMMA))
    dialogue = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "A."},
                {"role": "tool", "content": "3"}, {"role": "user", "content": "And?"}]
    text = "".join(talk.render(dialogue, []))
    assert "user\n<tool_response>\n3\n</tool_response>\nAnd?<end_of_turn>\n<start_of_turn>model" in text
    with pytest.raises(ValueError, match="refuses the roles user, user: roles must alternate"):
        talk.render([dialogue[0], dialogue[-1]], [])


def test_a_system_text_that_only_some_dialogues_show_goes_to_the_user(bring):
    """Mistral's shows it where the dialogue ends with a question: behind a tool turn it would be gone."""
    half = MISTRAL_ID.replace("{% if loop.first and", "{% if loop.last and")
    talk = chat.TemplateChat(bring(half), "Think first.")
    assert talk.ways[True] == (False, {"tool_call_id": "call00000"})
    called = [*ROW["messages"], {"role": "assistant", "content": "A."}, {"role": "tool", "content": "3"}]
    for messages in (ROW["messages"], called):
        assert "".join(talk.render(messages, [TOOL])).count("Think first.\n\n1+2?") == 1


def test_tools_that_a_template_loses_or_escapes_are_listed_as_text(bring):
    """Not shown at all, shown behind questions only, or in ASCII."""
    for shown in ("{{ t.function.name }}", "{{ t | tojson(ensure_ascii=True) }}"):
        talk = chat.TemplateChat(bring(CHATML.replace("{{ t | tojson }}", shown)), "Think first.")
        text = read(talk, talk.prompt(ROW))
        assert text.startswith(f"<|im_start|>system\nThink first.\n\n{chat.TOOLS_TEXT}")
        assert json.dumps(TOOL["function"]) in text and "<tools>" not in text
    question = CHATML.replace("{% if tools %}", "{% if tools and messages[-1].role == 'user' %}")
    talk = chat.TemplateChat(bring(question))
    assert talk.ways[True] == (True, None)  # answers as user turns bring the tools back
    called = [*ROW["messages"], {"role": "assistant", "content": "A."}, {"role": "tool", "content": "3"}]
    assert "<tools>" in "".join(talk.render(called, [TOOL]))


def test_instructions_are_for_rows_with_tools(bring):
    """A prompt that lists its own tools also says how to call them."""
    talk = chat.TemplateChat(bring(CHATML), "Think first.")
    brief = [{"role": "system", "content": "Be brief."}, *ROW["messages"]]
    assert "Think first." not in read(talk, talk.prompt({"messages": brief, "tools": []}))
    text = read(talk, talk.prompt({"messages": brief, "tools": [TOOL]}))
    assert "system\nThink first.\n\nBe brief.<|im_end|>" in text


def test_a_turn_that_the_template_does_not_open_is_opened(bring):
    """Without a branch for add_generation_prompt the policy would have to write the header itself."""
    talk = chat.TemplateChat(bring(CHATML.removesuffix(HEADER)))
    assert read(talk, talk.prompt(ROW)) == read(talk, chat.TemplateChat(bring(CHATML)).prompt(ROW))
    assert read(talk, talk.reply(ROW, ["3"], talk.end_id)).endswith("3<|im_end|>\n<|im_start|>assistant\n")
    assert any("does not open" in note for note in talk.notes)
    assert chat.TemplateChat(bring(LLAMA2)).header == ""  # has none


# -------------------------------------------------------------------------------------- end of turn

def test_a_base_tokenizer_with_a_chat_template_ends_its_turns(bring):
    """eos <|endoftext|>, turns closed by <|im_end|>: the perfect answer ends there, scores 1, and the end
    token is in a region; live, the second turn follows."""
    brought = bring(CHATML)
    talk = chat.TemplateChat(brought)
    end = brought.convert_tokens_to_ids("<|im_end|>")
    assert talk.end_id == end and talk.end_ids == {end, brought.eos_token_id}
    assert any("'<|im_end|>', not with the tokenizer's eos" in note for note in talk.notes)
    ended = copy.deepcopy(brought)
    ended.eos_token = "<|im_end|>"  # what the scripts end with
    cfg = rest.Config(max_completion_tokens=200)
    batch = rest.rollout(rest.Engine(scripted(ended, [CALL])), talk, [ROW], cfg, group=1)
    assert not batch.truncated.any() and batch.texts == [[CALL]]
    assert rest.score_texts(batch.texts[0], ROW) == (1.0, 1.0, True)
    region, _ = rest.token_regions(batch, talk)
    assert batch.tokens[0, batch.length[0] - 1] == end and region[0, batch.length[0] - 1] == rest.TAG

    answer = "<think>done</think><response>3</response>"
    cfg = rest.Config(max_completion_tokens=300, max_turns=2)
    batch = rest.rollout(rest.Engine(scripted_turns(ended, [[CALL, answer]])), talk, [ROW], cfg, group=1,
                         toolbox_for=adder)
    assert batch.texts == [[CALL, answer]]
    text = talk.decode(batch.tokens[0].tolist())
    reply = "\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
    assert text == f"{CALL}<|im_end|>{reply}{answer}<|im_end|>"


def test_what_generation_config_ends_with_ends_a_turn(bring):
    """An id or a list; beside the template's token and the tokenizer's eos."""
    brought = bring(CHATML)
    own = chat.TemplateChat(brought).end_ids
    for more, added in ((None, set()), (7, {7}), ([7, 8], {7, 8})):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=more))
        assert chat.TemplateChat(brought, model=model).end_ids == own | added


def test_a_turn_closed_by_no_token_ends_with_eos(bring, tokenizer):
    """By text that is several tokens, or by nothing: the tokenizer's eos is taught, and that is said. Where
    the next header is one token it ends a turn, too (GLM), and is not written twice."""
    for template in (CHATML.replace("<|im_end|>", "###"), CHATML.replace("<|im_end|>", "<|no_token|>")):
        talk = chat.TemplateChat(bring(template))
        assert talk.end_ids == {talk.tokenizer.eos_token_id} == {talk.end_id}
        assert any("no token closes the turn" in note for note in talk.notes)
    begun = bring(LLAMA2.replace(" </s>", ""))  # nor does the <s> of the next question
    begun.bos_token = "<s>"
    assert chat.TemplateChat(begun).end_id == begun.eos_token_id
    talk = chat.TemplateChat(bring(GLM))
    ids = talk.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    assert talk.end_id == ids[0] and talk.end_ids == set(ids[:2])
    assert read(talk, talk.reply(ROW, ["3"], ids[2])) == "\n3<|assistant|>\n"
    assert read(talk, talk.reply(ROW, ["3"], ids[0])) == "<|observation|>\n3<|assistant|>\n"
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    endless.chat_template = CHATML.replace("<|im_end|>", "###")
    with pytest.raises(ValueError, match="no turn could end: set tokenizer.eos_token"):
        chat.TemplateChat(endless)


def test_an_end_token_must_be_in_the_models_vocabulary(bring):
    """Added to the tokenizer, but the embedding was not resized: an index error in the first step."""
    brought = bring(FAMILIES["Llama 3"][0])
    with pytest.raises(ValueError, match="'<|eot_id|>', which ends a turn, is not in the model's vocabulary"):
        chat.TemplateChat(brought, model=qwen3(265))
    assert chat.TemplateChat(brought, model=qwen3(len(brought))).end_id == len(brought) - 5


# ----------------------------------------------------------------------------------------- thoughts

THINKING = ("{% if enable_thinking is defined and enable_thinking %}<think>\n{% else %}"
            "<think>\n\n</think>\n\n{% endif %}{% endif %}")


def test_an_open_thought_is_forced_in_every_turn(bring):
    """And where the template closes an empty one by default it is asked to leave it open."""
    for opening in ("<think>\n{% endif %}", THINKING):
        talk = chat.TemplateChat(bring(CHATML.removesuffix("{% endif %}") + opening))
        for pair in (talk.prompt(ROW), talk.reply(ROW, ["3"], talk.end_id)):
            assert talk.decode(pair[0]).endswith("<|im_start|>assistant\n")
            assert talk.decode(pair[1]) == "<think>\n"
        assert any("enable_thinking=True" in note for note in talk.notes) == (opening == THINKING)


def test_a_thought_that_is_closed_where_tools_are_given_is_left_open_too(bring):
    """Without tools this template closes none."""
    closes = THINKING.replace("{% else %}", "{% elif tools %}").removesuffix("{% endif %}")
    talk = chat.TemplateChat(bring(CHATML.removesuffix("{% endif %}") + closes + "{% endif %}"))
    assert talk.options == {"enable_thinking": True}
    prompt, opening = talk.prompt(ROW)
    assert talk.decode(prompt).endswith("<|im_start|>assistant\n") and talk.decode(opening) == "<think>\n"


def test_a_thought_that_stays_closed_is_prompt_and_the_reward_is_told(bring):
    """It is no part of the completion, in which a thought of the policy's own earns the format point."""
    closed = CHATML.removesuffix("{% endif %}") + "<think>\n\n</think>\n\n{% endif %}"
    talk = chat.TemplateChat(bring(closed))
    prompt, opening = talk.prompt(ROW)
    assert talk.decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n") and opening == []
    assert any("earns nothing" in note for note in talk.notes)
    batch = rest.rollout(rest.Engine(scripted(bring(closed, "<|im_end|>"), [CALL])), talk, [ROW],
                         rest.Config(max_completion_tokens=200), group=1)
    assert rest.score_texts(batch.texts[0], ROW) == (1.0, 1.0, True)
    given, learnt = talk.target(ROW, CALL)
    assert given == prompt and talk.decode(learnt) == CALL + "<|im_end|>"


def test_thoughts_and_calls_that_a_template_loses_are_named(bring):
    """Qwen3 drops thoughts in front of the last question and rewrites them behind it; others drop both."""
    left_out, rewritten = (note for note in chat.TemplateChat(bring(QWEN3)).notes if "rows cut" in note)
    assert "leaves out the thoughts of assistant turns followed by a user turn" in left_out
    assert "does not write assistant turns that a tool has answered as they were" in rewritten
    strip = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].split('<tool_call>')[0] }}")
    notes = chat.TemplateChat(bring(strip)).notes
    assert sum("leaves out the thoughts and calls" in note for note in notes) == 2
    assert not any("rows cut" in note for note in chat.TemplateChat(bring(HERMES)).notes)


# ----------------------------------------------------------------------------------------- targets

def test_a_supervised_target_loses_what_is_forced_and_nothing_else(bring):
    """Cut by content: '<think>\\n' is more tokens than '<think>', of which only the tag is in the text."""
    opened = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    talk = chat.TemplateChat(bring(opened))
    prompt, opening = talk.prompt(ROW)
    assert len(opening) > 1
    for text, left in ((CALL, CALL.removeprefix("<think>")), ("<think>\nsum</think>", "sum</think>"),
                       ("\n<think> sum</think>", " sum</think>"), ("<think>\n\nsum", "\nsum"),
                       ("<think>", "")):
        given, learnt = talk.target(ROW, text)
        assert given == prompt + opening and learnt[-1] == talk.end_id
        assert talk.decode(learnt[:-1]) == left
    with pytest.raises(ValueError, match="begins with '<response>3': give it a thought"):
        talk.target(ROW, "<response>3")
    talk = chat.TemplateChat(bring(CHATML))
    given, learnt = talk.target(ROW, "\n" + CALL)  # nothing is forced, nothing is cut
    assert given == talk.prompt(ROW)[0] and talk.decode(learnt) == "\n" + CALL + "<|im_end|>"


def test_what_a_supervised_step_teaches_is_what_a_rollout_scores(bring):
    """The policy that writes the target's ids ends its turn and has the text, forced thought included."""
    opened = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    talk = chat.TemplateChat(bring(opened))
    _, learnt = talk.target(ROW, CALL)

    forced = len(talk.prompt(ROW)[1])

    def script(row, t, last):
        logits = torch.zeros(len(talk.tokenizer))
        logits[learnt[max(0, t - forced)]] = 30.0
        return logits
    engine = rest.Engine(ScriptedModel(script, len(talk.tokenizer)))
    batch = rest.rollout(engine, talk, [ROW], rest.Config(max_completion_tokens=200), group=1)
    assert batch.texts == [[CALL]] and not batch.truncated.any()


# ------------------------------------------------------------------------------- texts and refusals

def test_a_template_of_its_own_for_tools(bring):
    """Tokenizers may hold several by name: each is asked about the rows that it renders."""
    talk = chat.TemplateChat(bring({"default": NO_TOOL_TURNS, "tool_use": CHATML}))
    assert talk.ways == {False: (True, None), True: (True, {})}
    assert "user\n<tool_response>" in read(talk, talk.reply({**ROW, "tools": []}, ["3"], talk.end_id))
    assert "tool\n3" in read(talk, talk.reply(ROW, ["3"], talk.end_id))


def test_half_surrogates_become_one_replacement_character(bring):
    """JSON allows them, tokenizers raise: in messages, tools, instructions, answers and targets."""
    half = "a\ud83d!"
    for template in (CHATML, SMOLLM2):
        talk = chat.TemplateChat(bring(template), half)
        tool = {"type": "function", "function": {**TOOL["function"], "description": half}}
        row = {"messages": [{"role": "user", "content": half}], "tools": [tool]}
        text = read(talk, talk.prompt(row))
        assert text.count("a\ufffd!") == 3 and "\ud83d" not in text
        assert "tool\na\ufffd!<|im_end|>" in read(talk, talk.reply(row, [half], talk.end_id))
        assert talk.decode(talk.target(row, half)[1]) == "a\ufffd!<|im_end|>"


@pytest.mark.parametrize("template, reason", [
    (None, "has no chat template"),
    ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", "does not show each turn"),
    ("{{ messages[-1].content }}", "does not show each turn"),
    (TURNS + TURNS, "does not show each turn"),
    (TURNS.replace("in messages", "in messages | reverse"), "does not show each turn"),
    ("{{ raise_exception('never') }}", "refuses the roles user: never"),
    ("{{ messages[0].parts.text }}", "refuses the roles user"),
    ("{{ messages[0].content + 1 }}", "refuses the roles user"),
])
def test_a_template_that_loses_turns_is_refused(bring, template, reason):
    """In one sentence, before the first step."""
    with pytest.raises(ValueError, match=reason) as error:
        chat.TemplateChat(bring(template))
    assert "\n" not in str(error.value)


def test_what_one_row_alone_breaks_is_named_by_its_roles_and_tools(bring):
    """The probe cannot know them all: a tool without properties, an assistant turn that does not show."""
    signature = CHATML.replace("{{ t | tojson }}", "{{ t.function.name }}{{ t.function.description }}"
                               "{% for p in t.function.parameters.properties.items() %}{{ p }}{% endfor %}")
    talk = chat.TemplateChat(bring(signature))
    bare = {"type": "function", "function": {"name": "now", "description": "", "parameters": {}}}
    with pytest.raises(ValueError, match=r"refuses the roles user \(tools: now\)"):
        talk.prompt({**ROW, "tools": [bare]})
    picky = "{% if not (m.role == 'assistant' and messages[0].content == '1+2?') %}{{ m.content }}{% endif %}"
    talk = chat.TemplateChat(bring(CHATML.replace("{{ m.content }}", picky)))
    with pytest.raises(ValueError, match="does not show an assistant turn behind user"):
        talk.reply(ROW, ["3"], talk.end_id)



def test_what_is_found_is_said_once(bring, caplog):
    """A training run makes several chats of one tokenizer."""
    rest.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "rest"):
        talks = [chat.TemplateChat(bring(GEMMA)) for _ in range(3)]
    assert [record.getMessage() for record in caplog.records] == talks[0].notes == talks[2].notes
    assert len(talks[0].notes) == 4 and len(set(talks[0].notes)) == 4
