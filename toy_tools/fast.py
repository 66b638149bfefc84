"""The fast way to run a model: attention that keeps a group's prompt only once, for any Hugging Face
model with pluggable attention (AttentionInterface), and a decoding step of fixed shapes for CUDA graphs
and torch.compile.

A group's G completions share their prompt. In the update one batch row holds [prompt | completion 1 | …
| completion G] and the layout says who may see whom; while decoding, the prompt's keys and values are
stored once per group, next to each completion's own. Exact: what a token sees is what it would see in
its own row. `engine` gives the shared engine where it was seen to agree with rest.Engine, and
rest.Engine elsewhere."""

import functools
import inspect
import logging
import math
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

import rest

log = logging.getLogger("rest")


def engine(model, share=True, graph=True, compiled=False):
    """The fastest rest.Engine that is right for this model.

    share: keep each prompt once per group; graph: on a GPU, replay the decoding step as a CUDA graph;
    compiled: torch.compile it. Raises ValueError for a model that even rest.Engine does not run rightly
    (see why_refused)."""
    name = type(inside(model)).__name__
    reason = why_refused(model)
    if reason:
        raise ValueError(f"{name} cannot be used: {reason}")
    if not share:
        return rest.Engine(model)
    reason = why_not_shared(model)
    if reason:
        log.warning("%s: prompts are not shared within groups (slower, same gradients): %s", name, reason)
        return rest.Engine(model)
    return SharedEngine(model, graph, compiled)


