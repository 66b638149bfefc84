"""One sample on its way through ResT, with its numbers: what `python train_small.py --explain` prints."""

import torch

import rest

OVER = {"sequence": "the completion's sampled tokens and the number of completions",
        "constant": "the number of completions and their largest length, --max-completion-tokens",
        "token": "the sum of all weights"}


def explain(engine, chat, row, cfg, paint=None):
    """The group of one row, rolled out, tagged, weighed, scored and turned into the loss, as text.

    paint(text, region), if given, colours a token's text. The last lines list every sampled token of one
    completion; the shares of all tokens of all completions add up to what rest.policy_loss returns."""
    batch = rest.rollout(engine, chat, [row], cfg, seed=cfg.seed)
    batch.region, batch.covers = rest.token_regions(batch, chat)
    scores = rest.score_batch(batch)
    rewards = [rest.episode_reward(form, correct, 0.0, cfg.reward_scaling) for form, correct, _ in scores]
    scale_by_std = cfg.method != "dr-grpo"
    advantages = rest.group_advantages(torch.tensor([rewards]), scale_by_std, cfg.delta)[0]  # (G,)
    advantages = advantages.to(batch.logp.device)
    weigh = rest.WEIGHTS[cfg.method]
    weights = [weigh(batch, cfg, progress) for progress in (0.0, 0.5, 1.0)]                  # (G, T) each
    now = weights[0]
    scale = rest.loss_scale(batch.sampled, now, cfg.aggregation, cfg.max_completion_tokens)  # (G,)
    with torch.no_grad():
        logp = engine.logps(batch, list(range(batch.group)), cfg.temperature)                # (G, T)
        loss = rest.policy_loss(logp, batch.logp, advantages, now, batch.sampled, scale, cfg.clip)
    share = token_shares(logp, batch, advantages, now, scale, cfg.clip)

    def tells_most(i):
        regions = set(batch.region[i].tolist())
        return bool(advantages[i] != 0), len(regions)

    i = max(range(batch.group), key=tells_most)
    blocks = [
        "1. The prompt, and what is wanted",
        chat.decode(batch.prompts[0]),
        f"gold: {row['gold']}",
        f"2. {batch.group} completions sampled at temperature {cfg.temperature}, scored by rules",
        group_table(scores, rewards, advantages.tolist(), i),
        "3. Regions: mean entropy H, raw weight, weight of a token at progress 0, 0.5 and 1",
        region_table(batch, cfg),
        f"4. Completion {i + 1}, token by token",
        token_table(batch, chat, i, weights, share, paint),
        f"5. The loss: -w A, over {OVER[cfg.aggregation]}; all ratios are 1",
        f"this completion's tokens add up to {float(share[i].sum()):+.6f}\n"
        f"all completions' tokens add up to  {float(share.sum()):+.6f}\n"
        f"rest.policy_loss returns           {float(loss):+.6f}   "
        "(near 0 by construction: its gradient is not)"]
    return "\n\n".join(blocks)


def token_shares(logp, batch, advantages, weight, scale, clip):
    """What each token adds to rest.policy_loss: float [N, T]."""
    ratio = torch.exp(torch.where(batch.sampled, logp - batch.logp, 0.0))
    advantage = advantages[:, None]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -torch.where(batch.sampled, weight * gain, 0.0) * scale[:, None]


def group_table(scores, rewards, advantages, shown):
    lines = ["      format  correct  exact  reward  advantage"]
    for i, (form, correct, exact) in enumerate(scores):
        correct = "-" if correct is None else f"{correct:.2f}"
        mark = "  <- below" if i == shown else ""
        lines.append(f"  {i + 1:2d}  {form:6.2f}  {correct:>7}  {'yes' if exact else 'no':>5}"
                     f"  {rewards[i]:+6.2f}  {advantages[i]:+9.3f}{mark}")
    return "\n".join(lines)


def region_table(batch, cfg):
    entropy = rest.region_entropy(batch)
    raw = rest.raw_weights(entropy, cfg.raw_weight, cfg.min_entropy)
    moved = [rest.region_weights(batch, cfg, progress) for progress in (0.0, 0.5, 1.0)]
    lines = [f"  {'region':8} tokens  H (nats)    raw   w at 0    0.5      1"]
    for name, members in rest.PAPER_REGIONS.items():
        r = members[0]
        count = sum(int((batch.region == member).sum()) for member in members)
        if count:
            cells = "".join(f"{float(w[r]):7.2f}" for w in moved)
            lines.append(f"  {name:8} {count:6d}  {float(entropy[r]):8.3f} {float(raw[r]):6.2f}  {cells}")
    return "\n".join(lines) + "\n  (w: ResT's, raw over its token mean in the batch, moved by the curriculum)"


def token_table(batch, chat, i, weights, share, paint):
    lines = ["  token                 region     H      p   w at 0    0.5      1   share of the loss"]
    for t in batch.sampled[i].nonzero()[:, 0].tolist():
        r = int(batch.region[i, t])
        text = f"{chat.text(int(batch.tokens[i, t]))!r:20}"
        text = paint(text, r) if paint else text
        cells = "".join(f"{float(w[i, t]):7.2f}" for w in weights)
        lines.append(f"  {text}  {rest.REGIONS[r]:8} {float(batch.entropy[i, t]):5.2f}  "
                     f"{float(batch.logp[i, t].exp()):5.3f} {cells}   {float(share[i, t]):+.6f}")
    return "\n".join(lines)
