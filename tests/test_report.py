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
HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=2"><!--\u2028\u202e&lt;b&gt;\ud800'
GOLD = [[{"name": "add", "arguments": {"a": 1, "b": 2}}]]
ROWS = [
    {"messages": [{"role": "user", "content": "1+2?"}], "tools": [], "gold": GOLD, "category": "simple"},
    {"messages": [{"role": "user", "content": "hello " + HOSTILE}], "tools": [], "gold": [[]], "category": "irrelevance"},
    {"messages": [{"role": "user", "content": "1+2 again"}], "tools": [], "gold": GOLD, "category": "simple"}]


def call_pieces(name, arguments):
    return [("<think>", TAG), ("sum", THOUGHT), ("</think>", TAG), ("<tool_call>", TAG), ('{"name": "', SCAFFOLD), (name, NAME),
            ('", "arguments": ', SCAFFOLD), (arguments, PARAMS), ("}", SCAFFOLD), ("</tool_call>", TAG), ("<end>", TAG)]


def answer_pieces(text):
    return [("<think>", TAG), ("no tool", THOUGHT), ("</think>", TAG), ("<response>", TAG), (text, TEXT), ("</response>", TAG), ("<end>", TAG)]


EPISODES = [
    call_pieces("add", '{"a": 1, "b": 2}'), call_pieces("add", '{"a": 1, "b": 3}'),      # right; a wrong value
    answer_pieces("Hello!"), answer_pieces(HOSTILE)[:-2],                                # right; hostile and not closed
    call_pieces("add", '{"a": 1, "b": 2}'), call_pieces("add", '{"a": 1, "b": 2}')]      # equal rewards: teaches nothing


class FakeChat:
    """Ids are positions in a list of texts."""

    def __init__(self):
        self.texts = []

    def id(self, text):
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text)

    def text(self, x):
        return self.texts[x]

    def decode(self, ids):
        return "".join(map(self.text, ids))


def fake_batch(chat, episodes=EPISODES, rows=ROWS, seed=0, forced=()):
    """A Rollout of two completions per row, made by hand from (text, region) pieces; columns in `forced` were not sampled."""
    N, T = len(episodes), max(map(len, episodes))
    tokens, region = torch.zeros(N, T, dtype=torch.long), torch.full((N, T), -1)
    for i, pieces in enumerate(episodes):
        tokens[i, :len(pieces)] = torch.tensor([chat.id(text) for text, _ in pieces])
        region[i, :len(pieces)] = torch.tensor([r for _, r in pieces])
    region[:, list(forced)] = -1
    sampled = region >= 0
    entropy = torch.rand(N, T, generator=torch.Generator().manual_seed(seed)) * sampled
    covers = torch.nn.functional.one_hot(region.clamp(min=0), 6).bool() & sampled[..., None]
    texts = [["".join(text for text, _ in pieces if text != "<end>")] for pieces in episodes]
    return rest.Rollout(
        rows=rows, prompts=[[chat.id("prompt " + row["messages"][0]["content"])] for row in rows], group=N // len(rows), tokens=tokens, sampled=sampled,
        logp=-2 * entropy, entropy=entropy, length=torch.tensor([len(p) for p in episodes]), truncated=torch.zeros(N, dtype=torch.bool),
        turns=[[(0, len(p))] for p in episodes], texts=texts, refused=[0] * N, region=region, covers=covers)


def score(batch, cfg, step):
    scores = rest.score_batch(batch)
    rewards = torch.tensor([rest.episode_reward(f, c, step / cfg.steps, cfg.reward_scaling) for f, c, _ in scores])
    return rest.group_advantages(rewards.view(-1, batch.group)).flatten(), scores


