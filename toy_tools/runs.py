"""What a run leaves on disk, so that nothing is lost: killed at any moment, entered twice, damaged later.

    runs/NAME/lock                   held by the one process that works on the run
              config.json            its options
              metrics.jsonl, .csv    one line per step
              checkpoint             policy, tokenizer, optimiser state; their checksums in manifest.json
              checkpoint.previous    the one before
              kept/stepN             checkpoints that stay
"""

import csv
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import signal
import socket
import stat
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second process out there
    fcntl = None

log = logging.getLogger("rest")

MANIFEST = "manifest.json"
NEWEST, PREVIOUS = "checkpoint", "checkpoint.previous"
PART, OLD, DAMAGED = "checkpoint.part", "checkpoint.old", "checkpoint.damaged"


class Taken(ValueError):
    """The folder is another process's, or not that of a run."""


# ---------------------------------------------------------------------- files

def sync(path):
    """Returns once the file or folder is on the disk, not only in the system's memory."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path, text):
    """Replaces the file as a whole: whenever we are killed, the old text is there or the new."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    sync(part)
    part.replace(path)
    sync(path.parent)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1))


def read_json(path):
    """Raises FileNotFoundError, or ValueError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no object")
        return value
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it holds no JSON ({error})") from error


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def write_manifest(folder, step):
    """Size and SHA-256 of every file in `folder`; all of it is on the disk afterwards."""
    files = {}
    for path in files_below(folder):
        sync(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / MANIFEST, {"step": step, "files": files})
    for path in folder.rglob("*"):
        if path.is_dir():
            sync(path)


def steps_of(path):
    """Finished steps of a checkpoint, as its manifest has them; None if that cannot be read."""
    try:
        return int(read_json(path / MANIFEST)["step"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def newest_first(path):
    """Key that sorts checkpoints, by their steps or else by their name."""
    steps = steps_of(path)
    if steps is None:
        return -math.inf if path.name == NEWEST else math.inf
    return -steps


def verify(folder):
    """Raises ValueError saying what is missing or damaged in a checkpoint."""
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is incomplete: it has no {MANIFEST}")
    try:
        entries = read_json(folder / MANIFEST)["files"].items()
        files = {name: (entry["size"], entry["sha256"]) for name, entry in entries}
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error!r})") from error
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} is incomplete: {name} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{path} is damaged: {path.stat().st_size} bytes, but {size} were written")
        if sha256(path) != digest:
            raise ValueError(f"{path} is damaged: its bytes are not those that were written (SHA-256)")


# ---------------------------------------------------------------------- checkpoints

def find_checkpoint(folder, read=lambda path: None):
    """(path, read(path), sentences): the newest whole checkpoint of a run, and what is wrong with newer ones.

    An interrupted save leaves it in any of four places. Nothing is changed. read(path) may raise too: then
    the one before is taken. Raises FileNotFoundError without any, ValueError without a whole one."""
    folder = Path(folder)
    found = [folder / name for name in (NEWEST, PREVIOUS) if (folder / name).is_dir()]
    for name in (PART, OLD):  # without a manifest they are half written, or half removed
        if (folder / name / MANIFEST).exists():
            found.append(folder / name)
    if not found:
        raise FileNotFoundError(f"no checkpoint in {folder}")
    problems = []
    for path in sorted(found, key=newest_first):
        try:
            verify(path)
            return path, read(path), problems
        except (ImportError, MemoryError, torch.OutOfMemoryError):
            raise  # says nothing about the files
        except Exception as error:  # of many kinds: zip, pickle, safetensors, tokenizers, shapes
            problems.append(f"{error}" if str(path) in f"{error}" else f"{path} cannot be read: {error!r}")
    raise ValueError("no whole checkpoint is left: " + "; ".join(problems))


def lasting(path):
    """`path`; but a run's newest checkpoint is replaced when the run goes on, so of that one a copy in
    kept/stepN. Raises OSError."""
    path = Path(path)
    steps = steps_of(path)
    if path.name not in (NEWEST, PREVIOUS) or steps is None:
        return str(path)
    if not kept_at(path.parent, steps).exists():
        keep(path, steps)
    return str(kept_at(path.parent, steps))


def kept_at(run, step):
    return run / "kept" / f"step{step}"


def keep(checkpoint, step):
    """Keep a run's checkpoint beside it as kept/stepN."""
    kept = kept_at(checkpoint.parent, step)
    part = kept.with_suffix(".part")
    remove(part)
    kept.parent.mkdir(exist_ok=True)
    try:
        shutil.copytree(checkpoint, part, copy_function=os.link)  # they never change
    except (OSError, shutil.Error):  # a file system without links
        remove(part)
        shutil.copytree(checkpoint, part)
    remove(kept)
    part.rename(kept)


