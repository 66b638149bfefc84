"""The page of a run: what is recorded, what it is made of, and how it behaves in a real browser."""

import dataclasses
import json
import math
import re
import shutil

import pytest
import torch

import rest
from toy_tools import report

TAG, SCAFFOLD, NAME, PARAMS, THOUGHT, TEXT = range(6)
TAGS = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=2"><!--'
# a line separator, a turn of direction, half a character, a word that is wider than a phone
HOSTILE = TAGS + "\u2028\u202e&lt;b&gt;\ud800" + "w" * 99
GOLD = [[{"name": "add", "arguments": {"a": 1, "b": 2}}]]


def task(question, gold, category):
    message = {"role": "user", "content": question}
    return {"messages": [message], "tools": [], "gold": gold, "category": category}


ROWS = [task("1+2?", GOLD, "simple"), task("hello " + HOSTILE, [[]], "irrelevance"),
        task("again", GOLD, "simple")]


def call_pieces(name, arguments):
    return [("<think>", TAG), ("sum", THOUGHT), ("</think>", TAG), ("<tool_call>", TAG),
            ('{"name": "', SCAFFOLD), (name, NAME), ('", "arguments": ', SCAFFOLD), (arguments, PARAMS),
            ("}", SCAFFOLD), ("</tool_call>", TAG), ("<end>", TAG)]


def answer_pieces(text):
    return [("<think>", TAG), ("no tool", THOUGHT), ("</think>", TAG), ("<response>", TAG), (text, TEXT),
            ("</response>", TAG), ("<end>", TAG)]


RIGHT = call_pieces("add", '{"a": 1, "b": 2}')
WRONG = call_pieces("add", '{"a": 1, "b": 3}')
CUT = answer_pieces(HOSTILE)[:-2]
EPISODES = [RIGHT, WRONG, answer_pieces("Hello!"), CUT, RIGHT, RIGHT]  # the last group teaches nothing


class FakeChat:
    """Ids are positions in a list of texts."""

    def __init__(self):
        self.texts = []

    def id(self, text):
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text)

    def text(self, token):
        return self.texts[token]

    def decode(self, ids):
        return "".join(map(self.text, ids))


def fake_batch(chat, episodes=EPISODES, rows=ROWS, seed=0, forced=()):
    """A Rollout made by hand from (text, region) pieces; columns in `forced` were not sampled."""
    N, T = len(episodes), max(map(len, episodes))
    tokens = torch.zeros(N, T, dtype=torch.long)
    region = torch.full((N, T), -1)
    for i, pieces in enumerate(episodes):
        tokens[i, :len(pieces)] = torch.tensor([chat.id(text) for text, _ in pieces])
        region[i, :len(pieces)] = torch.tensor([r for _, r in pieces])
    region[:, list(forced)] = -1
    sampled = region >= 0
    entropy = torch.rand(N, T, generator=torch.Generator().manual_seed(seed)) * sampled
    return rest.Rollout(
        rows=rows,
        prompts=[[chat.id("prompt " + row["messages"][0]["content"])] for row in rows],
        group=N // len(rows),
        tokens=tokens,
        sampled=sampled,
        logp=-2 * entropy,
        entropy=entropy,
        length=torch.tensor([len(pieces) for pieces in episodes]),
        truncated=torch.zeros(N, dtype=torch.bool),
        turns=[[(0, len(pieces))] for pieces in episodes],
        texts=[["".join(text for text, _ in pieces if text != "<end>")] for pieces in episodes],
        refused=[0] * N,
        region=region,
        covers=torch.nn.functional.one_hot(region.clamp(min=0), 6).bool() & sampled[..., None])


def config(**changes):
    return rest.Config(**{"steps": 20, "prompts": 3, "group": 2, **changes})


def record(recorder, step, batch, cfg, chat):
    """Score the batch as a training step does, and record it; returns the advantages [P, G]."""
    batch.scores = rest.score_batch(batch)
    progress = step / cfg.steps
    rewards = [rest.episode_reward(*score[:2], progress, cfg.reward_scaling) for score in batch.scores]
    advantages = rest.group_advantages(torch.tensor(rewards).view(-1, batch.group))
    batch.advantages = advantages.flatten()
    weight = rest.WEIGHTS[cfg.method](batch, cfg, progress)
    recorder.record(step, batch, weight, cfg, chat)
    return advantages


