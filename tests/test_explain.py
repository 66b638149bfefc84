"""`--explain`: every number that is shown is the algorithm's own."""

import re

import pytest
import torch
from conftest import CALL, ROW, qwen3, scripted
from test_gradients import config, make_batch, weigh

import rest
from toy_tools import explain


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
@pytest.mark.parametrize("method", ["rest", "rest-official"])
def test_the_shares_of_all_tokens_are_the_loss(method, aggregation):
    """Off policy, with clipped ratios and forced tokens; nothing where no token was sampled."""
    engine, cfg = rest.Engine(qwen3(40)), config(method=method, aggregation=aggregation)
    batch, advantages = make_batch(engine.model)
    weight = weigh(batch, cfg, 4)
    scale = rest.loss_scale(batch.sampled, weight, aggregation, cfg.max_completion_tokens)
    logp = engine.logps(batch, list(range(len(batch.tokens))), cfg.temperature).detach()
    shares = explain.token_shares(logp, batch, advantages, weight, scale, cfg.clip)
    loss = rest.policy_loss(logp, batch.logp, advantages, weight, batch.sampled, scale, cfg.clip)
    assert float(shares.sum()) == pytest.approx(float(loss), rel=1e-4) and abs(float(loss)) > 1e-3
    assert not shares[~batch.sampled].any()


class Recorded(rest.Engine):
    """A script has no forward for the update: its policy is as it was."""

    def logps(self, batch, rows, temperature):
        return batch.logp


@pytest.mark.parametrize("aggregation, over", [
    ("sequence", "sampled tokens"), ("constant", "--max-completion-tokens"), ("token", "sum of all weights")])
def test_the_loss_is_said_to_be_over_what_it_is(tokenizer, aggregation, over):
    engine = Recorded(scripted(tokenizer, [CALL, CALL[:-20]]))
    cfg = rest.Config(group=2, max_completion_tokens=130, aggregation=aggregation)
    text = explain.explain(engine, rest.Chat(tokenizer), ROW, cfg)
    assert over in re.search(r"5\. The loss.*", text)[0]


def test_the_tables_show_what_was_computed(tokenizer):
    """One right and one wrong completion: scores, advantages of opposite sign, all tokens of the one that
    is shown with their region and weight, and the sum of its shares, -A/G for weights of mean 1."""
    engine = Recorded(scripted(tokenizer, [CALL, CALL[:-20]]))
    chat = rest.Chat(tokenizer)
    text = explain.explain(engine, chat, ROW, rest.Config(group=2, max_completion_tokens=130))
    line = re.compile(
        r"^ +([12])  +([\d.]+)  +([\d.-]+)  +(yes|no)  +([+-][\d.]+)  +([+-][\d.]+)", re.M)
    rows = line.findall(text)
    assert [row[3] for row in rows] == ["yes", "no"] and float(rows[0][5]) == -float(rows[1][5]) > 0
    shown = int(re.search(r"Completion (\d)", text)[1]) - 1
    tokens = re.findall(r"^  ('.*?'|\".*?\") +(tag|scaffold|name|params|thought|text) ", text, re.M)
    ids = tokenizer([CALL, CALL[:-20]][shown], add_special_tokens=False)["input_ids"]
    assert len(tokens) == len(ids) + 1
    assert {region for _, region in tokens} >= {"tag", "scaffold", "name", "params"}
    total = float(re.search(r"this completion's tokens add up to ([+-][\d.]+)", text)[1])
    assert total == pytest.approx(-float(rows[shown][5]) / 2, abs=1e-3)
    assert torch.tensor(total).abs() > 0.1 and "gold: [[{'name': 'add'" in text