def remove(path):
    if path.exists():
        shutil.rmtree(path)


def rotate(folder):
    """part -> newest -> previous -> gone; find_checkpoint reads the state after each of these moves."""
    remove(folder / OLD)
    for source, target in ((PREVIOUS, OLD), (NEWEST, PREVIOUS), (PART, NEWEST)):
        if (folder / source).exists():
            (folder / source).rename(folder / target)
    sync(folder)
    remove(folder / OLD)


# ---------------------------------------------------------------------- the folder of a run

def plain_name(name):
    """The name, if it can only be a folder within another; raises ValueError."""
    outside = name in ("", ".", "..") or set("/\\") & set(name)
    if outside or name != name.strip() or not name.isprintable():
        raise ValueError(f"--name must be a plain name, without slashes and outer spaces, not {name!r}")
    size = len(name.encode())
    if size > 200:
        raise ValueError(f"--name is too long: {size} bytes, at most 200")
    return name


class RunFolder:
    """The folder base/name, made and locked for this process until it is closed or dies. For a `with`.

    `new`: it has none of the files `marks`, nothing has begun. `worth`: set this once it holds what should
    not be lost; a new folder that is left by an exception before that is removed, so that refused input
    leaves nothing behind. Raises ValueError if it cannot be made; Taken."""

    def __init__(self, base, name, marks=("config.json",)):
        self.path = Path(base) / plain_name(name)
        self.made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._look(marks)
            self._take_lock()
        except OSError as error:
            reason = f"cannot write to {self.path} ({error.strerror})"
            raise ValueError(f"{reason}: choose another --output-dir") from error
        self._look(marks)  # again, now that nobody else writes

    def _look(self, marks):
        names = {path.name for path in self.path.iterdir()} - {"lock", "config.json.part"}
        self.new = not names & set(marks)
        self.worth = not self.new
        if self.new and names:
            raise Taken(f"{self.path} is not the folder of a run (it holds {min(names)}, but no "
                        f"{' and no '.join(marks)}): choose another --name")

    def _take_lock(self):
        self.lock = open(self.path / "lock", "a+")
        try:
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when we die, however we die
        except BlockingIOError:
            self.lock.seek(0)
            owner = self.lock.read().strip()
            self.lock.close()
            raise Taken(f"{self.path} is in use by another process ({owner}): "
                        "wait for it, or choose another --name") from None
        except OSError as error:
            log.warning("no locks on this file system (%s): let no second process work in %s",
                        error.strerror, self.path)
        if not os.fstat(self.lock.fileno()).st_nlink:
            raise Taken(f"{self.path} was just removed by another process: try again")
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.lock.flush()

    def close(self):
        self.lock.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind and not self.worth:
            shutil.rmtree(self.path, ignore_errors=True)
            for parent in self.made[1:]:
                if not any(parent.iterdir()):
                    parent.rmdir()
        self.close()

    def __truediv__(self, name):
        return self.path / name

    def __fspath__(self):
        return str(self.path)

    __str__ = __fspath__

    def save(self, write, step, keep=False):
        """A checkpoint after `step` steps; write(folder) makes its files. keep: it stays, as kept/stepN."""
        part = self.path / PART
        remove(part)
        part.mkdir()
        write(part)
        write_manifest(part, step)
        rotate(self.path)
        if keep:
            self.keep(step)

    def keep(self, step):
        keep(self.path / NEWEST, step)

    def load(self, read):
        """(read(path), sentences) as find_checkpoint has them; what was read is `checkpoint` afterwards."""
        path, value, problems = find_checkpoint(self.path, read)
        if path.name == PART and not problems:
            rotate(self.path)
        elif path.name != NEWEST:
            self.set_aside()
            path.rename(self.path / NEWEST)
        return value, problems

    def set_aside(self):
        """Moves the newest checkpoint out of the way, to checkpoint.damaged."""
        remove(self.path / DAMAGED)
        if (self.path / NEWEST).exists():
            (self.path / NEWEST).rename(self.path / DAMAGED)

    def fall_back(self):
        """The newest checkpoint is no good: the one before takes its place. False if there is none."""
        if not (self.path / PREVIOUS).exists():
            return False
        self.set_aside()
        (self.path / PREVIOUS).rename(self.path / NEWEST)
        return True