def fake_run(folder, method="rest", seed=0, steps=20, shift=0.0):
    """A finished run's folder: curves, and episodes of the steps 0, 10 and the last."""
    folder.mkdir()
    cfg, chat = rest.Config(method=method, seed=seed, steps=steps, prompts=3, group=2), FakeChat()
    recorder = report.Recorder(folder)
    lines = []
    for step in range(steps):
        batch = fake_batch(chat, seed=step)
        advantages, scores = score(batch, cfg, step)
        recorder.record(step, batch, advantages, scores, cfg, chat)
        values = {f"{kind}_{name}": 1 + 0.01 * step for kind in "Hw" for name in rest.PAPER_REGIONS}
        lines.append({"step": step, "exact": 0.3 + step / 50 + shift, "format": 0.5, "correct": 0.5, "reward": step / 10, "tokens": 40.0, **values})
    lines[1]["reward"] = math.nan
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps({"config": dataclasses.asdict(cfg), "run": {"name": folder.name, "model": ""}}))
    for when, exact in (("before", 0.3), ("after", 0.7)):
        (folder / f"{when}.json").write_text(json.dumps({"all": {"n": 10, "exact": exact + shift, "format": 1.0, "correct": None, "tokens": 4.0}}))
    (folder / "time.json").write_text(json.dumps({"rollout": 5.0, "update": 4.0, "other": 1.0, "steps": 10.0, "run": 20.0}))
    return folder


def stored(folder):
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


def embedded(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)[1])


# ---------------------------------------------------------------------------------------------------------------- recording

