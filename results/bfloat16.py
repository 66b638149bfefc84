"""train_small.py, or with `signal` first toy_tools.signal, on a CPU as on a GPU: float32 weights that
compute in bfloat16. Pays on CPUs with AVX512-BF16 or AMX, from some 100M parameters on.

    python results/bfloat16.py --model runs/start --steps 16
    python results/bfloat16.py signal runs/start
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import rest
import train_small
from toy_tools import signal

rest.autocasts = lambda model: next(model.parameters()).dtype == torch.float32
rest.autocast = lambda model: torch.autocast("cpu", torch.bfloat16)

if __name__ == "__main__":
    if sys.argv[1:2] == ["signal"]:
        signal.main(sys.argv[2:])
    else:
        train_small.main()
