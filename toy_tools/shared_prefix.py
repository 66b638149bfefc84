"""How the model is run: attention that keeps a group's prompt only once, for any Hugging Face model with pluggable attention
(AttentionInterface), the two decoders of the rollout loop, shared and plain, and what makes up a batch.

A group's G completions share their prompt. In the update one batch row holds [prompt | completion 1 | … | completion G] and the layout says
who may see whom; while decoding, the prompt's keys and values are stored once per group, next to each completion's own. Exact: what a
token sees is what it would see in its own row. can_share tells for which models, and rest.py has the plain path beside it."""

import functools
import inspect
import logging
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

log = logging.getLogger("rest")


@dataclass
class PackedLayout:
    """Batch rows [prompt | G completions of T tokens], length Lp + G*T. prompt_mask: bool [P, Lp], False at left padding."""
    prompt_mask: torch.Tensor
    group: int
    length: int
    masks: tuple = None

    def attend(self, q, k, v, scale):  # q [P, H, Lp+G*T, D], k and v [P, Hkv, Lp+G*T, D]
        (P, Lp), G, T = self.prompt_mask.shape, self.group, self.length
        if self.masks is None:  # the same for all layers
            see = self.prompt_mask[:, None, None, :]  # (P, 1, 1, Lp)
            own = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
            eye = torch.eye(Lp, dtype=torch.bool, device=q.device)  # padding sees itself: a fully masked row would be NaN
            self.masks = (None if self.prompt_mask.all() else (see & torch.ones_like(eye).tril()) | eye,
                          torch.cat([see.expand(P, 1, T, Lp), own.expand(P, 1, T, T)], -1).repeat_interleave(G, 0))  # (P*G, 1, T, Lp+T)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))  # grouped-query attention
        out = F.scaled_dot_product_attention(q[:, :, :Lp], k[:, :, :Lp], v[:, :, :Lp], self.masks[0],
                                             is_causal=self.masks[0] is None, scale=scale)
        if G:
            def unpack(x):  # (P, H, Lp+G*T, D) -> (P*G, H, T, D)
                return x[:, :, Lp:].unflatten(2, (G, T)).transpose(1, 2).flatten(0, 1)
            kg, vg = (torch.cat([x[:, None, :, :Lp].expand(-1, G, -1, -1, -1).flatten(0, 1), unpack(x)], 2) for x in (k, v))
            own = F.scaled_dot_product_attention(unpack(q), kg, vg, self.masks[1], scale=scale)  # (P*G, H, T, D)
            out = torch.cat([out, own.unflatten(0, (P, G)).transpose(1, 2).flatten(2, 3)], 2)
        return out  # (P, H, Lp+G*T, D)