@pytest.mark.parametrize("forced", [(), (1, 3)])
def test_every_method_s_weights_are_stored_as_rest_computes_them(tmp_path, forced):
    """The page computes no weight of its own, so what is stored must be what the method gives the token in the whole batch at this
    progress: for methods that go by region and for those that do not, tool results in between or not."""
    cfg, chat = rest.Config(steps=20, prompts=3, group=2), FakeChat()
    batch = fake_batch(chat, forced=forced)
    advantages, scores = score(batch, cfg, 10)
    report.Recorder(tmp_path, prompts=3).record(10, batch, advantages, scores, cfg, chat)
    groups = {g["prompt"]: g for g in stored(tmp_path)[0]["groups"]}
    lists = set()
    for name, method in rest.WEIGHTS.items():
        true = method(batch, dataclasses.replace(cfg, method=name), 0.5)
        for i, pieces in enumerate(EPISODES):
            c = groups["prompt " + ROWS[i // 2]["messages"][0]["content"]]["completions"][i % 2]
            w = c["w"][name]
            if isinstance(w, list):
                lists.add(name)
            for t in range(len(pieces)):
                if batch.sampled[i, t]:
                    got = w[t] if isinstance(w, list) else w[str(c["region"][t])]
                    assert got == pytest.approx(float(true[i, t]), rel=6e-3), (name, i, t)
                else:
                    assert c["region"][t] == -1
    assert "token-entropy" in lists and not {"rest", "grpo", "no-thought"} & lists


def test_an_episode_is_stored_with_all_that_the_page_shows(tmp_path):
    cfg, chat = rest.Config(steps=20, prompts=3, group=2), FakeChat()
    batch = fake_batch(chat)
    advantages, scores = score(batch, cfg, 0)
    report.Recorder(tmp_path).record(0, batch, advantages, scores, cfg, chat)
    group = stored(tmp_path)[0]["groups"][0]
    wrong = group["completions"][1]
    assert (group["asked"], group["prompt"], group["category"], group["gold"]) == ("1+2?", "prompt 1+2?", "simple", [[["add", '{"a": 1, "b": 2}']]])
    assert wrong["tokens"] == [text for text, _ in EPISODES[1]] and wrong["region"] == [r for _, r in EPISODES[1]]
    assert wrong["H"] == pytest.approx(batch.entropy[1].tolist(), abs=6e-4) and wrong["logp"] == pytest.approx(batch.logp[1].tolist(), abs=6e-4)
    assert wrong["calls"] == [[0, "wrong", "add", [["a", "1", "1", True], ["b", "3", "2", False]]]]
    assert (wrong["format"], wrong["exact"], wrong["blocks"]) == (1.0, False, [["think", "tool_call"]])
    assert wrong["correct"] == pytest.approx(0.75) and wrong["reward"] == pytest.approx(2 + 2 * 0.5) and wrong["A"] == pytest.approx(-0.7071, abs=1e-3)
    assert stored(tmp_path)[0]["groups"][1]["completions"][1]["blocks"] == [["think", "response (not closed)"]]


def test_prompts_that_teach_come_first_and_their_number_is_kept(tmp_path):
    """A group of equal rewards has no gradient: with room for two of three prompts it is the one left out, wherever it stands."""
    cfg, chat = rest.Config(steps=20, prompts=3, group=2), FakeChat()
    order = [2, 0, 1]
    batch = fake_batch(chat, [EPISODES[2 * p + k] for p in order for k in (0, 1)], [ROWS[p] for p in order])
    advantages, scores = score(batch, cfg, 0)
    report.Recorder(tmp_path, prompts=2).record(0, batch, advantages, scores, cfg, chat)
    assert [g["asked"] for g in stored(tmp_path)[0]["groups"]] == [ROWS[0]["messages"][0]["content"], ROWS[1]["messages"][0]["content"]]


def test_a_resumed_run_replaces_what_it_does_again(tmp_path):
    """Killed while it wrote step 20 and resumed at 10: each step stands there once, in order, from the second attempt where there were two."""
    cfg, chat = rest.Config(steps=25, prompts=3, group=2), FakeChat()

    def go(first, last, seed):
        recorder = report.Recorder(tmp_path)
        for step in range(first, last):
            batch = fake_batch(chat, seed=seed)
            recorder.record(step, batch, *score(batch, cfg, step), cfg, chat)
    go(0, 21, seed=0)
    file = tmp_path / "episodes.jsonl"
    file.write_text(file.read_text()[:-30])
    go(10, 25, seed=1)
    lines = stored(tmp_path)
    assert [line["step"] for line in lines] == [0, 10, 20, 24]
    first = [line["groups"][0]["completions"][0]["H"] for line in lines]
    assert first[0] != first[1] and first[1] == first[2] == first[3]


def test_recording_changes_neither_the_batch_nor_the_random_numbers(tmp_path):
    """A run that is recorded must be the run that is not."""
    cfg, chat = rest.Config(steps=20, prompts=3, group=2), FakeChat()
    batch, fresh = fake_batch(chat), fake_batch(chat)
    advantages, scores = score(batch, cfg, 0)
    before, kept = torch.get_rng_state(), advantages.clone()
    report.Recorder(tmp_path).record(0, batch, advantages, scores, cfg, chat)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(kept, advantages) and cfg == rest.Config(steps=20, prompts=3, group=2)
    for name in ("tokens", "sampled", "logp", "entropy", "region", "covers", "length"):
        assert torch.equal(getattr(batch, name), getattr(fresh, name)), name


@pytest.mark.parametrize("options", [{"every": 0}, {"prompts": 0}])
def test_recorder_refuses_nothing_to_record(tmp_path, options):
    with pytest.raises(ValueError, match="must be at least 1"):
        report.Recorder(tmp_path, **options)


# ------------------------------------------------------------------------------------------------------- calls against gold

def text_of(*calls):
    return "<think>x</think><tool_call>\n" + "\n".join(c if isinstance(c, str) else json.dumps(c) for c in calls) + "\n</tool_call>"


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


@pytest.mark.parametrize("gold, texts, expected", [
    ([[call("f", a=1)]], [text_of(call("f", a=1.0))], [[0, "right", "f", [["a", "1.0", "1", True]]]]),
    ([[call("f", a=1)]], [text_of(call("f", a=True))], [[0, "wrong", "f", [["a", "true", "1", False]]]]),
    ([[call("f", a=1)]], [text_of(call("f", b=None))], [[0, "wrong", "f", [["a", None, "1", False], ["b", "null", None, False]]]]),
    ([[call("f")]], [text_of(call("f"))], [[0, "right", "f", []]]),
    ([[call("f", a=1), call("f", a=2)]], [text_of(call("f", a=2))],
     [[0, "missing", "f", [["a", None, "1", False]]], [0, "right", "f", [["a", "2", "2", True]]]]),
    ([[]], [text_of(call("g", a="ü"))], [[0, "surplus", "g", [["a", '"ü"', None, False]]]]),
    ([[call("f")], [call("g")]], [text_of(call("g")), text_of(call("f"))],
     [[0, "missing", "f", []], [0, "surplus", "g", []], [1, "missing", "g", []], [1, "surplus", "f", []]]),
    ([[call("f")]], [], [[0, "missing", "f", []]]),
    ([[]], ["<think>x</think><response>no</response>"], [])])
def test_calls_beside_gold(gold, texts, expected):
    """Every way to be right or wrong is named: value, type, key, repeated call, unasked call, wrong turn, nothing at all."""
    assert report.compare(gold, texts) == expected


def test_an_unreadable_call_is_shown_with_its_reason():
    (_, state, reason, arguments), missing = sorted(report.compare([[call("f")]], [text_of('{"name": "f", "arguments": {')]), key=lambda c: c[1] == "missing")
    assert state == "unreadable" and reason and not arguments and missing[1] == "missing"


def test_what_the_page_calls_right_is_what_the_reward_calls_exact():
    """Two notions of equality in one project would mark a call right that is paid as wrong."""
    calls = [call("f", a=1), call("f", a=1.0), call("f", a="1"), call("f", a=True), call("f"), call("g", a=[1, {"b": None}]), call("g", a=[1, {"b": 0}])]
    agreed = 0
    for first in calls:
        for second in (*calls, None):
            for want in calls:
                gold = [[want]] if second is None else [[want, second]]
                texts = [text_of(first) if second is None else text_of(second, first)]
                right = all(state == "right" for _, state, *_ in report.compare(gold, texts))
                assert right == rest.score_texts(texts, {"gold": gold})[2], (gold, texts)
                agreed += right
    assert agreed > len(calls)


# --------------------------------------------------------------------------------------------------------------------- the page

def test_a_page_of_the_default_run_s_size_is_under_two_megabytes(tmp_path):
    """100 steps recorded every tenth: 11 moments of 2 prompts with 8 completions of about 100 tokens, whose weights all differ."""
    cfg, chat = rest.Config(steps=100, prompts=2, group=8), FakeChat()
    episodes = [[(f" tok{t}", t % 6) for t in range(100)] for _ in range(16)]
    recorder = report.Recorder(tmp_path)
    for step in range(100):
        if step % 10 and step != 99:
            continue
        batch = fake_batch(chat, episodes, [ROWS[0], ROWS[2]], seed=step)
        recorder.record(step, batch, torch.arange(16.0), [(1.0, 1.0, True)] * 16, cfg, chat)
    page = report.write([tmp_path], tmp_path / "page.html")
    assert page.stat().st_size < 2_000_000
    assert len(embedded(page)["runs"][0]["episodes"]) == 11


def test_a_page_too_large_shows_fewer_steps_and_says_so(tmp_path):
    run = fake_run(tmp_path / "a", steps=101)
    whole = report.write([run], tmp_path / "whole.html").stat().st_size
    page = report.write([run], tmp_path / "page.html", max_bytes=whole - 30_000)
    shown = embedded(page)["runs"][0]
    steps = [e["step"] for e in shown["episodes"]]
    assert page.stat().st_size <= whole - 30_000 and shown["recorded"] == 11 and 2 <= len(steps) < 11 and steps[0] == 0 and steps[-1] == 100
    empty = embedded(report.write([run], tmp_path / "empty.html", max_bytes=1))["runs"][0]
    assert empty["episodes"] == [] and empty["recorded"] == 11


def test_a_page_is_plain_ascii_and_nothing_in_it_ends_the_data(tmp_path):
    """Model output, tool names and folder names are data: no tag, comment or line separator of theirs may reach the parser."""
    page = report.write([fake_run(tmp_path / "a")], tmp_path / "page.html").read_bytes()
    data = page.split(b'id="data">')[1].split(b"</script>")[0]
    assert b"hacked" in data and not set(b"<>&") & set(data) and max(data) < 128
    assert embedded(tmp_path / "page.html")["runs"][0]["metrics"]["reward"][1] is None  # NaN is no JSON


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


def test_runs_that_differ_in_more_than_their_seed_are_not_averaged(tmp_path):
    runs = [fake_run(tmp_path / "a"), fake_run(tmp_path / "b", seed=1), fake_run(tmp_path / "c", steps=30), fake_run(tmp_path / "d", method="grpo")]
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


# ------------------------------------------------------------------------------------------------------------ in a real browser

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="the page is tried in a browser only with: pip install selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("the page is tried in a browser only with: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update",
                     "disable-sync", "disable-dev-shm-usage", f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument("--" + argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One run; four runs of two methods; a folder with nothing but its settings."""
    base = tmp_path_factory.mktemp("pages")
    runs = [fake_run(base / "rest-0"), fake_run(base / "rest-1", seed=1, shift=0.1), fake_run(base / "grpo-0", method="grpo"), fake_run(base / "grpo-1", "grpo", 1)]
    bare = base / "bare"
    bare.mkdir()
    shutil.copy(runs[0] / "config.json", bare)
    return {"one": report.write(runs[:1], base / "one.html"), "four": report.write(runs, base / "four.html"), "bare": report.write([bare], base / "bare.html")}


@pytest.fixture
def visit(browser, pages):
    """Opens a page in a window of some width, light or dark. Afterwards: no error in the console, nothing fetched but the file itself."""
    opened = []

    def visit(name, width=1300, dark=False):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
        browser.get_log("browser"), browser.get_log("performance")
        opened.append(pages[name].as_uri())
        browser.get(opened[-1])
        return browser
    yield visit
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert asked == set(opened), asked


def js(browser, code, *arguments):
    return browser.execute_script(code, *arguments)


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    for key in keys:
        ActionChains(browser).send_keys(getattr(Keys, key, key)).perform()


def focus_token(browser, k, t):
    js(browser, "document.querySelectorAll('#group .tokens')[arguments[0]].children[arguments[1]].focus()", k, t)


def told(browser):
    """(step shown, completion and token pointed at, region, the objective's last number)"""
    return js(browser, """return [document.getElementById('step-label').textContent, document.querySelector('#facts h3').textContent,
        document.querySelector('#facts dd').textContent, document.querySelector('#objective b').textContent]""")


def shades(browser):
    return js(browser, "return [...document.querySelectorAll('#group .token')].map(t => getComputedStyle(t).getPropertyValue('--shade'))")


def test_the_slider_moves_through_the_recorded_steps(visit):
    browser = visit("one")
    assert told(browser)[0].startswith("step 0 of 20 (3 recorded)")
    before = [shades(browser), js(browser, "return document.querySelector('.panels .mark').getAttribute('x1')")]
    js(browser, "document.getElementById('step').focus()")
    press(browser, "ARROW_RIGHT")
    assert told(browser)[0].startswith("step 10 of 20") and js(browser, "return document.activeElement.getAttribute('aria-valuetext')") == "step 10"
    after = [shades(browser), js(browser, "return document.querySelector('.panels .mark').getAttribute('x1')")]
    assert before[0] != after[0] and before[1] != after[1]
    press(browser, "END")
    assert told(browser)[0].startswith("step 19 of 20")


def test_the_arrow_keys_move_between_tokens_and_completions(visit):
    """One tab stop per completion; the focus and the panel go together; ends are ends."""
    browser = visit("one")
    focus_token(browser, 0, 0)
    press(browser, "ARROW_RIGHT", "ARROW_RIGHT")
    assert told(browser)[1] == "Token 3 of 11, completion 1"
    press(browser, "ARROW_DOWN")
    assert told(browser)[1] == "Token 3 of 11, completion 2"
    press(browser, "END", "ARROW_RIGHT")
    assert told(browser)[1] == "Token 11 of 11, completion 2"
    press(browser, "HOME", "ARROW_LEFT", "ARROW_UP")
    assert told(browser)[1] == "Token 1 of 11, completion 1"
    stops = js(browser, "return [...document.querySelectorAll('#group .tokens')].map(list => list.querySelectorAll('[tabindex=\"0\"]').length)")
    assert stops == [1, 1] and js(browser, "return document.activeElement.getAttribute('aria-selected')") == "true"
    assert "objective" in js(browser, "return document.getElementById('said').textContent")


def test_the_panel_s_numbers_are_the_objective_s(visit, pages):
    """w · min(ρA, clip(ρ)A) of the stored numbers, at ρ = 1 and where the clip binds: above 1 + eps it stops a gain, not a loss."""
    browser, data = visit("one"), embedded(pages["one"])["runs"][0]["episodes"][0]["groups"][0]["completions"]
    number = re.compile(r"[−+]?\d+\.\d+")
    for k, t in ((0, 7), (1, 7), (1, 1)):
        w, A = data[k]["w"]["rest"], data[k]["A"]
        w = w[t] if isinstance(w, list) else w[str(data[k]["region"][t])]
        focus_token(browser, k, t)
        for ratio in (1.0, 1.4, 0.6):
            js(browser, "const r = document.getElementById('ratio'); r.value = arguments[0]; r.dispatchEvent(new Event('input'))", ratio)
            expected = w * min(ratio * A, min(max(ratio, 0.8), 1.2) * A)
            text = told(browser)[3]
            assert float(number.search(text)[0].replace("−", "-")) == pytest.approx(expected, abs=0.006), (text, w, A, ratio)
            assert ("Clipped" in js(browser, "return document.getElementById('objective').textContent")) == (ratio * A > expected / w + 1e-6)


def test_the_switches_of_method_and_channel(visit, pages):
    """Each channel shades by its own number, each method by its own weights, and the focus stays where it was."""
    browser, data = visit("one"), embedded(pages["one"])["runs"][0]["episodes"][0]["groups"][0]["completions"]
    focus_token(browser, 1, 7)
    seen = {}
    for channel in ("weight", "entropy", "logp", "gain"):
        js(browser, "document.querySelector(`input[value=${arguments[0]}]`).click()", channel)
        seen[channel] = shades(browser)
    assert len({tuple(values) for values in seen.values()}) == 4
    striped = js(browser, "return [...document.querySelectorAll('#group .tokens')].map(list => list.querySelectorAll('.down').length)")
    assert data[0]["A"] > 0 > data[1]["A"] and striped == [0, 11]
    js(browser, "document.querySelector('input[value=weight]').click()")
    js(browser, "const s = document.getElementById('choose-weights-of-method'); s.value = 'token-entropy'; s.dispatchEvent(new Event('change'))")
    w = data[1]["w"]["token-entropy"]
    assert float(shades(browser)[11 + 7]) == pytest.approx(w[7] / (1 + w[7]), abs=1e-3) and told(browser)[1] == "Token 8 of 11, completion 2"
    assert "weight w (token-entropy)" in js(browser, "return document.getElementById('facts').textContent")
    offered = js(browser, "return [...document.querySelectorAll('#choose-weights-of-method option')].map(o => o.value)")
    assert offered == list(rest.WEIGHTS)


def test_hostile_text_is_shown_and_does_nothing(visit):
    """Completion, prompt and question hold tags, handlers, a comment, half a surrogate pair and a character that turns the text round."""
    browser = visit("one")
    js(browser, "document.querySelector('#choose-prompt input[value=\"1\"]').click(); document.querySelector('details').open = true")
    shown = js(browser, "return document.querySelectorAll('#group .tokens')[1].textContent")
    assert '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=2"><!--' in shown and "⟨U+202E⟩&lt;b&gt;" in shown
    assert "onerror" in js(browser, "return document.querySelector('.asked').textContent + document.querySelector('pre').textContent")
    assert js(browser, "return [typeof window.hacked, document.images.length, document.scripts.length]") == ["undefined", 0, 2]


def test_wrong_calls_are_marked_by_more_than_colour(visit):
    browser = visit("one")
    right, wrong = js(browser, "return [...document.querySelectorAll('.calls')].slice(0, 2).map(list => list.textContent)")
    assert right.startswith("✓ ") and "add(a = 1, b = 2)" in right
    assert wrong.startswith("✗ ") and "b = 3 gold: 2" in wrong
    assert js(browser, "return document.querySelectorAll('.calls')[1].querySelector('del').textContent") == "3"


@pytest.mark.parametrize("width", [340, 390, 800])
@pytest.mark.parametrize("name", ["one", "four", "bare"])
def test_no_horizontal_scroll_on_a_phone(visit, name, width):
    browser = visit(name, width)
    assert js(browser, "return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("dark", [False, True])
def test_every_region_can_be_read_in_light_and_dark(visit, dark):
    """Contrast of the text on the fullest shade of every region, and of the soft text on a card, at least 4.5 (WCAG AA); underlines differ."""
    browser = visit("one", dark=dark)
    code = """
        const probe = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        const rgb = css => { probe.fillStyle = css; probe.fillRect(0, 0, 1, 1); return [...probe.getImageData(0, 0, 1, 1).data]; };
        const style = getComputedStyle(document.documentElement), card = style.getPropertyValue('--card');
        const pairs = [0, 1, 2, 3, 4, 5].map(r => ['--ink', `--r${r}`]).concat([['--soft', '--card'], ['--good', '--card'], ['--bad', '--card'], ['--soft', '--page']]);
        return pairs.map(pair => pair.map(name => rgb(style.getPropertyValue(name)).slice(0, 3)))"""

    def luminance(rgb):
        linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    for pair in js(browser, code):
        low, high = sorted(map(luminance, pair))
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair
    background = js(browser, "return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark
    lines = js(browser, """return [...document.querySelectorAll('#keys .token')].map(t => { const s = getComputedStyle(t);
        return s.textDecorationLine + s.textDecorationStyle + s.textDecorationThickness })""")
    assert len(set(lines)) == 6


def test_several_runs_are_averaged_by_method_with_a_band(visit, pages):
    """Two seeds of ResT, 0.1 apart: their mean and one standard deviation on either side; the run can be switched."""
    browser = visit("four")
    first = "document.querySelector('.panels figure svg')"
    assert js(browser, f"return {first}.querySelectorAll('.line').length") == 2
    assert "rest: 0.35 at step 0" in js(browser, f"return {first}.getAttribute('aria-label')")
    band = js(browser, f"const b = {first}.querySelector('.band').getBBox(), s = {first}.querySelectorAll('.grid'); return [b.height, s.length]")
    assert band[0] > 0 and js(browser, f"return {first}.querySelectorAll('.band').length") == 1
    assert js(browser, "return document.querySelector('#held tr:last-child').textContent") == "all35.0% ± 7.175.0% ± 7.130.0% ± 0.070.0% ± 0.0"
    js(browser, "const s = document.getElementById('choose-run'); s.value = '2'; s.dispatchEvent(new Event('change'))")
    assert "grpo (this run)" in js(browser, "return document.getElementById('choose-weights-of-method').selectedOptions[0].textContent")
    js(browser, "const s = document.getElementById('choose-regions-of'); s.value = 'grpo'; s.dispatchEvent(new Event('change'))")
    assert "Weight by region (grpo)" in js(browser, "return document.getElementById('panels').textContent")


def test_a_folder_with_its_settings_alone_still_makes_a_page(visit):
    browser = visit("bare")
    text = js(browser, "return document.body.innerText")
    for words in ("Not in the metrics", "no time.json", "no episodes.jsonl", "neither before.json nor after.json", "not in the folder: metrics.jsonl"):
        assert words in text, words
