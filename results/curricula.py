"""Two more weightings of the study, as a fork would add them:
`python results/curricula.py --method rest-by-entropy`.

rest-by-entropy  ResT whose curriculum follows the entropy of format instead of the clock: it stands at its
                 beginning while that is START nats or more, at its end when nothing is left of it
signal-first     the best weights that toy_tools.signal found at the start of the study's long structural
                 phase, until format has LEARNED nats left; GRPO from then on
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import rest
import train_small

START = 0.1
LEARNED = 0.03
BEST = [2.50, 2.50, 0.15, 0.06, 0.60, 0.11]  # in the order of rest.REGIONS; results/signal-broken.csv


def rest_by_entropy(batch, cfg, progress):
    left = rest.region_entropy(batch)[rest.TAG] / START
    progress = 1 - left.clamp(max=1.0)
    return rest.rest_weights(batch, cfg, progress)


def signal_first(batch, cfg, progress):
    if rest.region_entropy(batch)[rest.TAG] < LEARNED:
        return rest.uniform(batch, cfg, progress)
    weight = torch.tensor(BEST, device=batch.region.device)
    return rest.normalise_weights(weight[batch.region], batch.sampled)


rest.WEIGHTS |= {"rest-by-entropy": rest_by_entropy, "signal-first": signal_first}

if __name__ == "__main__":
    train_small.main()