class DecodeLayout:
    """Keys and values while decoding: the prompt's once per group, [P, Hkv, Lp, D], each completion's own, [P, Hkv, G, T, D].

    It plays both parts that transformers knows: the cache (`update`) and, through shared_attention, the attention pattern. `column`, if set,
    is the step as a tensor int64 [1]: every tensor then keeps its shape from step to step, as a CUDA graph needs; the first `width` columns
    are read, and those still to come are masked."""

    def __init__(self, prompt_mask, group, length):
        self.prompt_mask, self.group, self.length = prompt_mask, group, length
        self.prompt, self.own, self.packed = [], [], PackedLayout(prompt_mask, 0, 0)
        self.step, self.column, self.width, self.bias = None, None, 0, None

    def update(self, k, v, layer, *args, **kwargs):
        k = k.to(v.dtype)  # under autocast positions are rotated in float32
        if self.step is None:  # prefill
            P, Hkv, _, D = k.shape
            self.prompt.append((k.contiguous(), v.contiguous()))
            self.own.append(tuple(k.new_zeros(P, Hkv, self.group, self.length, D) for _ in range(2)))
            return k, v
        new = [x.view(-1, self.group, *x.shape[1:]).transpose(1, 2) for x in (k, v)]  # (P, Hkv, G, 1, D)
        if self.column is not None:
            return tuple(own.index_copy_(3, self.column, x)[:, :, :, :self.width] for own, x in zip(self.own[layer], new))
        for own, x in zip(self.own[layer], new):
            own[:, :, :, self.step] = x[:, :, :, 0]
        return tuple(own[:, :, :, :self.step + 1] for own in self.own[layer])

    def get_seq_length(self, layer=0):
        return 0 if self.step is None else self.prompt_mask.shape[1] + self.step

    def attend(self, q, k, v, scale, layer):  # q [P*G, H, 1, D], k and v [P, Hkv, G, t, D]
        if self.step is None:
            return self.packed.attend(q, k, v, scale)
        (P, Hkv, G, t, D), (kp, vp), R = k.shape, (x.flatten(0, 1) for x in self.prompt[layer]), q.shape[1] // k.shape[1]
        k, v, Lp = k.flatten(0, 2), v.flatten(0, 2), kp.shape[1]
        q = q.view(P, G, Hkv, R, D).transpose(1, 2).contiguous()
        to_prompt = q.view(P * Hkv, G * R, D) @ kp.mT                                # (P*Hkv, G*R, Lp)
        to_own = q.view(-1, R, D) @ k.mT                                             # (P*Hkv*G, R, t)
        scores = torch.cat([to_prompt.view(-1, R, Lp), to_own], -1).view(P, -1, Lp + t)
        if self.bias is None:  # the same for all layers: -inf at left padding and, with a fixed width, at columns to come
            late = torch.arange(t, device=q.device) > (t if self.column is None else self.column)
            hidden = torch.cat([~self.prompt_mask, late.expand(P, t)], 1)
            self.bias = torch.zeros_like(hidden, dtype=scores.dtype).masked_fill(hidden, -torch.inf)[:, None]  # (P, 1, Lp+t)
        p = torch.add(self.bias, scores, alpha=scale).softmax(-1).to(v.dtype).view(-1, R, Lp + t)
        shared = p[..., :Lp].reshape(P * Hkv, G * R, Lp) @ vp                        # (P*Hkv, G*R, D)
        out = torch.baddbmm(shared.view(-1, R, D), p[..., Lp:], v)                   # (P*Hkv*G, R, D)
        return out.view(P, Hkv, G, R, D).transpose(1, 2).reshape(P * G, Hkv * R, 1, D)

    def select(self, groups, slots, group):  # keep these groups of prompts and these slots, `group` to each
        self.prompt = [tuple(x[groups] for x in kv) for kv in self.prompt]
        at = slots.view(-1, group) % self.group  # (groups kept, group): which of a group's slots
        self.own = [tuple(x[groups[:, None], :, at].transpose(1, 2).contiguous() for x in kv) for kv in self.own]
        self.prompt_mask, self.group = self.prompt_mask[groups], group


def shared_attention(module, query, key, value, attention_mask, scaling=None, layout=None, **kwargs):
    """Attention function in transformers' AttentionInterface: output [batch, time, heads, D]. `layout` comes as a model kwarg."""
    args = (query, key, value, scaling or query.shape[-1] ** -0.5)
    out = layout.attend(*args, module.layer_idx) if isinstance(layout, DecodeLayout) else layout.attend(*args)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("rest_shared", shared_attention)


class sharing:
    """Context: the model's attention is shared_attention inside, what it was before outside."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.before = self.model.config._attn_implementation
        self.model.set_attn_implementation("rest_shared")

    def __exit__(self, *exc):
        self.model.set_attn_implementation(self.before)


def left_pad(prompts, device):
    """list of P id lists -> ids int64 [P, Lp], mask bool [P, Lp]; the last prompt token always stands in the last column."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.arange(width, device=device) >= width - torch.tensor([len(p) for p in prompts], device=device)[:, None]
    return ids, mask


def cache_name(model):
    """What the model calls its cache: past_key_values, or from transformers 5.24 on, cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class PlainDecoder:
    """Decoding with the model's own attention and cache, each prompt repeated G times. The reference path, and the fallback."""

    shrink = 0.75  # rows leave the batch (drop_finished) when no more than this share is left

    def __init__(self, model, prompts, group, length, graph=False, compiled=False):
        self.model, self.cache, self.cache_name, self.width = model, None, cache_name(model), 1
        self.ids, self.mask = (x.repeat_interleave(group, 0) for x in left_pad(prompts, next(model.parameters()).device))

    def forward(self, ids, position_ids):
        out = self.model(input_ids=ids, attention_mask=self.mask.long(), position_ids=position_ids, use_cache=True, logits_to_keep=1,
                         **{self.cache_name: self.cache})
        self.cache = out[self.cache_name]
        return out.logits[:, -1]

    def prefill(self):
        self.position = self.mask.sum(1)
        return self.forward(self.ids, (self.mask.cumsum(1) - 1).clamp(min=0))

    def step(self, ids, t):
        self.mask = F.pad(self.mask, (0, 1), value=True)
        return self.forward(ids[:, None], self.position[:, None] + t)

    def select(self, groups, slots, width):
        self.cache.batch_select_indices(slots)
        self.mask, self.position = self.mask[slots], self.position[slots]


