"""What a run leaves on disk: killed at every point of a save, at random moments, by signals; damaged.

`REST_LONG=1` kills 20 times instead of 3."""

import csv
import json
import os
import random
import signal
import time
import traceback
from pathlib import Path

import pytest
import torch

from toy_tools import runs

KILLS = 20 if os.environ.get("REST_LONG") else 3
FILES = ("model.safetensors", "tokenizer.json", "trainer.pt")


def write(step):
    """A writer of a checkpoint whose every file tells the step, one of them in a folder of its own."""
    def into(folder):
        for name in (*FILES, "more/notes.txt"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{name} after {step} steps\n" * 40)
    return into


def steps_of(path):
    """The one step that all files of a checkpoint tell."""
    found = {(path / name).read_text().split()[-2] for name in (*FILES, "more/notes.txt")}
    assert len(found) == 1
    return int(found.pop())


def child(function):
    """Pid of a forked process that runs the function; its exit status is 1 if that raises."""
    pid = os.fork()
    if pid:
        return pid
    status = 0
    try:
        function()
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        os._exit(status)


def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def begun(base, name="run"):
    folder = runs.claim(base, name, resume=True)
    if folder.new:
        runs.write_json(folder / "config.json", {})
    return folder


# ---------------------------------------------------------------------- kills

class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_a_kill_before_any_file_operation_of_a_save_loses_at_most_that_save(tmp_path, monkeypatch):
    """Every rename, removal and fsync of a save is a place to die at. At each of them the step before or the
    new one is found whole and without complaint, and the next save leaves the last two."""
    names = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync")
    place = 0
    while True:
        folder = begun(tmp_path, f"run{place}")
        for step in (1, 2, 3):
            folder.save(write(step), step)
        left = [place]

        def deadly(call):
            def dies(*args, **kwargs):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return call(*args, **kwargs)
            return dies
        killed = False
        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(os, name, deadly(getattr(os, name)))
            try:
                folder.save(write(4), 4, keep=True)
            except Killed:
                killed = True
        path, _, problems = runs.find_checkpoint(folder.path)
        newest = steps_of(path)
        assert not problems and newest in ((3, 4) if killed else (4,))
        found, problems = folder.load(steps_of)
        assert not problems and steps_of(folder / "checkpoint") == found == newest
        for step in (5, 6):
            folder.save(write(step), step)
        assert [steps_of(folder / name) for name in ("checkpoint", "checkpoint.previous")] == [6, 5]
        for name in ("checkpoint", "checkpoint.previous"):
            runs.verify(folder / name)
        folder.close()
        if not killed:
            assert steps_of(folder / "kept" / "step4") == 4
            break
        place += 1
    assert place > 20  # the save has at least so many places to die at


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_every_file_is_on_the_disk_before_the_checkpoint_takes_its_name(tmp_path, monkeypatch):
    """After a power cut a renamed folder with empty files would be found otherwise."""
    events = []
    fsync = os.fsync
    rename = os.rename

    def watch_fsync(handle):
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def watch_rename(old, new):
        events.append(f"{Path(old).name} -> {Path(new).name}")
        rename(old, new)
    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "rename", watch_rename)
    folder = begun(tmp_path)
    del events[:]
    folder.save(write(1), 1)
    moved = events.index("checkpoint.part -> checkpoint")
    synced = events[:moved]
    for name in (*FILES, "notes.txt", "manifest.json.part", "more", "checkpoint.part"):
        assert name in synced, name
    assert events[moved + 1] == "run"  # and the move itself


def work(base, last, saved):
    """A run whose state and metrics follow from the step alone; saved steps are told through the pipe
    `saved`."""
    with runs.claim(base, "run", resume=True) as folder:
        if folder.new:
            runs.write_json(folder / "config.json", {})
        try:
            first, problems = folder.load(steps_of)
        except FileNotFoundError:
            folder.save(write(0), 0)
            first, problems = 0, []
        metrics = runs.Metrics(folder, first)
        assert not problems and not metrics.problems, (problems, metrics.problems)
        for step in range(first, last):
            metrics.add({"step": step, "reward": step / 7})
            metrics.sync()
            folder.save(write(step + 1), step + 1)
            os.write(saved, b"%d\n" % (step + 1))