def fake_run(folder, method="rest", seed=0, steps=20, shift=0.0):
    """A finished run's folder: curves, and episodes of the steps 0, 10 and the last."""
    folder.mkdir()
    cfg, chat = config(method=method, seed=seed, steps=steps), FakeChat()
    recorder = report.Recorder(folder)
    lines = []
    for step in range(steps):
        record(recorder, step, fake_batch(chat, seed=step), cfg, chat)
        line = {f"{kind}_{name}": 1 + 0.01 * step for kind in "Hw" for name in rest.PAPER_REGIONS}
        line |= {"step": step, "exact": 0.3 + step / 50 + shift, "format": 0.5, "correct": 0.5}
        lines.append(line | {"reward": step / 10, "tokens": 40.0, "loss": 7.0})
    lines[1]["reward"] = math.nan
    parts = {"config": {"config": dataclasses.asdict(cfg), "run": {"name": folder.name, "model": ""}},
             "time": {"rollout": 5.0, "update": 4.0, "other": 1.0, "steps": 10.0, "run": 20.0}}
    for when, exact in (("before", 0.3), ("after", 0.7)):
        row = {"n": 10, "exact": exact + shift, "format": 1.0, "correct": None, "tokens": 4.0}
        parts[when] = {"all": row}
    for name, value in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def stored(folder):
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


def embedded(page):
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    return json.loads(data[1])


def weight_of(completion, t, method):
    w = completion["w"][method]
    return w[t] if isinstance(w, list) else w[str(completion["region"][t])]


# ---- recording ----