def inside(model):
    """The causal language model itself, which an adapter of peft wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ---- layouts: who sees whom ----


@dataclass
class PackedLayout:
    """Batch rows [prompt | G completions of T tokens], length Lp + G*T. prompt_mask: bool [P, Lp],
    False at left padding; padded: whether there is any."""

    prompt_mask: torch.Tensor
    padded: bool
    group: int
    length: int
    masks: tuple = None  # the same for all layers

    def attend(self, q, k, v, scale):
        """q [P, H, Lp+G*T, D], k and v [P, Hkv, Lp+G*T, D] -> [P, H, Lp+G*T, D]."""
        P, Lp = self.prompt_mask.shape
        G, T = self.group, self.length
        if self.masks is None:
            self.masks = self.make_masks(q.device)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))  # grouped-query attention
        prompt, completion = self.masks
        out = F.scaled_dot_product_attention(q[:, :, :Lp], k[:, :, :Lp], v[:, :, :Lp], prompt,
                                             is_causal=prompt is None, scale=scale)
        if G == 0:
            return out

        def unpack(x):  # (P, H, Lp+G*T, D) -> (P*G, H, T, D)
            return x[:, :, Lp:].unflatten(2, (G, T)).transpose(1, 2).flatten(0, 1)

        def with_prompt(x):  # -> (P*G, H, Lp+T, D)
            prompt = x[:, None, :, :Lp].expand(-1, G, -1, -1, -1).flatten(0, 1)
            return torch.cat([prompt, unpack(x)], 2)

        k, v = with_prompt(k), with_prompt(v)
        own = F.scaled_dot_product_attention(unpack(q), k, v, completion, scale=scale)
        return torch.cat([out, own.unflatten(0, (P, G)).transpose(1, 2).flatten(2, 3)], 2)

    def make_masks(self, device):
        """(prompt to prompt, None where plainly causal; completion to prompt and itself, (P*G, 1, T,
        Lp+T))."""
        P, Lp = self.prompt_mask.shape
        G, T = self.group, self.length
        see = self.prompt_mask[:, None, None, :]                                 # (P, 1, 1, Lp)
        causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        # padding sees itself: a fully masked row would be NaN
        eye = torch.eye(Lp, dtype=torch.bool, device=device)
        prompt = (see & torch.ones_like(eye).tril()) | eye if self.padded else None
        own = torch.cat([see.expand(P, 1, T, Lp), causal.expand(P, 1, T, T)], -1)
        return prompt, own.repeat_interleave(G, 0)


class DecodeLayout:
    """Keys and values while decoding: the prompt's once per group, [P, Hkv, Lp, D], each completion's
    own, [P, Hkv, G, T, D].

    It plays both parts that transformers knows: the cache (`update`) and, through shared_attention, the
    attention pattern."""

    def __init__(self, prompt_mask, padded, group, length):
        self.prompt_mask = prompt_mask
        self.group = group
        self.length = length
        self.position = prompt_mask.sum(1).repeat_interleave(group)  # (S,), of column 0
        self.prompt = []
        self.own = []
        self.packed = PackedLayout(prompt_mask, padded, 0, 0)
        self.step = None
        self.bias = None

    def update(self, k, v, layer, *args, **kwargs):
        k = k.to(v.dtype)  # under autocast positions are rotated in float32
        if self.step is None:  # prefill
            self.keep_prompt(k, v, layer)
            return k, v
        return self.add_own([x.view(-1, self.group, *x.shape[1:]).transpose(1, 2) for x in (k, v)], layer)

    def keep_prompt(self, k, v, layer):
        P, Hkv, _, D = k.shape
        own = tuple(k.new_zeros(P, Hkv, self.group, self.length, D) for _ in range(2))
        self.prompt.append((k.contiguous(), v.contiguous()))
        self.own.append(own)

    def add_own(self, new, layer):
        """new: k and v [P, Hkv, G, 1, D] of this step -> all so far, [P, Hkv, G, t, D]."""
        for own, x in zip(self.own[layer], new):
            own[:, :, :, self.step] = x[:, :, :, 0]
        return tuple(own[:, :, :, :self.step + 1] for own in self.own[layer])

    def get_seq_length(self, layer=0):
        return 0 if self.step is None else self.prompt_mask.shape[1] + self.step

    def attend(self, q, k, v, scale, layer):
        """q [P*G, H, 1, D], k and v [P, Hkv, G, t, D] -> [P*G, H, 1, D]; in the prefill as PackedLayout."""
        if self.step is None:
            return self.packed.attend(q, k, v, scale)
        P, Hkv, G, t, D = k.shape
        R = q.shape[1] // Hkv
        kp, vp = (x.flatten(0, 1) for x in self.prompt[layer])                       # (P*Hkv, Lp, D)
        Lp = kp.shape[1]
        k, v = k.flatten(0, 2), v.flatten(0, 2)                                      # (P*Hkv*G, t, D)
        q = q.view(P, G, Hkv, R, D).transpose(1, 2).contiguous()
        to_prompt = q.view(P * Hkv, G * R, D) @ kp.mT                                # (P*Hkv, G*R, Lp)
        to_own = q.view(-1, R, D) @ k.mT                                             # (P*Hkv*G, R, t)
        scores = torch.cat([to_prompt.view(-1, R, Lp), to_own], -1).view(P, -1, Lp + t)
        if self.bias is None:
            hidden = torch.cat([~self.prompt_mask, self.to_come(t).expand(P, t)], 1)
            bias = torch.zeros_like(hidden, dtype=scores.dtype).masked_fill(hidden, -torch.inf)
            self.bias = bias[:, None]                                                # (P, 1, Lp+t)
        p = torch.add(self.bias, scores, alpha=scale).softmax(-1).to(v.dtype).view(-1, R, Lp + t)
        shared = p[..., :Lp].reshape(P * Hkv, G * R, Lp) @ vp                        # (P*Hkv, G*R, D)
        out = torch.baddbmm(shared.view(-1, R, D), p[..., Lp:], v)                   # (P*Hkv*G, R, D)
        return out.view(P, Hkv, G, R, D).transpose(1, 2).reshape(P * G, Hkv * R, 1, D)

    def to_come(self, t):
        """bool [t]: own columns that are not there yet."""
        return self.prompt_mask.new_zeros(t)

    def select(self, groups, slots, group):
        """Keep these groups of prompts and these slots, `group` to each -> the layout of those."""
        at = slots.view(-1, group) % self.group  # (groups kept, group): which of a group's slots
        self.prompt = [tuple(x[groups] for x in kv) for kv in self.prompt]
        self.own = [tuple(x[groups[:, None], :, at].transpose(1, 2).contiguous() for x in kv)
                    for kv in self.own]
        self.prompt_mask = self.prompt_mask[groups]
        self.position = self.position[slots]
        self.group = group
        return self


class StaticLayout(DecodeLayout):
    """A DecodeLayout of tensors that keep shape and address, from step to step and from rollout to
    rollout, as a CUDA graph needs.

    Prompts stand at the right of Lp columns. ids int64 [S] are the step's tokens and column int64 [1]
    is its number; the first `width` own columns are read, those still to come are masked. runs holds the
    prepared step of each width."""

    def __init__(self, prompts, group, length, columns, device):
        mask = torch.zeros(prompts, columns, dtype=torch.bool, device=device)
        super().__init__(mask, True, group, length)
        self.ids = torch.zeros_like(self.position)
        self.column = self.position.new_zeros(1)
        self.width = 0
        self.runs = {}

    def begin(self, prompt_mask, padded):
        """Another rollout; prompt_mask as DecodeLayout's, of at most as many columns."""
        self.step = None
        self.packed = PackedLayout(prompt_mask, padded, 0, 0)
        self.prompt_mask.zero_()[:, -prompt_mask.shape[1]:] = prompt_mask
        self.position.copy_(prompt_mask.sum(1).repeat_interleave(self.group))

    def keep_prompt(self, k, v, layer):
        # what is masked must still be finite: it is 0 in each rollout
        missing = self.prompt_mask.shape[1] - k.shape[2]
        k, v = (F.pad(x, (0, 0, missing, 0)) for x in (k, v))
        if layer == len(self.prompt):
            return super().keep_prompt(k, v, layer)
        for kept, x in zip(self.prompt[layer] + self.own[layer], (k, v, 0, 0)):
            kept[:] = x

    def add_own(self, new, layer):
        return tuple(own.index_copy_(3, self.column, x)[:, :, :, :self.width]
                     for own, x in zip(self.own[layer], new))

    def to_come(self, t):
        return torch.arange(t, device=self.column.device) > self.column

    def at(self, t):
        """Step t comes. The width doubles from time to time, so that a long token budget is not read
        before it is used."""
        self.step = 0
        self.column.fill_(t)
        self.width = min(self.length, max(WIDTH, 2 ** t.bit_length()))

    def select(self, groups, slots, into):
        """Copy these to a smaller StaticLayout, which lies in the same memory -> that."""
        P, G = len(into.prompt_mask), into.group
        at = slots.view(P, G) % self.group
        if not into.prompt:
            into.prompt = [tuple(first(x, P, *x.shape[1:]) for x in kv) for kv in self.prompt]
            into.own = [tuple(first(x, P, x.shape[1], G, *x.shape[3:]) for x in kv) for kv in self.own]
        for layer in range(len(self.prompt)):
            for x, kept in zip(self.prompt[layer], into.prompt[layer]):
                kept.copy_(x[groups])
            for x, kept in zip(self.own[layer], into.own[layer]):
                kept.copy_(x[groups[:, None], :, at].transpose(1, 2))
        into.prompt_mask.copy_(self.prompt_mask[groups])
        into.position.copy_(self.position[slots])
        into.packed = self.packed
        return into