def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(tmp_path):
    """Real SIGKILLs, at any moment from the claim of the folder to a save. What was saved is there."""
    rng = random.Random()
    reader, saved = os.pipe()
    os.set_blocking(reader, False)
    known = 0
    kills = 0
    last = 10 + 2 * KILLS
    while kills < KILLS:
        pid = child(lambda: work(tmp_path, last, saved))
        time.sleep(rng.expovariate(1 / 0.03))
        os.kill(pid, signal.SIGKILL)
        end = status(pid)
        assert end in (0, -signal.SIGKILL)
        killed = end != 0
        kills += killed
        try:
            known = max(known, *map(int, os.read(reader, 10**6).split()))
        except BlockingIOError:
            pass
        if known:
            path, _, problems = runs.find_checkpoint(tmp_path / "run")
            assert steps_of(path) >= known and not problems
        if not killed:
            last += 10
    assert status(child(lambda: work(tmp_path, last, saved))) == 0
    assert status(child(lambda: work(tmp_path / "whole", last, saved))) == 0
    for name in ("metrics.jsonl", "metrics.csv", "checkpoint/trainer.pt", "checkpoint/manifest.json"):
        whole = (tmp_path / "whole" / "run" / name).read_bytes()
        assert (tmp_path / "run" / name).read_bytes() == whole, name


# ---------------------------------------------------------------------- damage

def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def empty(path, text=""):
    path.write_text(text)


