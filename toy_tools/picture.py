"""A picture of two completions of a run, from its first and its last recorded step: every token in the
colour of its region, the darker the heavier it weighs, its weight below. For README and papers:

    python -m toy_tools.picture runs/rest-seed0 episode.svg
"""

import re
import sys
from html import escape
from pathlib import Path

import rest
from toy_tools import runs
from toy_tools.report import read_lines

COLOURS = {
    "format": "#7a7f87",
    "name": "#c98a00",
    "params": "#0b7fab",
    "thought": "#3a8f3a",
    "text": "#a03fa0"}
PAPER = {r: name for name, members in rest.PAPER_REGIONS.items() for r in members}
FONT = 'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14"'
WIDTH = 88   # characters a line
CHAR = 8.4   # pixels, and so the others
FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # in XML
LINE = 38
MARGIN = 16


def picture(folder, out, method=""):
    """Write the SVG, with weights of this method (the run's own by default). Raises ValueError if the run has
    recorded no episodes, or not this method's weights."""
    folder = Path(folder)
    steps = read_lines(folder / "episodes.jsonl")
    if not steps:
        raise ValueError(f"{folder} has no episodes.jsonl, or an empty one: only runs of train_small.py that "
                         "took a step have recorded episodes")
    method = method or runs.read_json(folder / "config.json")["config"]["method"]
    y = MARGIN + 8
    parts = []
    for step in (steps[0], steps[-1]):
        completion = typical(step)
        if method not in completion["w"]:
            raise ValueError(f"{folder} recorded no weights of {method!r}, but those of "
                             f"{', '.join(completion['w'])}")
        parts.append(text(MARGIN, y, f"step {step['step']}", "#57606a", 'font-weight="bold"'))
        y = draw(parts, completion, method, y + 26) + 20
    x = MARGIN
    for name, colour in COLOURS.items():
        parts.append(f'<rect x="{x}" y="{y - 11}" width="12" height="12" rx="2" fill="{colour}"/>')
        parts.append(text(x + 18, y, name, "#57606a"))
        x += 30 + CHAR * len(name) + 12
    y += 24
    legend = "the darker the heavier; below is the weight w of the tokens, 1 is GRPO"
    parts.append(text(MARGIN, y, legend, "#57606a"))
    width = int(2 * MARGIN + WIDTH * CHAR)
    height = y + MARGIN
    body = "\n".join(parts)
    Path(out).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" {FONT}>\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n', encoding="utf-8")


def typical(step):
    """The completion with most regions, an exact one if there is one."""
    every = [completion for group in step["groups"] for completion in group["completions"]]
    return max(every, key=lambda completion: (completion["exact"], len(set(completion["region"]))))


def weights(completion, method):
    found = completion["w"][method]  # a list, or {region: weight}
    if isinstance(found, list):
        return found
    return [found.get(str(region), 0.0) for region in completion["region"]]


def draw(parts, completion, method, y):
    """Append the tokens, line by line; returns the y of the last line."""
    column = 0
    label_free = 0  # a weight is written where it differs from the last, if there is room
    last = None
    shown = zip(completion["tokens"], completion["region"], weights(completion, method))
    for token, region, w in shown:
        for k, piece in enumerate(token.replace("\t", " ").split("\n")):
            if k or column + len(piece) > WIDTH:
                column = 0
                y += LINE
                label_free = 0
                last = None
            if not piece:
                continue
            x = MARGIN + column * CHAR
            colour = COLOURS[PAPER[region]] if region >= 0 else "#000000"
            shade = min(0.85, 0.08 + 0.35 * w)
            parts.append(f'<rect x="{x:.1f}" y="{y - 14}" width="{len(piece) * CHAR:.1f}" height="19" '
                         f'fill="{colour}" fill-opacity="{shade:.2f}"/>')
            parts.append(text(x, y, piece, "#1f2328"))
            if last != (region, w) and column >= label_free and piece.strip():
                parts.append(text(x, y + 16, f"{w:.2f}", colour, 'font-size="10"'))
                label_free = column + 4
                last = (region, w)
            column += len(piece)
    return y + LINE - 12


def text(x, y, content, colour, more=""):
    content = escape(FORBIDDEN.sub("\ufffd", content))
    return f'<text x="{x:.1f}" y="{y}" fill="{colour}" xml:space="preserve" {more}>{content}</text>'


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m toy_tools.picture RUN OUT.svg [METHOD]")
    try:
        picture(*sys.argv[1:4])
    except (ValueError, OSError) as error:
        sys.exit(f"toy_tools.picture: error: {error}")
