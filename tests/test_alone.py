"""rest.py is one file: alone in a folder, under another name, it trains a model of somebody else's."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = '''
import importlib.util
import sys
from types import SimpleNamespace

sys.path.insert(0, FOLDER)
import torch

before = set(sys.modules)
import my_rest

new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert new - sys.stdlib_module_names <= {"my_rest", "torch"}, new
assert "transformers" not in sys.modules
for name in ("rest", "toy_tools", "train_small"):
    assert importlib.util.find_spec(name) is None, name

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# words that a random policy puts together now rightly and now wrongly
call = '<tool_call>{"name":"add","arguments":{"a":%d,"b":2}}</tool_call>'
words = ["<unk>", "<|im_end|>", "user", "assistant", "tool", "1+2?", "3", "4", call % 1, call % 2,
         "<think>hm</think>", "<response>3</response>"]
core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
core.decoder = decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<|im_end|>")
tokenizer.chat_template = ("{% for m in messages %}{{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
                           "assistant ")

torch.manual_seed(0)
model = Qwen3ForCausalLM(Qwen3Config(
    vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8))
parameters = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
tool = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": parameters}}
gold = [[{"name": "add", "arguments": {"a": 1, "b": 2}}]]
row = {"messages": [{"role": "user", "content": "1+2?"}], "tools": [tool], "gold": gold}
box = SimpleNamespace(functions={"add": lambda a, b: a + b})

cfg = my_rest.Config(steps=2, prompts=2, group=8, max_turns=2, max_completion_tokens=12)
engine, chat = my_rest.Engine(model), my_rest.Chat(tokenizer)
optimizer = torch.optim.AdamW(model.parameters())
answered = 0
for step in range(cfg.steps):
    old = torch.cat([p.detach().flatten() for p in model.parameters()])
    metrics, batch, weight = my_rest.train_step(
        engine, chat, optimizer, [row] * 2, cfg, step, toolbox_for=lambda row: box)
    new = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert metrics["grad_norm"] > 0 and metrics["skipped_updates"] == 0
    assert new.isfinite().all() and not torch.equal(old, new)
    assert len(batch.texts) == 16 and (weight[batch.sampled] > 0).all()
    answered += sum(len(turns) > 1 for turns in batch.turns)
    assert "toy_tools" not in sys.modules and "rest" not in sys.modules
assert answered  # calls were run, and their results read
print("trained", step + 1, "steps")
'''


def test_the_file_alone_trains(tmp_path):
    """Copied into an empty folder, in a process that finds nothing else of the project (-I: neither
    PYTHONPATH nor the working directory is looked at). Importing it brings in torch and the standard
    library only; two live steps on rewards that differ move the weights."""
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(ROOT / "rest.py", folder / "my_rest.py")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("FOLDER", repr(str(folder))))
    done = subprocess.run([sys.executable, "-I", str(script)], cwd=folder, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["trained", "2", "steps"]