@pytest.mark.parametrize("forced", [(), (1, 3)])
def test_every_method_s_weights_are_stored_as_rest_computes_them(tmp_path, forced):
    """The page computes no weight of its own, so what is stored must be what the method gives the token in
    the whole batch at this progress: by region or not, with a tool's results in between or not."""
    cfg, chat = config(), FakeChat()
    batch = fake_batch(chat, forced=forced)
    record(report.Recorder(tmp_path, prompts=3), 10, batch, cfg, chat)
    groups = {group["asked"]: group["completions"] for group in stored(tmp_path)[0]["groups"]}
    assert len(groups) == 3
    lists = set()
    for name, method in rest.WEIGHTS.items():
        true = method(batch, dataclasses.replace(cfg, method=name), 0.5)
        for i in range(6):
            completion = groups[ROWS[i // 2]["messages"][0]["content"]][i % 2]
            lists |= {name} if isinstance(completion["w"][name], list) else set()
            assert len(completion["region"]) == len(completion["tokens"]) == len(EPISODES[i])
            for t, region in enumerate(completion["region"]):
                assert region == int(batch.region[i, t])
                if region >= 0:
                    assert weight_of(completion, t, name) == pytest.approx(float(true[i, t]), rel=6e-3)
    assert "token-entropy" in lists and not {"rest", "grpo", "no-thought"} & lists


def test_an_episode_is_stored_with_all_that_the_page_shows(tmp_path):
    """Every number of one completion, worked out by hand: 3 of 4 points of correctness, so a reward of
    2 + 2 (2 * 3/4 - 1) = 3 beside 4, and an advantage of -1/sqrt 2."""
    cfg, chat = config(), FakeChat()
    batch = fake_batch(chat)
    batch.refused[1] = 2
    batch.truncated[1] = True
    record(report.Recorder(tmp_path), 0, batch, cfg, chat)
    first, second = stored(tmp_path)[0]["groups"]
    assert (first["asked"], first["prompt"], first["category"]) == ("1+2?", "prompt 1+2?", "simple")
    assert first["gold"] == [[["add", '{"a": 1, "b": 2}']]]
    wrong = first["completions"][1]
    assert wrong["tokens"] == [text for text, _ in WRONG]
    assert wrong["region"] == [region for _, region in WRONG]
    assert wrong["H"] == pytest.approx(batch.entropy[1].tolist(), abs=6e-4)
    assert wrong["logp"] == pytest.approx(batch.logp[1].tolist(), abs=6e-4)
    assert wrong["calls"] == [[0, "wrong", "add", [["a", "1", "1", True], ["b", "3", "2", False]]]]
    assert (wrong["format"], wrong["correct"], wrong["exact"], wrong["reward"]) == (1.0, 0.75, False, 3.0)
    assert wrong["A"] == pytest.approx(-0.5 ** 0.5, abs=1e-3)
    assert (wrong["blocks"], wrong["refused"], wrong["truncated"]) == ([["think", "tool_call"]], 2, True)
    assert second["completions"][1]["blocks"] == [["think", "response (not closed)"]]


def test_prompts_that_teach_come_first_and_their_number_is_kept(tmp_path):
    """A group of equal rewards has no gradient: with room for two of three prompts it is the one left out,
    wherever it stands."""
    cfg, chat = config(), FakeChat()
    order = [2, 0, 1]
    episodes = [EPISODES[2 * p + k] for p in order for k in (0, 1)]
    batch = fake_batch(chat, episodes, [ROWS[p] for p in order])
    record(report.Recorder(tmp_path, prompts=2), 0, batch, cfg, chat)
    asked = [group["asked"] for group in stored(tmp_path)[0]["groups"]]
    assert asked == [ROWS[p]["messages"][0]["content"] for p in (0, 1)]


def test_a_resumed_run_replaces_what_it_does_again(tmp_path):
    """Killed while it wrote step 20 and resumed at 10: each step stands there once, in order, from the
    second attempt where there were two."""
    cfg, chat = config(steps=25), FakeChat()

    def go(first, last, seed):
        recorder = report.Recorder(tmp_path)
        for step in range(first, last):
            record(recorder, step, fake_batch(chat, seed=seed), cfg, chat)
    go(0, 21, seed=0)
    file = tmp_path / "episodes.jsonl"
    file.write_text(file.read_text()[:-30])
    go(10, 25, seed=1)
    lines = stored(tmp_path)
    assert [line["step"] for line in lines] == [0, 10, 20, 24]
    first = [line["groups"][0]["completions"][0]["H"] for line in lines]
    assert first[0] != first[1] == first[2] == first[3]


def test_recording_changes_neither_the_batch_nor_the_random_numbers(tmp_path):
    """A run that is recorded must be the run that is not."""
    cfg, chat = config(), FakeChat()
    batch, fresh = fake_batch(chat), fake_batch(chat)
    before = torch.get_rng_state()
    record(report.Recorder(tmp_path), 0, batch, cfg, chat)
    assert torch.equal(before, torch.get_rng_state()) and cfg == config()
    for name in ("tokens", "sampled", "logp", "entropy", "region", "covers", "length"):
        assert torch.equal(getattr(batch, name), getattr(fresh, name)), name


@pytest.mark.parametrize("options", [{"every": 0}, {"prompts": 0}])
def test_recorder_refuses_to_record_nothing(tmp_path, options):
    with pytest.raises(ValueError, match="must be at least 1"):
        report.Recorder(tmp_path, **options)


# ---- calls beside gold ----

def call(name, **arguments):
    return {"name": name, "arguments": arguments}


def text_of(*calls):
    lines = [c if isinstance(c, str) else json.dumps(c) for c in calls]
    return "<think>x</think><tool_call>\n" + "\n".join(lines) + "\n</tool_call>"


F1, F2 = call("f", a=1), call("f", a=2)
COMPARED = {
    "equal numbers": ([[F1]], [text_of(call("f", a=1.0))], [[0, "right", "f", [["a", "1.0", "1", True]]]]),
    "another type": ([[F1]], [text_of(call("f", a=True))], [[0, "wrong", "f", [["a", "true", "1", False]]]]),
    "another key": ([[F1]], [text_of(call("f", b=None))],
                    [[0, "wrong", "f", [["a", None, "1", False], ["b", "null", None, False]]]]),
    "no arguments": ([[call("f")]], [text_of(call("f"))], [[0, "right", "f", []]]),
    "one of two": ([[F1, F2]], [text_of(F2)],
                   [[0, "missing", "f", [["a", None, "1", False]]],
                    [0, "right", "f", [["a", "2", "2", True]]]]),
    "twice": ([[F1]], [text_of(F1, F1)],
              [[0, "right", "f", [["a", "1", "1", True]]], [0, "surplus", "f", [["a", "1", None, False]]]]),
    "unasked": ([[]], [text_of(call("g", a="ü"))], [[0, "surplus", "g", [["a", '"ü"', None, False]]]]),
    "wrong turn": ([[call("f")], [call("g")]], [text_of(call("g")), text_of(call("f"))],
                   [[0, "missing", "f", []], [0, "surplus", "g", []],
                    [1, "missing", "g", []], [1, "surplus", "f", []]]),
    "nothing said": ([[call("f")]], [], [[0, "missing", "f", []]]),
    "an answer": ([[]], ["<think>x</think><response>no</response>"], [])}


@pytest.mark.parametrize("name", COMPARED)
def test_calls_beside_gold(name):
    """Every way to be right or wrong has its word."""
    gold, texts, expected = COMPARED[name]
    assert report.compare(gold, texts) == expected


def test_an_unreadable_call_is_shown_with_its_reason():
    missing, unreadable = report.compare([[call("f")]], [text_of('{"name": "f", "arguments": {')])
    assert missing[:3] == [0, "missing", "f"]
    assert unreadable[:2] == [0, "unreadable"] and unreadable[2] and unreadable[3] == []


def test_what_the_page_calls_right_is_what_the_reward_calls_exact():
    """Two notions of equality in one project would mark a call right that is paid as wrong."""
    calls = [F1, call("f", a=1.0), call("f", a="1"), call("f", a=True), call("f"),
             call("g", a=[1, {"b": None}]), call("g", a=[1, {"b": 0}])]
    agreed = 0
    for first in calls:
        for second in (*calls, None):
            for want in calls:
                gold = [[want]] if second is None else [[want, second]]
                texts = [text_of(first)] if second is None else [text_of(second, first)]
                right = all(state == "right" for _, state, *_ in report.compare(gold, texts))
                assert right == rest.score_texts(texts, {"gold": gold})[2], (gold, texts)
                agreed += right
    assert agreed > len(calls)


# ---- the page ----

def test_a_page_of_the_default_run_s_size_is_under_two_megabytes(tmp_path):
    """11 moments of 2 prompts with 8 completions of 100 tokens, the weights of which all differ."""
    cfg, chat = config(steps=100, prompts=2, group=8), FakeChat()
    episodes = [[(f" tok{t}", t % 6) for t in range(100)] for _ in range(16)]
    recorder = report.Recorder(tmp_path)
    for step in (*range(0, 100, 10), 99):
        batch = fake_batch(chat, episodes, [ROWS[0], ROWS[2]], seed=step)
        batch.advantages, batch.scores = torch.arange(16.0), [(1.0, 1.0, True)] * 16
        recorder.record(step, batch, torch.rand(batch.sampled.shape), cfg, chat)
    page = report.write([tmp_path], tmp_path / "page.html")
    assert page.stat().st_size < 2_000_000
    assert len(embedded(page)["runs"][0]["episodes"]) == 11


def test_a_page_too_large_shows_fewer_steps(tmp_path):
    """Evenly spaced from the first to the last; and where nothing fits, the curves alone."""
    run = fake_run(tmp_path / "a", steps=101)
    limit = report.write([run], tmp_path / "whole.html").stat().st_size - 30_000
    page = report.write([run], tmp_path / "page.html", max_bytes=limit)
    shown = embedded(page)["runs"][0]
    steps = [episode["step"] for episode in shown["episodes"]]
    assert page.stat().st_size <= limit and shown["recorded"] == 11
    assert 5 <= len(steps) < 11 and (steps[0], steps[-1]) == (0, 100)
    empty = embedded(report.write([run], tmp_path / "empty.html", max_bytes=1))["runs"][0]
    assert empty["episodes"] == [] and empty["recorded"] == 11


def test_a_page_is_plain_ascii_and_nothing_in_it_ends_the_data(tmp_path):
    """Model output, tool names and folder names are data: no tag, comment or line separator of theirs may
    reach the parser; and NaN, which JSON does not know, is none."""
    page = report.write([fake_run(tmp_path / "a")], tmp_path / "page.html")
    data = page.read_bytes().split(b'id="data">')[1].split(b"</script>")[0]
    assert b"hacked" in data and not set(b"<>&") & set(data) and max(data) < 128
    assert embedded(page)["runs"][0]["metrics"]["reward"][:2] == [0.0, None]


@pytest.mark.parametrize("gone", report.PARTS)
def test_any_part_may_be_missing_and_is_named(tmp_path, gone):
    run = fake_run(tmp_path / "a")
    (run / gone).unlink()
    assert embedded(report.write([run], tmp_path / "page.html"))["runs"][0]["missing"] == [gone]


def test_what_is_no_run_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        report.write([tmp_path / "nowhere"], tmp_path / "page.html")
    with pytest.raises(ValueError, match="holds no run"):
        report.write([tmp_path], tmp_path / "page.html")
    with pytest.raises(SystemExit, match="error: no such folder"):
        report.main([str(tmp_path / "nowhere")])


@pytest.mark.parametrize("text", ["{oops\n", "[1]\n"])
@pytest.mark.parametrize("part", ["time.json", "metrics.jsonl"])
def test_a_damaged_file_is_named(tmp_path, part, text):
    """A last line that a kill has cut is no damage: its step was never recorded."""
    run = fake_run(tmp_path / "a")
    (run / part).write_text(text)
    with pytest.raises(ValueError, match=f"{part} is damaged"):
        report.write([run], tmp_path / "page.html")


def test_runs_that_differ_in_more_than_their_seed_are_not_averaged(tmp_path):
    runs = [fake_run(tmp_path / "a"), fake_run(tmp_path / "b", seed=1), fake_run(tmp_path / "c", steps=30),
            fake_run(tmp_path / "d", method="grpo")]
    labels = [run["label"] for run in embedded(report.write(runs, tmp_path / "page.html"))["runs"]]
    assert labels[0] == labels[1] == "rest, steps 20" and labels[2:] == ["rest, steps 30", "grpo"]


def test_the_command_writes_into_the_run_or_where_it_is_told(tmp_path, capsys):
    a, b = fake_run(tmp_path / "a"), fake_run(tmp_path / "b", seed=1)
    report.main([str(a)])
    assert (a / "report.html").exists() and str(a / "report.html") in capsys.readouterr().out
    with pytest.raises(SystemExit):
        report.main([str(a), str(b)])
    assert "-o" in capsys.readouterr().err
    report.main([str(a), str(b), "-o", str(tmp_path / "both.html")])
    assert [run["name"] for run in embedded(tmp_path / "both.html")["runs"]] == ["a", "b"]


# ---- in a real browser ----

FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-dev-shm-usage",
         "disable-background-networking", "disable-component-update", "disable-sync")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    why = "the page is tried in a browser only with: "
    webdriver = pytest.importorskip("selenium.webdriver", reason=why + "pip install selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip(why + "apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One run; four runs of two methods; a live run; a folder with nothing but its settings."""
    base = tmp_path_factory.mktemp("pages")
    runs = [fake_run(base / "rest-0"), fake_run(base / "rest-1", seed=1, shift=0.1),
            fake_run(base / "grpo-0", "grpo"), fake_run(base / "grpo-1", "grpo", 1)]
    bare, live = base / "bare", base / "live"
    for folder in (bare, live):
        folder.mkdir()
        shutil.copy(runs[0] / "config.json", folder)
    cfg, chat = config(), FakeChat()
    batch = fake_batch(chat, [RIGHT, []] * 3, forced=(1, 3))  # a tool's tokens, and an empty completion
    batch.refused[0] = 1
    record(report.Recorder(live), 0, batch, cfg, chat)
    groups = {"one": runs[:1], "four": runs, "live": [live], "bare": [bare]}
    return {name: report.write(folders, base / f"{name}.html") for name, folders in groups.items()}


@pytest.fixture
def visit(browser, pages):
    """Opens a page in a window of some width, light or dark. Afterwards: no word in the console, and
    nothing fetched but the file itself."""
    opened = set()

    def visit(name, width=1300, dark=False):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        for log in ("browser", "performance"):
            browser.get_log(log)
        opened.add(pages[name].as_uri())
        browser.get(pages[name].as_uri())
        return browser
    yield visit
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert {request["request"]["url"] for request in asked} == opened


def js(browser, value, *arguments):
    """The value of a JavaScript expression; $ finds the first element of a selector, $$ all."""
    helpers = "const $ = s => document.querySelector(s), $$ = s => [...document.querySelectorAll(s)];"
    return browser.execute_script(f"{helpers} return {value}", *arguments)


def text(browser, selector):
    return js(browser, "$(arguments[0]).textContent", selector)


def choose(browser, selector, value):
    """Give a slider or a list a value, as a user does."""
    browser.execute_script("""const node = document.querySelector(arguments[0]);
        node.value = arguments[1];
        for (const kind of ["input", "change"]) node.dispatchEvent(new Event(kind))""", selector, value)


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    for key in keys:
        ActionChains(browser).send_keys(getattr(Keys, key)).perform()


def focus(browser, k, t):
    js(browser, "$$('#group .tokens')[arguments[0]].children[arguments[1]].focus()", k, t)


def shades(browser):
    return js(browser, "$$('#group .token').map(t => getComputedStyle(t).getPropertyValue('--shade'))")


def completions(page):
    return embedded(page)["runs"][0]["episodes"][0]["groups"][0]["completions"]


def test_the_slider_moves_through_the_recorded_steps(visit):
    """By keyboard; the tokens, the label, what a screen reader says and the mark in the curves go along."""
    browser = visit("one")

    def seen():
        return shades(browser), js(browser, "$('.panels .mark').getAttribute('x1')")
    first = seen()
    assert text(browser, "#step-label") == "step 0 of 20 (3 recorded)"
    js(browser, "$('#step').focus()")
    press(browser, "ARROW_RIGHT")
    second = seen()
    assert text(browser, "#step-label") == "step 10 of 20 (3 recorded)"
    assert js(browser, "$('#step').getAttribute('aria-valuetext')") == "step 10"
    assert first[0] != second[0] and first[1] != second[1]
    press(browser, "END")
    assert text(browser, "#step-label") == "step 19 of 20 (3 recorded)"


def test_pointing_at_a_curve_marks_its_step_and_a_click_goes_there(visit):
    browser = visit("one")
    at = "const box = document.querySelector('.panels svg').getBoundingClientRect();"
    event = """document.querySelector('.panels svg').dispatchEvent(new MouseEvent(arguments[0],
        {clientX: box.left + box.width * (30 + 10 / 19 * 236) / 300, clientY: box.top + 50}))"""
    value = "#panels figure .value"
    assert text(browser, value) == "0.30"
    browser.execute_script(at + event, "pointermove")
    assert text(browser, value) == "0.46"  # 0.3 + 8/50, the mean of steps 6 to 10
    assert text(browser, "#step-label").startswith("step 0")
    browser.execute_script(at + event, "pointerleave")
    assert text(browser, value) == "0.30"
    browser.execute_script(at + event, "click")
    assert text(browser, value) == "0.46" and text(browser, "#step-label").startswith("step 10")


def test_the_arrow_keys_move_between_tokens_and_completions(visit):
    """One tab stop per completion; the focus and the panel go together; ends are ends."""
    browser = visit("one")
    focus(browser, 0, 0)
    walk = [(["ARROW_RIGHT", "ARROW_RIGHT"], 3, 1), (["ARROW_DOWN"], 3, 2), (["END", "ARROW_RIGHT"], 11, 2),
            (["ARROW_DOWN"], 11, 2), (["HOME", "ARROW_LEFT"], 1, 2), (["ARROW_UP"], 1, 1)]
    for keys, token, completion in walk:
        press(browser, *keys)
        assert text(browser, "#facts h3") == f"Token {token} of 11, completion {completion}"
        assert js(browser, "document.activeElement.dataset.t") == str(token - 1)
        stops = "$$('#group .tokens').map(list => list.querySelectorAll('[tabindex=\"0\"]').length)"
        assert js(browser, stops) == [1, 1]
    assert js(browser, "document.activeElement.getAttribute('aria-label')") == "<think>, tag"
    assert "objective" in text(browser, "#said")


def test_the_panel_s_numbers_are_the_objective_s(visit, pages):
    """w · min(ρA, clip(ρ)A) of the stored numbers, at ρ = 1 and where the clip binds: a gain stops above
    1 + eps, a loss below 1 - eps, and only there is there no gradient."""
    browser = visit("one")
    clipped = []
    for k, t in ((0, 7), (1, 7), (1, 1)):
        completion = completions(pages["one"])[k]
        w, A = weight_of(completion, t, "rest"), completion["A"]
        focus(browser, k, t)
        facts = js(browser, "$$('#facts dd').map(d => d.textContent)")
        assert facts[0] == rest.REGIONS[completion["region"][t]]
        shown = [float(fact.split()[0].replace("−", "-")) for fact in facts[1:]]
        expected = [completion["H"][t], math.exp(completion["logp"][t]), w, A]
        assert shown == pytest.approx(expected, abs=0.006)
        for ratio in (1.0, 1.4, 0.6):
            choose(browser, "#ratio", ratio)
            term = w * min(ratio * A, min(max(ratio, 0.8), 1.2) * A)
            shown = float(text(browser, "#objective b")[2:].replace("−", "-"))
            assert shown == pytest.approx(term, abs=0.006)
            if "Clipped" in text(browser, "#objective"):
                clipped.append((k, ratio))
    assert clipped == [(0, 1.4), (1, 0.6), (1, 0.6)]


def test_the_switches_of_method_and_channel(visit, pages):
    """Each channel shades by its own number, each method by its own weights, and the place is kept."""
    browser, data = visit("one"), completions(pages["one"])
    focus(browser, 1, 7)
    w, A, H, logp = weight_of(data[1], 7, "rest"), data[1]["A"], data[1]["H"][7], data[1]["logp"][7]
    expected = {"weight": w / (1 + w), "entropy": H / (H + 0.5), "logp": -logp / (0.5 - logp),
                "gain": abs(w * A) / (1 + abs(w * A))}
    for channel, shade in expected.items():
        js(browser, "$(`input[value=${arguments[0]}]`).click()", channel)
        assert float(shades(browser)[11 + 7]) == pytest.approx(shade, abs=2e-3), channel
    assert A < 0 < data[0]["A"]
    assert js(browser, "$$('#group .tokens').map(list => list.querySelectorAll('.down').length)") == [0, 11]
    js(browser, "$('input[value=weight]').click()")
    choose(browser, "#choose-weights-of-method", "token-entropy")
    w = weight_of(data[1], 7, "token-entropy")
    assert float(shades(browser)[11 + 7]) == pytest.approx(w / (1 + w), abs=2e-3)
    assert text(browser, "#facts h3") == "Token 8 of 11, completion 2"
    assert "weight w (token-entropy)" in text(browser, "#facts")
    assert js(browser, "$$('#choose-weights-of-method option').map(o => o.value)") == list(rest.WEIGHTS)
    assert js(browser, "$$('.weights > :nth-child(3n+1)').map(m => m.textContent)") == list(rest.WEIGHTS)


def test_hostile_text_is_shown_and_does_nothing(visit):
    """Completion, prompt and question hold tags, handlers, a comment, half a character and a character that
    turns the text round."""
    browser = visit("one")
    js(browser, "$('#choose-prompt input[value=\"1\"]').click()")
    shown = js(browser, "$$('#group .tokens')[1].textContent")
    assert TAGS in shown and "⟨U+2028⟩⟨U+202E⟩&lt;b&gt;⟨U+D800⟩" in shown
    assert TAGS in text(browser, ".asked") and TAGS in text(browser, "pre")
    found = "[typeof window.hacked, document.images.length, document.scripts.length]"
    assert js(browser, found) == ["undefined", 0, 2]


def test_wrong_calls_are_marked_by_more_than_colour(visit):
    browser = visit("one")
    right, wrong = js(browser, "$$('.calls').map(list => list.textContent)")
    assert right == "✓ add(a = 1, b = 2)"
    assert wrong == "✗ add(a = 1, b = 3 gold: 2)" and text(browser, ".calls del") == "3"


def test_what_was_not_sampled_is_no_part_of_the_loss(visit):
    """A tool's tokens have no weight and no numbers; a refused call is told; an empty completion is one."""
    browser = visit("live")
    assert "calls that the tools refused: 1" in text(browser, ".numbers")
    focus(browser, 0, 1)
    assert "no part of the loss" in text(browser, "#facts") and not js(browser, "$('#objective')")
    assert js(browser, "$$('#group .token.forced').length") == 2
    assert js(browser, "$('#ratio-row').hidden")
    focus(browser, 0, 2)
    assert js(browser, "$('#objective') !== null && !$('#ratio-row').hidden")
    assert js(browser, "$$('#group .tokens')[1].children.length") == 0
    press(browser, "ARROW_DOWN")
    assert text(browser, "#facts h3") == "Token 3 of 11, completion 1"


@pytest.mark.parametrize("width", [340, 390, 800])
@pytest.mark.parametrize("name", ["one", "four", "live", "bare"])
def test_no_horizontal_scroll_on_a_phone(visit, name, width):
    browser = visit(name, width)
    assert js(browser, "document.documentElement.scrollWidth") <= width
    if name in ("one", "four"):
        js(browser, "$('#choose-prompt input[value=\"1\"]').click()")
        assert "w" * 99 in text(browser, "#stage")
        assert js(browser, "document.documentElement.scrollWidth") <= width


CONTRAST = """(() => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const style = getComputedStyle(document.documentElement);
    return arguments[0].map(pair => pair.map(name => {
        canvas.fillStyle = style.getPropertyValue(name);
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    }));
})()"""


def luminance(rgb):
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_every_region_can_be_read_in_light_and_dark(visit, dark):
    """Contrast of text on the fullest shade of every region, and of the other texts on a card, at least 4.5
    (WCAG AA); regions differ in their underline too; dark is dark."""
    browser = visit("one", dark=dark)
    pairs = [["--ink", f"--r{r}"] for r in range(6)] + [["--soft", "--page"], ["--card", "--accent"]]
    pairs += [[name, "--card"] for name in ("--ink", "--soft", "--good", "--bad")]
    for pair, colours in zip(pairs, js(browser, CONTRAST, pairs)):
        low, high = sorted(map(luminance, colours))
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair
    background = js(browser, "getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark
    lines = js(browser, """$$('#keys .token').map(getComputedStyle).map(s =>
        s.textDecorationLine + s.textDecorationStyle + s.textDecorationThickness)""")
    assert len(lines) == len(set(lines)) == 6


def test_several_runs_are_averaged_by_method_with_a_band(visit):
    """Two seeds of ResT, 0.1 apart: their mean, and one standard deviation, 0.0707, on either side. The two
    of GRPO are alike and have no band. Run and region curves can be switched."""
    browser = visit("four")
    figure = "$('.panels figure')"
    assert js(browser, f"{figure}.querySelectorAll('.line').length") == 2
    assert "rest: 0.35 at step 0" in js(browser, f"{figure}.querySelector('svg').getAttribute('aria-label')")
    bands = js(browser, f"[...{figure}.querySelectorAll('.band')].map(band => band.getAttribute('d'))")
    heights = [float(point.split()[1]) for point in bands[0].strip("MZ").split("L")]
    assert len(bands) == 1 and heights[-1] - heights[0] == pytest.approx(2 * 0.0707 * 142, abs=0.2)
    row = "all35.0% ± 7.175.0% ± 7.130.0% ± 0.070.0% ± 0.0"
    assert text(browser, "#held tr:last-child") == row
    choose(browser, "#choose-run", "2")
    assert js(browser, "$('#choose-weights-of-method').selectedOptions[0].textContent") == "grpo (this run)"
    choose(browser, "#choose-regions-of", "grpo")
    assert "Weight by region (grpo)" in text(browser, "#panels")


def test_a_folder_with_its_settings_alone_still_makes_a_page(visit):
    words = js(visit("bare"), "document.body.innerText")
    for said in ("Not in the metrics", "no time.json", "no episodes.jsonl", "in the folder: metrics.jsonl",
                 "neither before.json nor after.json"):
        assert said in words, said