DAMAGE = {
    "cut weights": (lambda c: cut(c / "model.safetensors"), "model.safetensors is damaged: 100 bytes"),
    "empty weights": (lambda c: empty(c / "model.safetensors"), "model.safetensors is damaged: 0 bytes"),
    "a flipped bit in weights": (lambda c: flip(c / "model.safetensors"), "safetensors is damaged: its"),
    "a flipped bit in the optimiser": (lambda c: flip(c / "trainer.pt"), "trainer.pt is damaged: its bytes"),
    "a flipped bit below": (lambda c: flip(c / "more" / "notes.txt"), "notes.txt is damaged: its bytes"),
    "no tokenizer": (lambda c: (c / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "it has no manifest.json"),
    "a cut manifest": (lambda c: cut(c / "manifest.json"), "manifest.json is damaged"),
    "a manifest that is a list": (lambda c: empty(c / "manifest.json", "[]"), "manifest.json is damaged"),
    "a manifest of null": (lambda c: empty(c / "manifest.json", '{"files": 0}'), "manifest.json is damaged"),
    "an empty folder": (lambda c: [p.unlink() for p in runs.files_below(c)], "it has no manifest.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, kind):
    damage, words = DAMAGE[kind]
    folder = begun(tmp_path)
    for step in (1, 2):
        folder.save(write(step), step)
    damage(folder / "checkpoint")
    path, _, problems = runs.find_checkpoint(folder.path)  # looks, and changes nothing
    assert path == folder / "checkpoint.previous" and len(problems) == 1 and words in problems[0]
    step, problems = folder.load(steps_of)
    assert step == 1 == steps_of(folder / "checkpoint") and len(problems) == 1
    assert words in problems[0] and str(folder / "checkpoint") in problems[0] and "\n" not in problems[0]
    assert (folder / "checkpoint.damaged").is_dir()
    assert folder.load(steps_of) == (1, [])
    damage(folder / "checkpoint")
    with pytest.raises(ValueError, match="no whole checkpoint is left: ") as error:
        folder.load(steps_of)
    assert words in str(error.value)


def test_what_reads_wrong_falls_back_as_well(tmp_path):
    """Right by its checksums, yet of another shape; but a missing package says nothing about the files."""
    folder = begun(tmp_path)
    for step in (1, 2):
        folder.save(write(step), step)

    def read(path):
        if steps_of(path) == 2:
            raise RuntimeError("size mismatch for lm_head")
        return steps_of(path)

    def without(path):
        raise ImportError("pip install gguf")
    with pytest.raises(ImportError):
        folder.load(without)
    assert steps_of(folder / "checkpoint") == 2
    step, problems = folder.load(read)
    assert step == 1 and "size mismatch" in problems[0] and str(folder / "checkpoint") in problems[0]


def test_a_bad_newest_checkpoint_gives_way_to_the_one_before(tmp_path):
    folder = begun(tmp_path)
    folder.save(write(1), 1)
    assert not folder.fall_back() and steps_of(folder / "checkpoint") == 1
    folder.save(write(2), 2)
    assert folder.fall_back() and steps_of(folder / "checkpoint") == 1
    assert steps_of(folder / "checkpoint.damaged") == 2


def test_kept_checkpoints_stay(tmp_path, monkeypatch):
    """Also where the file system has no hard links, and when a resumed run comes by the step again."""
    folder = begun(tmp_path)
    for step in range(6):
        if step == 3:
            monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError("no links here")))
        folder.save(write(step), step, keep=step in (1, 3))
    folder.save(write(3), 3, keep=True)
    assert sorted(path.name for path in (folder / "kept").iterdir()) == ["step1", "step3"]
    for step in (1, 3):
        runs.verify(folder / "kept" / f"step{step}")
        assert steps_of(folder / "kept" / f"step{step}") == step


# ---------------------------------------------------------------------- the folder

NOT_PLAIN = ["", " ", ".", "..", "a/b", "/tmp", "..\\a", " a", "a ", "a\nb", "a\0b", "\udcff", "x" * 201,
             "ü" * 101]


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_only_plain_names_name_a_run(tmp_path, name):
    with pytest.raises(ValueError, match="--name"):
        runs.RunFolder(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    def hold():
        folder = begun(tmp_path)
        os.write(out, b"x")
        time.sleep(60)
        folder.close()
    into, out = os.pipe()
    pid = child(hold)
    os.read(into, 1)
    for resume in (False, True):
        with pytest.raises(runs.Taken, match=f"in use by another process .process {pid} on "):
            runs.claim(tmp_path, "run", resume=resume)
    os.kill(pid, signal.SIGKILL)
    assert status(pid) == -signal.SIGKILL
    runs.claim(tmp_path, "run", resume=True).close()


def test_the_default_name_is_numbered_where_it_is_taken(tmp_path):
    folders = [runs.claim(tmp_path, default="rest") for _ in range(2)]  # the first is held, though not begun
    for folder in folders:
        runs.write_json(folder / "config.json", {})
        folder.close()
    folder = runs.claim(tmp_path, default="rest")
    folder.close()
    assert [folder.path.name for folder in (*folders, folder)] == ["rest", "rest-2", "rest-3"]
    assert runs.claim(tmp_path, default="rest").path.name == "rest-3"  # taken by nobody


def test_a_refused_run_leaves_no_folder(tmp_path):
    """The folders made for it go too, those that were there before and what others put there stay."""
    with pytest.raises(ZeroDivisionError), runs.claim(tmp_path / "a" / "b", "run"):
        1 / 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), runs.claim(tmp_path / "a" / "b", "run"):
        begun(tmp_path / "a", "other").close()
        1 / 0
    assert (tmp_path / "a/other/config.json").exists() and not (tmp_path / "a/b").exists()
    with pytest.raises(ZeroDivisionError), runs.claim(tmp_path, "run") as folder:
        folder.worth = True
        1 / 0
    assert (tmp_path / "run").exists()
    with begun(tmp_path, "mine"):
        pass
    with pytest.raises(ValueError, match="mine exists: continue it with --resume"):
        runs.claim(tmp_path, "mine")
    with pytest.raises(ZeroDivisionError), runs.claim(tmp_path, "mine", resume=True):
        1 / 0
    assert (tmp_path / "mine" / "config.json").exists()


def test_other_folders_and_files_are_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("")
    (tmp_path / "file").write_text("")
    for name, words in (("thesis", "not the folder of a run .it holds chapter1.tex, but no config.json"),
                        ("file", "cannot write to .*file")):
        with pytest.raises(ValueError, match=words):
            runs.claim(tmp_path, name, resume=True)
    with pytest.raises(ValueError, match="cannot write to .*choose another --output-dir"):
        runs.claim(tmp_path / "file", "run")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


# ---------------------------------------------------------------------- metrics

def logged(folder, steps):
    metrics = runs.Metrics(folder)
    for step in steps:
        metrics.add({"step": step, "reward": step / 3})
    return metrics


def test_metrics_are_continued_where_the_checkpoint_stands(tmp_path):
    logged(tmp_path, range(5))
    with open(tmp_path / "metrics.jsonl", "a") as out:
        out.write('{"step": 5, "rew')  # killed within a line
    metrics = runs.Metrics(tmp_path, first=3)
    assert [row["step"] for row in metrics.rows] == [0, 1, 2] and not metrics.problems
    metrics.add({"step": 3, "reward": 9.0, "new": 1})
    metrics.sync()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == metrics.rows and [row["step"] for row in lines] == [0, 1, 2, 3]
    table = list(csv.DictReader(open(tmp_path / "metrics.csv")))
    assert [row["new"] for row in table] == ["", "", "", "1"] and float(table[1]["reward"]) == 1 / 3


def test_gaps_repeats_and_damaged_lines_are_named(tmp_path):
    logged(tmp_path, (0, 1, 1, 4, 5, 6, 6, 7))
    text = (tmp_path / "metrics.jsonl").read_text().splitlines(True)
    (tmp_path / "metrics.jsonl").write_text("".join([*text[:4], "[1]\n", "\0\0\n", *text[4:]]))
    metrics = runs.Metrics(tmp_path, first=9)
    for words in ("line 5 of", "line 6 of", "no line for steps 2-3, 8 of the 9", "lines for steps 1, 6"):
        assert sum(words in problem for problem in metrics.problems) == 1, words
    assert len(metrics.problems) == 4 and [row["step"] for row in metrics.rows] == [0, 1, 4, 5, 6, 7]


def test_a_kill_while_metrics_are_replaced_loses_none(tmp_path, monkeypatch):
    """They were once truncated and written again in place."""
    logged(tmp_path, range(5))
    before = (tmp_path / "metrics.jsonl").read_text()

    def dies(*_, **__):
        raise Killed
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, name, dies)
            runs.Metrics(tmp_path, first=5)
        assert (tmp_path / "metrics.jsonl").read_text() == before