class SharedDecoder:
    """Decoding with each prompt's keys and values kept once per group (DecodeLayout). `graph`: on CUDA a step is captured as a graph and replayed;
    `compiled`: torch.compile fuses its kernels. Both need a step of fixed shapes (static_step), prepared anew when the batch shrinks."""

    def __init__(self, model, prompts, group, length, graph=True, compiled=False):
        self.model, self.width = model, group  # width: slots to a group
        self.ids, self.mask = left_pad(prompts, next(model.parameters()).device)
        self.layout, self.cache_name = DecodeLayout(self.mask, group, length), cache_name(model.base_model)
        refused = model.__dict__.setdefault("_rest_refused", set())  # what failed once for this model
        self.graph, self.compiled = graph and self.ids.is_cuda and "graph" not in refused, compiled and "compiled" not in refused
        self.shrink = 0.5 if self.graph or self.compiled else 0.75

    def forward(self, ids, position_ids):
        self.layout.bias = None  # the last step's
        hidden = self.model.base_model(input_ids=ids, position_ids=position_ids, use_cache=True, layout=self.layout,
                                       **{self.cache_name: self.layout}).last_hidden_state
        return self.model.get_output_embeddings()(hidden[:, -1])

    def prefill(self):
        self.position = self.mask.sum(1).repeat_interleave(self.width)
        return self.forward(self.ids, (self.mask.cumsum(1) - 1).clamp(min=0)).repeat_interleave(self.width, 0)

    def step(self, ids, t):
        self.layout.step = t
        while (self.graph or self.compiled) and (self.layout.column is None or t >= self.layout.width):
            try:
                self.prepare(ids, t)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # without the one, then without the other
                what = "compiled" if self.compiled else "graph"
                self.model._rest_refused.add(what)
                setattr(self, what, False)
                self.layout.column = self.replay = self.graph_logits = None
                log.warning("decoding without %s (slower, same results): %s", "compilation" if what == "compiled" else "a CUDA graph", error)
        return self.forward(ids[:, None], self.position[:, None] + t) if self.layout.column is None else self.static_run(ids, t)

    def static_step(self, ids):
        """A step whose tensors all keep their shapes and addresses: what a graph can hold. ids int64 [S]."""
        return self.forward(ids[:, None], (self.position + self.layout.column)[:, None])

    def work(self, ids):
        return compiled_step()(self, ids) if self.compiled else self.static_step(ids)

    def static_run(self, ids, t):
        self.layout.column.fill_(t)
        if not self.graph:
            return self.work(ids)
        self.graph_ids.copy_(ids)
        self.replay()
        return self.graph_logits  # until the next replay writes over them

    def prepare(self, ids, t):
        """Compiles and captures the step for the rows that are there now and the steps below layout.width, which doubles from time to time, so
        that a long token budget is not read before it is used. Raises RuntimeError if that fails, or differs from the eager step.

        The graph reads graph_ids, self.position and the layout's tensors where they lie now: all live until the next `prepare`."""
        self.replay = self.graph_logits = None  # the last graph's memory is free for the next
        self.layout.column, self.layout.width = torch.full((1,), t, device=ids.device), min(self.layout.length, max(128, 2 * t))
        expected = self.static_step(ids)  # and a warm-up: libraries allocate and, under autocast, weights are cast outside the graph
        if self.graph:
            if self.compiled:
                self.work(ids)
            self.graph_ids = ids.clone()
            self.replay, self.graph_logits = self.record(lambda: self.work(self.graph_ids))
            self.graph_logits.zero_()  # if the graph were empty, nothing would come back
        if not close(self.static_run(ids, t), expected):
            raise RuntimeError("the prepared step differs from the eager one")

    @staticmethod
    def record(work):
        """(run, result): run() does what work() does, by a CUDA graph, and writes its result where it stands."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):  # the first restores the stream if capturing fails
            result = work()
        return graph.replay, result

    def select(self, groups, slots, width):
        self.layout.select(groups, slots, width)
        self.position, self.width = self.position[slots], width
        self.layout.column = self.replay = self.graph_logits = None  # other shapes: prepared anew


@functools.cache
def compiled_step():
    return torch.compile(SharedDecoder.static_step, dynamic=True)  # prompts, rows and widths differ from rollout to rollout


def drop_finished(decoder, slots, spare):
    """Takes finished groups out of the decoder's batch and narrows the others to the fullest one, if that makes the batch enough smaller.

    slots: the episode of each row of the batch, `spare` where it has ended. Returns the slots that are left and their rows until now."""
    groups = [slots[a:a + decoder.width] for a in range(0, len(slots), decoder.width)]
    keep = [k for k, group in enumerate(groups) if any(i != spare for i in group)]
    width = max(sum(i != spare for i in groups[k]) for k in keep)
    if len(keep) * width > decoder.shrink * len(slots):
        return slots, slice(None)
    rows = [k * decoder.width + s for k in keep for s in sorted(range(decoder.width), key=lambda s: groups[k][s] == spare)[:width]]
    kept = torch.tensor(rows, device=decoder.ids.device)
    decoder.select(torch.tensor(keep, device=kept.device), kept, width)
    return [slots[s] for s in rows], kept


def micro_batches(batch, used, budget, shared):
    """Splits the groups `used` of a Rollout into lists of (prompt index, completion indices): forwards of at most `budget` tokens with padding,
    or of one completion. shared: whether a group's completions stand behind one copy of their prompt, or each behind its own."""
    G, out = batch.group, []
    length, prompt = batch.length.view(-1, G).amax(1).tolist(), [len(ids) for ids in batch.prompts]

    def padded(part):
        copies = len(part[0][1])
        return len(part) * (max(prompt[p] for p, _ in part) * (1 if shared else copies) + copies * max(length[p] for p, _ in part))
    for p in sorted(used, key=lambda p: (length[p], prompt[p])):
        fit = (budget - prompt[p]) // max(length[p], 1) if shared else budget // (prompt[p] + length[p])  # completions of this prompt at once
        per = max(1, min(G, fit))
        for a in range(0, G, per):
            new = (p, list(range(a, min(a + per, G))))
            if out and len(out[-1][0][1]) == len(new[1]) and padded(out[-1] + [new]) <= budget:
                out[-1].append(new)
            else:
                out.append([new])
    return out


