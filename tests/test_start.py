"""The warm-started policy that comes with the repository: it is what its start.json says, and used
where it was asked for."""

import json

import pytest
import torch
import transformers.configuration_utils
from safetensors.torch import load_file

import train_small
from toy_tools import policy, tasks
from toy_tools.options import read_options


def test_the_shipped_start_is_what_its_metadata_says():
    """Made by the recipe of today's tools, tasks, lessons and template; every file as it was; small, in
    bfloat16."""
    about = json.loads((policy.START / "start.json").read_text())
    assert policy.is_shipped() and about["recipe"] == policy.recipe()
    assert about["files"] == policy.digest(policy.START)
    assert set(about["versions"]) == {"torch", "transformers", "tokenizers"}
    assert about["command"] == "python -m toy_tools.policy toy_tools/start"
    stored = load_file(policy.START / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert sum(file.stat().st_size for file in policy.START.iterdir()) < 3_000_000
    model, tokenizer = policy.read_start()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.chat_template == policy.CHAT_TEMPLATE and model.config.vocab_size == len(tokenizer)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """One made by the same code in seconds."""
    monkeypatch.setenv("REST_CACHE", str(tmp_path / "cache"))
    policy.write_start(tmp_path / "start", steps=2, progress=False)
    return tmp_path / "start"


def test_a_start_is_made_by_its_recipe(small, monkeypatch):
    """Its weights are those of the warm start, in bfloat16; asked for with the same options it is
    taken, with others or with edited tools it is not."""
    made, tokenizer = policy.read_start(small)
    trained, again = policy.tiny_policy(steps=2, progress=False)
    assert tokenizer.get_vocab() == again.get_vocab()
    assert all(torch.equal(a, b.bfloat16().float()) for a, b in zip(made.parameters(), trained.parameters()))
    monkeypatch.setattr(policy, "START", small)
    assert policy.is_shipped(steps=2)
    for other in ({"seed": 1}, {"noise": 0.1}, {"mask_names": True}, {"steps": 3}):
        assert not policy.is_shipped(**{"steps": 2, **other}), other
    monkeypatch.setattr(tasks, "USE", ("!",) * len(tasks.USE))  # another phrase in the thoughts
    assert not policy.is_shipped(steps=2)


def test_a_damaged_start_is_named(small):
    file = small / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="python -m toy_tools.policy toy_tools/start"):
        policy.read_start(small)


def test_every_version_of_the_libraries_takes_it(monkeypatch):
    """The recipe says what is learnt; by which libraries it was learnt stands beside it."""
    monkeypatch.setattr(transformers.configuration_utils, "__version__", "0.0")
    monkeypatch.setattr(policy, "versions", lambda: {"torch": "0.0"})
    assert policy.is_shipped()


@pytest.mark.parametrize("options, trains", [
    ([], False),
    (["--method", "grpo"], False),
    (["--warm-start-steps", "480"], True),
    (["--seed", "1"], True),
    (["--mask-names"], True)], ids=str)
def test_who_begins_from_it(monkeypatch, capsys, options, trains):
    """The default run and its methods, and says so; other seeds, masked names and --warm-start-steps
    train theirs."""
    asked = []
    monkeypatch.setattr(policy, "tiny_policy", lambda *args, **kwargs: asked.append(args) or (None, None))
    run, cfg, _ = read_options(options)
    model, _ = train_small.embedded_policy(run, cfg, "cpu")
    assert bool(asked) == trains == (model is None)
    assert ("comes with the repository" in capsys.readouterr().out) != trains