def test_damaged_json_names_its_file(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="config.json is damaged"):
        runs.read_json(tmp_path / "config.json")


# ---------------------------------------------------------------------- time and signals

@pytest.mark.parametrize("first", runs.Interrupt.SIGNALS)
def test_the_first_signal_waits_for_the_step_and_another_ctrl_c_does_not(first):
    def run():
        with runs.Interrupt() as interrupt:
            with interrupt.deferred():
                signal.raise_signal(first)
                assert interrupt.requested == signal.Signals(first).name
                signal.raise_signal(signal.SIGTERM)  # again from the cluster: still the step is finished
                print("this must not fail", flush=True)  # though the terminal may be gone
                try:
                    signal.raise_signal(signal.SIGINT)
                except KeyboardInterrupt:
                    os._exit(7)
    assert status(child(run)) == 7


@pytest.mark.parametrize("first", runs.Interrupt.SIGNALS)
def test_outside_a_step_a_signal_stops_at_once(first):
    def run():
        with runs.Interrupt() as interrupt:
            with interrupt.deferred():
                pass
            try:
                signal.raise_signal(first)
            except KeyboardInterrupt:
                os._exit(7)
    assert status(child(run)) == 7


def test_a_closed_terminal_does_not_end_the_run():
    """SIGHUP, and what was printed to is gone: writing there fails, but for the switch to /dev/null."""
    reader, writer = os.pipe()

    def run():
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.close(writer)
        os.close(reader)  # else somebody would still listen
        with runs.Interrupt() as interrupt, interrupt.deferred():
            os.write(1, b"ready")
            while not interrupt.requested:
                time.sleep(0.01)
            os.write(1, b"on with it")
            os.write(2, b"on with it")
        os._exit(5)
    pid = child(run)
    assert os.read(reader, 5) == b"ready"
    os.close(reader)
    os.close(writer)
    os.kill(pid, signal.SIGHUP)
    assert status(pid) == 5


def test_nohup_stays_nohup_and_handlers_are_given_back():
    def run():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: None)
        own = signal.getsignal(signal.SIGTERM)
        with runs.Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupt.requested
        assert signal.getsignal(signal.SIGTERM) is own
        os._exit(3)
    assert status(child(run)) == 3


def test_the_clock_shares_time_out_among_phases(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 10.0, 14.0, 20.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = runs.Clock(torch.device("cpu"))  # at 0
    clock("rollout")
    clock("update")
    clock()
    clock("update")
    assert clock.seconds == {"rollout": 1.0, "reward": 0.0, "update": 6.0} and clock.total() == 20.0