def claim(base, name="", default="run", resume=False):
    """The RunFolder of a run to begin or, with resume, to begin or continue. Without a name: the default,
    numbered if taken. Raises Taken if a run of that name was begun and resume is False; see RunFolder."""
    if name:
        folder = RunFolder(base, name)
        if not resume and not folder.new:
            folder.close()
            raise Taken(f"{folder} exists: continue it with --resume, or choose another --name")
        return folder
    for number in itertools.count(1):
        try:
            return claim(base, default if number == 1 else f"{default}-{number}")
        except Taken:
            pass


# ---------------------------------------------------------------------- metrics

class Metrics:
    """metrics.jsonl, appended line by line, and metrics.csv made from it. `rows`: one dict per step.

    A resumed run gives the step it goes on from: rows from there on are dropped, since they are made again.
    `problems`: a sentence for everything that is wrong with the file."""

    def __init__(self, folder, first=0):
        self.file = Path(folder) / "metrics.jsonl"
        self.csv = self.file.with_suffix(".csv")
        self.problems = []
        rows = {}
        twice = []
        for row in self._read():
            if row["step"] < first:
                if row["step"] in rows:
                    twice.append(row["step"])
                rows[row["step"]] = row
        missing = [step for step in range(first) if step not in rows]
        if missing:
            self.problems.append(f"{self.file} has no line for {spans(missing)} of the {first} steps done")
        if twice:
            self.problems.append(f"{self.file} has several lines for {spans(twice)}: the last counts")
        self.rows = [rows[step] for step in sorted(rows)]
        if self.file.exists():
            write_text(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))

    def _read(self):
        text = self.file.read_text(encoding="utf-8", errors="replace") if self.file.exists() else ""
        lines = text.split("\n")[:-1]  # a kill may have cut the last one, which then has no end
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                row["step"] = int(row["step"])
            except (ValueError, TypeError, KeyError):
                self.problems.append(f"line {number} of {self.file} is damaged and left out")
            else:
                yield row

    def add(self, row):
        self.rows.append(row)
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")

    def sync(self):
        """Before a checkpoint is saved: none shall outlive a power cut without its metrics."""
        if not self.rows:
            return
        sync(self.file)
        part = self.csv.with_name(self.csv.name + ".part")
        names = dict.fromkeys(name for row in self.rows for name in row)
        with open(part, "w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(names), restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        part.replace(self.csv)


def spans(steps):
    """[3, 4, 5, 9] -> "steps 3-5, 9"."""
    runs = []
    for step in sorted(set(steps)):
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return "steps " + ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)


# ---------------------------------------------------------------------- time and signals

class Clock:
    """Seconds by phase: clock(name) adds the time since the last call to that phase, clock() starts anew."""

    def __init__(self, device, phases=("rollout", "reward", "update")):
        self.device = device
        self.seconds = dict.fromkeys(phases, 0.0)
        self.mark = self.began = time.perf_counter()

    def __call__(self, phase=None):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what was launched belongs to the phase that launched it
        now = time.perf_counter()
        if phase:
            self.seconds[phase] += now - self.mark
        self.mark = now

    def total(self):
        return time.perf_counter() - self.began


class Interrupt:
    """Ctrl-C (SIGINT), SIGTERM of a cluster and SIGHUP of a closed terminal, in a `with` around the run.

    They stop at once, by KeyboardInterrupt, except within `with interrupt.deferred()`: there the first only
    sets `requested` to its name, so that the step can be finished and saved; then Ctrl-C stops at once.
    A signal that the process was started to ignore (nohup) stays ignored."""

    SIGNALS = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")]

    def __init__(self):
        self.requested = ""
        self.waits = False
        self.before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # no other thread may
            for number in self.SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self):
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    def handle(self, number, frame):
        name = signal.Signals(number).name
        again = bool(self.requested)
        self.requested = self.requested or name
        at_once = not self.waits or again and name == "SIGINT"
        if not at_once and not again:
            say(f"\n{name}: finishing this step, then saving; Ctrl-C now stops at once\n")
        if name == "SIGHUP":
            silence()
        if at_once:
            raise KeyboardInterrupt


def say(text):
    """To stderr, from a signal handler: past the buffer, which may just be in use."""
    try:
        os.write(2, text.encode())
    except OSError:  # nobody listens any more
        pass


def silence():
    """A closed terminal, and a pipe that died with it, fail every print, and so the run: none goes there."""
    null = os.open(os.devnull, os.O_WRONLY)
    for handle in (1, 2):
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.dup2(null, handle)
    os.close(null)
