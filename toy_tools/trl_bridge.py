"""ResT on TRL's GRPOTrainer, for more than one GPU. Advantages per token, A_i w_it, make its loss rest.py's
(weights are at least 0): loss_type grpo is "sequence", dapo and bnpo are "token", dr_grpo is "constant"."""
import inspect
import json
import logging
from types import SimpleNamespace
import torch
import rest
try:
    import trl
    from datasets import Dataset
    inspect.signature(trl.GRPOTrainer._get_per_token_logps_and_entropies).parameters["compute_entropy"]
    inspect.getsource(trl.GRPOTrainer._compute_loss).index("advantages.dim() == 1")  # else (B, T) broadcasts
except (ImportError, AttributeError, LookupError, ValueError) as error:
    raise ImportError(f"ResT on TRL needs trl 1.16: pip install 'trl==1.16.*' ({error!r})") from error

def to_dataset(rows, chat):
    """Single-step rows -> datasets.Dataset: prompt, a text by the rest.Chat; opening, with which its template
    begins completions; row, as JSON, since Arrow would fill in None. Raises ValueError."""
    bos = chat.tokenizer("")["input_ids"] and chat.tokenizer.bos_token or ""  # TRL's call will add it
    table = []
    for number, row in enumerate(rows, 1):
        text, opening = chat.render(row["messages"], row["tools"])
        text = (text + opening).removeprefix(bos)
        if chat.tokenizer(text)["input_ids"] != sum(chat.prompt(row), []):
            raise ValueError(f"row {number}: its prompt is other tokens as a text, which TRL wants")
        if len(row["gold"]) != 1:
            raise ValueError(f"row {number} is live, TRL takes single steps: load_rows without live")
        table.append({"prompt": text, "opening": opening, "row": json.dumps(row)})
    return Dataset.from_list(table)

def reward(chat, scaling="dynamic"):
    """The rule reward, a TRL reward function on to_dataset's columns; logs the rate of exact calls."""
    def reward(completion_ids, opening, row, trainer_state, log_metric, **_):
        progress = trainer_state.global_step / max(1, trainer_state.max_steps)
        texts = [chat.decode(ids[:len(ids) - (ids[-1] in chat.end_ids)]) for ids in completion_ids]
        scores = [rest.score_texts([o + text], json.loads(r)) for o, text, r in zip(opening, texts, row)]
        log_metric("exact", rest.mean_scores(scores)["exact"])
        return [rest.episode_reward(*score[:2], progress, scaling) for score in scores]
    return reward

class ResTTrainer(trl.GRPOTrainer):
    """GRPOTrainer of a loaded model and its rest.Chat, by rest.WEIGHTS[method]; its constants are in .cfg."""
    def __init__(self, model, chat, method="rest", **options):
        self.chat = chat
        self.cfg = rest.Config(method=method)
        if not trl.__version__.startswith("1.16."):
            logging.getLogger("rest").warning(f"trl {trl.__version__} is untested: pip install 'trl==1.16.*'")
        model.generation_config.eos_token_id = sorted(chat.end_ids)
        super().__init__(model, processing_class=chat.tokenizer, **{"reward_funcs": reward(chat), **options})
        if method == "dr-grpo" and self.scale_rewards != "none":
            raise ValueError('dr-grpo does not divide by the deviation: GRPOConfig(scale_rewards="none")')

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        ids, seen = (torch.cat([out["prompt_" + x], out["completion_" + x]], 1) for x in ("ids", "mask"))
        mask = (out["completion_mask"] * out.get("tool_mask", 1)).float()                      # (n, T)
        n, T = mask.shape
        sampled = torch.cat([0 * out["prompt_mask"], mask], 1)                                 # (n, L + T)
        edges = torch.diff(sampled, append=0 * sampled[:, :1])  # turns are runs of 1 behind the opening
        turns = [[(a + 1 - len(self.chat.encode(x.get("opening", ""))), b + 1)
                  for a, b in row.nonzero().view(-1, 2).tolist()] for row, x in zip(edges, inputs)]
        whole = SimpleNamespace(tokens=ids, sampled=sampled.bool(), turns=turns)
        region, covers = (x[:, -T:] for x in rest.token_regions(whole, self.chat))
        logp, entropy, *_ = self._get_per_token_logps_and_entropies(
            self.model, ids, seen, T, self.args.per_device_train_batch_size, compute_entropy=True)  # (n, T)
        tokens = torch.stack([mask, region + 1, mask * logp, mask * entropy, *covers.unbind(-1)], -1)
        tokens = self.accelerator.gather(self.accelerator.pad_across_processes(tokens, dim=1))
        on, region, logp, entropy, *covers = tokens.unbind(-1)  # (N, longest T) of all processes
        batch = SimpleNamespace(sampled=on > 0, region=region.long() - 1, logp=logp, entropy=entropy,
                                covers=torch.stack(covers, -1) > 0, advantages=on[:, 0], truncated=on[:, 0])
        self.cfg.steps = max(1, self.state.max_steps)
        self.cfg.seed = self.args.seed
        weight = rest.WEIGHTS[self.cfg.method](batch, self.cfg, self.state.global_step / self.cfg.steps)
        for name, value in rest.batch_metrics(batch, on[:, :1], weight).items():
            if name[:2] in ("H_", "w_"):  # the others are TRL's
                self._metrics["train" if self.model.training else "eval"][name].append(value)
        if self.loss_type in ("dapo", "bnpo", "cispo", "vespo"):  # over tokens, "token" is over weights
            weight = weight * on.sum() / weight.sum().clamp(min=1e-30)
        own = weight[self.accelerator.process_index * n:][:n, :T]
        out["advantages"] = out["advantages"][:, None] * own
        return out