def close(a, b):
    """Whether logits or logps agree as well as their precision lets them: 1e-4 of the largest in float32, 5% in bfloat16."""
    exact = a.dtype == b.dtype == torch.float32 and not torch.is_autocast_enabled(a.device.type)
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = (x.nan_to_num(0.0, 0.0, 0.0) for x in (a, b))  # words that a model rules out have logit -inf
    return bool((a - b).abs().max() <= (1e-4 if exact else 5e-2) * b.abs().max())


def can_share(model):
    """Whether the shared path is exact for this model: tried once on random ids against the plain path, and remembered.

    False for architectures without pluggable attention, with sliding windows, or that post-process logits; those take the plain path."""
    import rest
    if not hasattr(model, "_rest_can_share"):
        config, ok = getattr(model, "config", None), False
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if getattr(model, "_supports_attention_backend", False) and kinds == {"full_attention"}:
            device, training = next(model.parameters()).device, model.training
            g = torch.Generator().manual_seed(0)
            prompts = [torch.randint(0, config.vocab_size, (n,), generator=g).tolist() for n in (3, 5)]
            completions = torch.randint(0, config.vocab_size, (2, 2, 4), generator=g).to(device)
            model.eval()

            def first_logits(kind):  # of prefill and a step
                decoder = kind(model, prompts, 2, 4, graph=False)
                return torch.stack([decoder.prefill(), decoder.step(completions[:, :, 0].flatten(), 0)])
            try:
                with torch.no_grad(), autocast(model):
                    ok = close(*(rest.completion_logps(model, prompts, completions, 1.0, shared=s) for s in (True, False)))
                    plain = first_logits(PlainDecoder)
                    with sharing(model):
                        ok = ok and close(first_logits(SharedDecoder), plain)
            except (TypeError, AttributeError, RuntimeError, ValueError) as error:
                ok = False
                log.warning("shared-prefix path not usable: %s", error)
            model.train(training)
        if not ok:
            log.warning("%s: prompts are not shared within groups (slower, same gradients)", type(model).__name__)
        model._rest_can_share = ok
    return model._rest_can_share


def autocast(model):
    """Context: bf16 autocast for float32 weights on GPUs that have bf16, nothing elsewhere (on CPUs with avx512_bf16 we have seen it twice as
    fast and half as fast)."""
    parameter = next(model.parameters(), torch.empty(0))
    usable = parameter.is_cuda and parameter.dtype == torch.float32 and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16) if usable else nullcontext()
