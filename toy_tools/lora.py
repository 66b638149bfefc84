"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft, an optional package: they alone are trained and
saved."""

import json
from pathlib import Path

CONFIG = "adapter_config.json"


def _peft():
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"adapters need an optional package: pip install peft ({error})") from error
    return peft


def read_config(folder):
    """The settings of the adapter in a folder, {} if there is none."""
    file = Path(folder) / CONFIG
    return json.loads(file.read_text()) if file.is_file() else {}


def add(model, rank):
    """The model with new adapters at all linear layers but the output layer; they begin as zero, all
    else is frozen. Their updates count 2 (alpha/rank), whatever the rank; they take about ten times the
    learning rate."""
    peft = _peft()
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def load(model, folder, rank=0):
    """The model with the adapter of a folder, to be trained on. Raises ValueError if it has not that rank."""
    found = read_config(folder).get("r")
    if rank and found != rank:
        raise ValueError(f"the adapter in {folder} has rank {found}, not {rank}: "
                         "leave --lora-rank out or give its own")
    return _peft().PeftModel.from_pretrained(model, folder, is_trainable=True)
