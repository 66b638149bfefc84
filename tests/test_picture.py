"""The picture of a run's completions: every sampled token in its region's colour, weights as recorded,
hostile text inert."""

import json
from xml.etree import ElementTree

import pytest

import rest
from toy_tools import picture

HOSTILE = "</svg><script>alert(1)</script>&<"
CONTROL = "\x08\x1b\ufffe\ud800"  # no character of XML


def run(folder, exact=True):
    tokens = ["<think>", HOSTILE, "</think>", "\n", "add", CONTROL]
    region = [rest.TAG, rest.THOUGHT, rest.TAG, rest.SCAFFOLD, rest.NAME, -1]
    weights = {"rest": {"0": 1.5, "4": 0.5, "1": 1.5, "2": 0.25}, "shuffled": [1.0, 2.0, 3.0, 0.1, 0.2, 0.0]}
    completion = {"tokens": tokens, "region": region, "exact": exact, "w": weights}
    dull = {**completion, "tokens": ["x"], "region": [rest.TEXT], "exact": False, "w": {"rest": {"5": 1.0}}}
    steps = [{"step": step, "groups": [{"completions": [dull, completion]}]} for step in (0, 99)]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "config.json").write_text(json.dumps({"config": {"method": "rest"}}))
    return folder


@pytest.mark.parametrize("method, labels", [
    ("", ["1.50", "0.50", "1.50", "0.25"]),
    ("shuffled", ["1.00", "2.00", "3.00", "0.20"])])
def test_tokens_regions_and_weights_are_those_recorded(tmp_path, method, labels):
    """The most telling completion of the first and the last step; hostile text is text; a line break
    breaks the line."""
    picture.picture(run(tmp_path), tmp_path / "a.svg", method)
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert {child.tag for child in root} == {space + "rect", space + "text"}
    written = list(root.iter(space + "text"))
    texts = [child.text for child in written]
    assert [text for text in texts if text.startswith("step")] == ["step 0", "step 99"]
    assert texts.count(HOSTILE) == 2 and "x" not in texts
    assert texts.count("\ufffd" * 4) == 2
    first = texts[texts.index("step 0"):texts.index("step 99")]
    assert [text for text in first if text.replace(".", "").isdigit()][:len(labels)] == labels
    colour = {child.text: child.get("fill") for child in written if child.get("font-size") == "10"}
    if not method:
        assert colour["0.25"] == picture.COLOURS["name"] and colour["0.50"] == picture.COLOURS["thought"]


@pytest.mark.parametrize("recorded", [None, "", '{"step": 0, "gro'])
def test_a_run_without_episodes_is_named(tmp_path, recorded):
    if recorded is not None:
        (tmp_path / "episodes.jsonl").write_text(recorded)
    with pytest.raises(ValueError, match="no episodes.jsonl"):
        picture.picture(tmp_path, tmp_path / "a.svg")


@pytest.mark.parametrize("name", ["episodes.jsonl", "config.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    (run(tmp_path) / name).write_text("[1]\n")
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        picture.picture(tmp_path, tmp_path / "a.svg")


def test_a_last_line_cut_by_a_kill_is_left_out(tmp_path):
    with open(run(tmp_path) / "episodes.jsonl", "a") as file:
        file.write('{"step": 100, "gro')
    picture.picture(tmp_path, tmp_path / "a.svg")
    assert "step 99" in (tmp_path / "a.svg").read_text()


def test_weights_that_were_not_recorded_are_named(tmp_path):
    with pytest.raises(ValueError, match="no weights of 'grpo', but those of rest, shuffled"):
        picture.picture(run(tmp_path), tmp_path / "a.svg", "grpo")