def first(x, *shape):
    """The beginning of a contiguous tensor's memory, as a tensor of this shape."""
    return x.view(-1)[:math.prod(shape)].view(shape)


def rungs(prompts, group, length, columns, device):
    """StaticLayouts for a rollout and for what is left of it later: with half of each group, then again
    and again with half of the groups and half of each. Few, since each is captured."""
    layouts = [StaticLayout(prompts, group, length, columns, device)]
    while prompts * group > 16:
        if group == 1:
            prompts = -(-prompts // 4)
        elif len(layouts) > 1:
            prompts = -(-prompts // 2)
        group = -(-group // 2)
        layouts.append(StaticLayout(prompts, group, length, columns, device))
    return layouts


# What a model may tell its attention and a layout knows already. Anything else (a window, a soft cap, sinks)
# changes the attention.
KNOWN = {"position_ids", "use_cache", "cache", "past_key_values", "cache_position", "is_causal"}


def shared_attention(module, query, key, value, attention_mask, scaling=None, layout=None, **kwargs):
    """Attention function in transformers' AttentionInterface: output [batch, time, heads, D]. `layout`
    comes as a model kwarg. Raises ValueError for attention that is more than this."""
    other = [name for name, x in kwargs.items()
             if name not in KNOWN and x is not None and (isinstance(x, torch.Tensor) or x)]
    if other or layout is None:
        raise ValueError(f"its attention has {', '.join(other) or 'no way to know the layout'}")
    args = (query, key, value, scaling or query.shape[-1] ** -0.5)
    out = layout.attend(*args, module.layer_idx) if isinstance(layout, DecodeLayout) else layout.attend(*args)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("rest_shared", shared_attention)


# ---- the engine ----


WIDTH = 256       # own columns that a captured step reads at least
COLUMNS = 256     # prompts are padded to a multiple of this, for fewer shapes
MAX_SHAPES = 8    # rollouts of other shapes that captured steps are kept for
MAX_BYTES = 2**30  # that their keys and values may take


class SharedEngine(rest.Engine):
    """rest.Engine with each prompt forwarded and kept once per group.

    graph: on CUDA the decoding step is captured as a graph and replayed; compiled: torch.compile fuses
    its kernels. Both need a step of fixed shapes (StaticLayout), kept for rollouts to come, and are given
    up, with a warning, where they fail once. captures: how many steps were captured so far."""

    def __init__(self, model, graph=True, compiled=False):
        super().__init__(model)
        self.causal = inside(model)
        base = inspect.signature(self.causal.base_model.forward).parameters
        self.cache_name = "cache" if "cache" in base else "past_key_values"
        self.graph = graph and self.device.type == "cuda"
        self.compiled = compiled
        self.captures = 0
        self.kept = {}    # (P, G, T, Lp) -> rungs, the last used one last
        self.state = None  # the model's, when they were captured
        self.halves = {}  # linear layer -> its weight in bfloat16
        self.stream = self.pool = self.first = None  # of captures; the first graph

    @contextmanager
    def attention(self):
        """The model's attention is shared_attention inside, what it was before outside."""
        before = self.causal.config._attn_implementation
        self.causal.set_attn_implementation("rest_shared")
        try:
            yield
        finally:
            self.causal.set_attn_implementation(before)

    @contextmanager
    def sampling(self):
        with super().sampling(), self.attention(), self.cast_weights():
            yield

    @contextmanager
    def cast_weights(self):
        """Where graphs are kept and autocast would cast the weights, linear layers have theirs cast
        already, made anew here, where the last ones lay.

        Autocast remembers what it cast until its context ends: a kept graph would read old weights. So it
        does not here, and what else is cast is cast in the graph, at every step."""
        own = {}
        if self.graph and rest.autocasts(self.model):
            own = {m: m.weight for m in self.model.modules()
                   if type(m) is torch.nn.Linear and m.weight.dtype == torch.float32}
        remembers = torch.is_autocast_cache_enabled()
        try:
            if own:
                torch.set_autocast_cache_enabled(False)
            for m, weight in own.items():
                half = self.halves.get(m)
                if half is None or (half.shape, half.device) != (weight.shape, weight.device):
                    half = torch.nn.Parameter(weight.bfloat16(), requires_grad=False)
                m.weight = self.halves[m] = half
                half.copy_(weight)
            yield
        finally:
            torch.set_autocast_cache_enabled(remembers)
            for m, weight in own.items():
                m.weight = weight

    # decoding

    def prefill(self, prompts, group, max_tokens):
        ids, mask = rest.left_pad(prompts, self.device)                           # (P, Lp)
        if self.graph or self.compiled:
            self.rungs = self.keep(len(prompts), group, max_tokens, ids.shape[1])
            self.layout = self.rungs[0]
            self.layout.begin(mask, ragged(prompts))
        else:
            self.layout = DecodeLayout(mask, ragged(prompts), group, max_tokens)
        logits = self.forward(ids, (mask.cumsum(1) - 1).clamp(min=0))             # (P, V)
        return logits.repeat_interleave(group, 0)                                 # (S, V)

    def keep(self, prompts, group, length, columns):
        """The layouts of rollouts of this shape, with what was captured for them if the model is still
        what it was then. Those that were not used for longest make room."""
        if self.graph:
            columns = -(-columns // COLUMNS) * COLUMNS
        state = fingerprint(self.model)
        if state != self.state:
            self.state = state
            self.kept.clear()
        shape = (prompts, group, length, columns)
        found = self.kept.pop(shape, None)
        while self.kept and not found:
            layouts = [full for full, *_ in self.kept.values()]
            size = sum(x.nbytes for full in layouts for kv in (*full.prompt, *full.own) for x in kv)
            if len(layouts) < MAX_SHAPES and size <= MAX_BYTES:
                break
            del self.kept[next(iter(self.kept))]
        self.kept[shape] = found or rungs(*shape, self.device)
        return self.kept[shape]

    def forward(self, ids, position_ids):
        self.layout.bias = None  # the last step's
        hidden = self.causal.base_model(
            input_ids=ids, position_ids=position_ids, use_cache=True, layout=self.layout,
            **{self.cache_name: self.layout}).last_hidden_state
        return self.causal.get_output_embeddings()(hidden[:, -1])

    def step(self, ids, t):
        layout = self.layout
        if not isinstance(layout, StaticLayout):
            layout.step = t
            return self.forward(ids[:, None], layout.position[:, None] + t)
        layout.at(t)
        layout.ids.copy_(ids)
        while layout.width not in layout.runs:
            try:
                layout.runs[layout.width] = self.prepare()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # without the one, then without the other
                self.give_up(error)
        return layout.runs[layout.width]()

    def give_up(self, error):
        what = "compiled" if self.compiled else "graph"
        setattr(self, what, False)
        self.kept.clear()
        for layout in self.rungs:
            layout.runs.clear()
        log.warning("decoding without %s (slower, same results): %s",
                    "compilation" if what == "compiled" else "a CUDA graph", error)

    def static_step(self):
        """A step whose tensors all keep their shapes and addresses: what a graph can hold."""
        return self.forward(self.layout.ids[:, None], (self.layout.position + self.layout.column)[:, None])

    def work(self):
        return compiled_step()(self) if self.compiled else self.static_step()

    def prepare(self):
        """run() -> logits: the step of self.layout, at its width, compiled and captured. Raises RuntimeError
        if that fails, or differs from the eager step.

        A graph reads the layout's tensors and the model's where they lie now; its logits stand until the
        next replay of any."""
        expected = self.static_step()  # and a warm-up: libraries allocate
        run = self.work
        if self.graph:
            if self.compiled:
                self.work()
            replay, logits = self.record(self.work)
            self.captures += 1
            logits.zero_()  # if the graph were empty, nothing would come back

            def run():
                replay()
                return logits
        if (self.graph or self.compiled) and not close(run(), expected):
            raise RuntimeError("the prepared step differs from the eager one")
        return run

    def record(self, work):
        """(run, result): run() does what work() does, by a CUDA graph, and writes its result where it
        stands. The graphs of an engine are replayed one after the other, so that one memory pool serves
        all. What other threads do meanwhile, an abandoned tool's say, is no part of it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            self.stream = self.stream or torch.cuda.Stream()
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            options = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
            try:  # the first of the two contexts restores the stream
                with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, **options):
                    result = work()
            except BaseException:
                # an invalid capture leaves the allocator waiting for its end
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
                    torch._C._cuda_releasePool(torch.cuda.current_device(), self.pool)
                self.pool = self.first = None
                raise
        self.first = self.first or graph  # a pool ends with the last of its graphs
        return graph.replay, result

    def drop(self, done):
        """Takes out finished groups and narrows the others to the fullest one, where that makes the
        batch enough smaller; of static layouts, to the smallest that holds them."""
        G = self.layout.group
        groups = [done[a:a + G] for a in range(0, len(done), G)]
        count = sum(not all(group) for group in groups)
        width = max(group.count(False) for group in groups)
        into = width
        if isinstance(self.layout, StaticLayout):
            into = [x for x in self.rungs if len(x.prompt_mask) >= count and x.group >= width][-1]
            if into is self.layout:
                return None
            count, width = len(into.prompt_mask), into.group
        elif count * width > 0.75 * len(done):
            return None
        keep = sorted(range(len(groups)), key=lambda k: all(groups[k]))[:count]
        slots = []
        for k in keep:  # finished ones last; some stay where another group is fuller
            order = sorted(range(G), key=lambda s: groups[k][s])
            slots += [k * G + s for s in order[:width]]
        self.layout = self.layout.select(*(rest.to_device(x, self.device) for x in (keep, slots)), into)
        return slots

    # update

    def micro_batches(self, batch, groups, budget):
        """As rest.Engine's, but a group's completions stand behind one copy of their prompt: every list
        holds equally many completions, in a row, of each of its groups."""
        G = batch.group
        length = batch.length.tolist()
        longest = [max(length[p * G:p * G + G]) for p in range(len(batch.prompts))]
        prompt = [len(ids) for ids in batch.prompts]

        def tokens(part):  # part: [(prompt, how many completions)]
            count = part[0][1]
            return len(part) * (max(prompt[p] for p, _ in part) + count * max(longest[p] for p, _ in part))

        parts = []  # [([(prompt, count)], rows)]
        for p in sorted(groups, key=lambda p: (longest[p], prompt[p])):
            at_once = max((n for n in range(1, G + 1) if tokens([(p, n)]) <= budget), default=1)
            for first in range(0, G, at_once):
                new = (p, min(at_once, G - first))
                rows = [p * G + g for g in range(first, first + new[1])]
                if parts and parts[-1][0][0][1] == new[1] and tokens([*parts[-1][0], new]) <= budget:
                    parts[-1][0].append(new)
                    parts[-1][1].extend(rows)
                else:
                    parts.append(([new], rows))
        return [rows for _, rows in parts]

    def logps(self, batch, rows, temperature):
        """As rest.Engine's. rows: equally many of each group, a group's together (see micro_batches).
        One batch row per group, [prompt | its completions]; hidden states t-1 predict token t, the
        prompt's last one token 0."""
        groups = list(dict.fromkeys(row // batch.group for row in rows))
        P, n = len(groups), len(rows) // len(groups)
        T = max(batch.length[rows].tolist())
        completions = batch.tokens[rest.to_device(rows, self.device), :T].view(P, n * T)
        prompts = [batch.prompts[p] for p in groups]
        ids, mask = rest.left_pad(prompts, self.device)                                    # (P, Lp)
        Lp = ids.shape[1]
        before = (mask.cumsum(1) - 1).clamp(min=0)                                         # (P, Lp)
        layout = PackedLayout(mask, ragged(prompts), n, T)
        after = mask.sum(1, keepdim=True) + torch.arange(T, device=self.device)            # (P, T)
        with rest.autocast(self.model), self.attention():
            hidden = self.causal.base_model(
                input_ids=torch.cat([ids, completions], 1),
                position_ids=torch.cat([before, after.repeat(1, n)], 1),
                use_cache=False, layout=layout).last_hidden_state                          # (P, Lp+n*T, H)
            last = hidden[:, None, Lp - 1:Lp].expand(-1, n, -1, -1)                        # (P, n, 1, H)
            own = hidden[:, Lp:].unflatten(1, (n, T))[:, :, :-1]                           # (P, n, T-1, H)
            states = torch.cat([last, own], 2).flatten(0, 2)                               # (P*n*T, H)
            head = self.causal.get_output_embeddings()
            return head_logps(states, completions.flatten(), temperature, head).view(P * n, T)

    def backward(self, loss):
        with self.attention():  # gradient checkpointing forwards again in here
            loss.backward()


def head_logps(states, targets, temperature, head, chunk_elements=2**26):
    """rest.token_logps of hidden states [M, H] with their output layer. In chunks whose logits are made
    again in the backward pass, so that [M, V] floats never exist at once."""
    def logps(states, targets):
        return rest.token_logps(head(states), targets, temperature)

    size = max(1, chunk_elements // head.weight.shape[0])
    if len(states) <= size:
        return logps(states, targets)
    parts = zip(states.split(size), targets.split(size))
    return torch.cat([checkpoint(logps, *part, use_reentrant=False) for part in parts])


def close(a, b):
    """Whether logits or logps agree as well as their precision lets them: 1e-4 of the largest in
    float32, 5% in bfloat16."""
    exact = a.dtype == b.dtype == torch.float32 and not torch.is_autocast_enabled(a.device.type)
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = (x.nan_to_num(0.0, 0.0, 0.0) for x in (a, b))  # words that a model rules out have logit -inf
    return bool((a - b).abs().max() <= (1e-4 if exact else 5e-2) * b.abs().max())


def ragged(prompts):
    """Whether these id lists differ in length, so that some are padded."""
    return len(set(map(len, prompts))) > 1


def fingerprint(model):
    """What a captured step took for granted: where parameters and buffers lie, which modules there are,
    their hooks and their plain attributes, by which adapters are switched, say."""
    plain = (bool, int, float, str, list, tuple, dict)
    inner = ("_parameters", "_buffers", "_modules")
    state = [x.data_ptr() for x in (*model.parameters(), *model.buffers())]
    for module in model.modules():
        values = [(name, str(x)) for name, x in vars(module).items()
                  if isinstance(x, plain) and x and name not in inner]
        state.append((id(module), values))
    return state


@functools.cache
def compiled_step():
    # dynamic: prompts, rows and widths differ from rollout to rollout
    return torch.compile(SharedEngine.static_step, dynamic=True)


# ---- where it agrees ----

WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")


def why_refused(model):
    """Why not even rest.Engine is right for this model, or "".

    What a rollout records and what the update computes must be the model's own forward; that is tried
    on random ids, and what only long inputs would show is known by its name."""
    if not hasattr(model, "config"):
        return ""  # nothing is known of it
    for kind in rope_types(model.config.get_text_config()):
        if "dynamic" in kind or kind == "longrope":
            return (f"its rotary embedding ({kind}) depends on the length of the longest row, so that "
                    "log-probabilities would change while a row grows; use a model with another rope_type")
    batch = probe_batch(model)
    try:
        with torch.no_grad():  # in the mode that the update finds
            twice = [rest.Engine(model).logps(batch, [0, 1], 1.0) for _ in range(2)]
        if twice[0].isnan().any():
            return "its logits are not finite: its weights have diverged, or need --dtype float32"
        if not torch.equal(*twice):
            return "its forward is random (dropout, router noise): call model.eval()"
        wrong = distance(look(rest.Engine(model), batch), own_rows(model, batch), batch, model)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return f"it does not decode row by row with a cache like other causal models ({error!r})"
    if wrong > (1e-4 if exact(model) else 0.3):
        return ("its log-probabilities with left padding and a cache are not those of its own forward, "
                f"one row at a time (off by {wrong:.1e} of their size)")
    return ""


def why_not_shared(model):
    """Why the shared engine is not right for this model, or "": what it computes on random ids must be
    the model's own forward, too, and nothing may be there that these ids would not show."""
    causal = inside(model)
    if not getattr(causal, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    config = causal.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    windows = [name for name in WINDOWS if getattr(config, name, None)]
    if kinds - {"full_attention"}:
        return "not all of its layers have full attention"
    if windows and not kinds and getattr(config, "use_sliding_window", True):
        return f"its attention has a {windows[0]}"
    if own_head(model) is None:
        return "its logits are more than its output layer's (they are scaled or capped)"
    batch = probe_batch(model)
    try:
        truth = own_rows(model, batch)
        shared = distance(look(SharedEngine(model, graph=False), batch), truth, batch, model)
        plain = distance(look(rest.Engine(model), batch), truth, batch, model)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return str(error)
    # in bfloat16 the plain engine's own rounding says how far two ways of computing the same may differ
    limit = 1e-4 if exact(model) else 0.03 + 3 * plain
    return "" if shared <= limit else f"its log-probabilities differ (by {shared:.1e} of their size)"


FAILURES = (TypeError, AttributeError, LookupError, RuntimeError, ValueError, AssertionError)


def rope_types(config):
    """The names of its rotary embeddings, which may differ from layer to layer."""
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    ropes = [ropes, *ropes.values()]
    return {rope.get("rope_type") or rope.get("type") or "default"
            for rope in ropes if isinstance(rope, dict)}


def exact(model):
    return next(model.parameters()).dtype == torch.float32 and not rest.autocasts(model)


def probe_batch(model, lengths=(40, 3, 11)):
    """A Rollout of random ids: ragged prompts, completions that end at different times."""
    config = model.config.get_text_config()
    longest = (getattr(config, "max_position_embeddings", None) or 512) - 6
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, config.vocab_size, (min(n, longest),), generator=g).tolist() for n in lengths]
    tokens = torch.randint(0, config.vocab_size, (6, 6), generator=g)
    length = torch.tensor([6, 2, 2, 4, 2, 2])
    tokens = tokens.to(next(model.parameters()).device)
    return rest.Rollout([], prompts, 2, tokens, *[None] * 3, length, *[None] * 3)


def look(engine, batch):
    """What an engine makes of a batch: (logps [M] of the update, log-probabilities [M, V] of a rollout
    that is forced to these tokens), M tokens, one completion behind the other."""
    N, T = batch.tokens.shape
    length = batch.length.tolist()
    seen = [[] for _ in range(N)]
    with engine.sampling():
        logps = engine.logps(batch, list(range(N)), 1.0)
        slots = list(range(N))
        logits = engine.prefill(batch.prompts, batch.group, T)
        for t in range(T):
            for i, row in zip(slots, logits.float().log_softmax(-1)):
                if t < length[i]:
                    seen[i].append(row)
            done = [length[i] <= t + 1 for i in slots]
            if all(done):
                break
            kept = engine.drop(done)
            slots = slots if kept is None else [slots[s] for s in kept]
            logits = engine.step(batch.tokens[slots, t], t)
    return torch.cat([logps[i, :n] for i, n in enumerate(length)]), torch.stack(sum(seen, []))


def own_rows(model, batch):
    """The same of the model's own forward, one unpadded row at a time."""
    found = []
    with rest.Engine(model).sampling():
        for i, n in enumerate(batch.length.tolist()):
            ids = batch.prompts[i // batch.group] + batch.tokens[i, :n].tolist()
            logits = model(input_ids=torch.tensor([ids], device=batch.tokens.device), use_cache=False).logits
            found.append(logits[0, -n - 1:-1].float().log_softmax(-1))
    found = torch.cat(found)
    tokens = torch.cat([batch.tokens[i, :n] for i, n in enumerate(batch.length.tolist())])
    return found.gather(1, tokens[:, None])[:, 0], found


def distance(seen, truth, batch, model):
    """How far what an engine computes is from the truth, as a share of the size of log-probabilities.

    In float32 the largest difference. In bfloat16, where a router's choice may tip at single tokens,
    the median over the tokens of a completion, of the worst completion: windows, caps and padding are
    wrong at most of its tokens."""
    if not torch.equal(seen[1].isfinite(), truth[1].isfinite()):
        return float("inf")
    # words that a model rules out have -inf
    seen, truth = ([x.nan_to_num(0.0, 0.0, 0.0) for x in pair] for pair in (seen, truth))
    if exact(model):
        return max(float((a - b).abs().max() / truth[1].abs().max()) for a, b in zip(seen, truth))
    off = [(a - b).abs().view(len(a), -1).mean(1) / truth[1].std(1).mean() for a, b in zip(seen, truth)]
    return max(float(part.median()) for x in off for part in x.split(batch.length.tolist()))


def own_head(model):
    """The output layer, if the model's logits are what it makes of the hidden states and nothing else;
    else None. Tried with logits of about a thousand, where a soft cap shows."""
    causal = inside(model)
    try:
        head = causal.get_output_embeddings()
        with rest.Engine(model).sampling():
            ids = torch.arange(8, device=head.weight.device)[None]
            states = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
            logits = head(states).float()                                              # (1, 8, V)
            factor = 1000 / logits.abs().max()
            hook = head.register_forward_hook(lambda module, args, out: out * factor)
            try:
                own = model(input_ids=ids, use_cache=False).logits.float()
            finally:
                hook.remove()
    except FAILURES:
        return None
    off = (own - logits * factor).nan_to_num(0.0, 0.0, 0.0).abs().max()
    return head if off <= (0.5 if exact(model) else 10) else None
