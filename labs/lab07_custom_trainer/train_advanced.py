"""`train.py` with everything on: asymmetric loss, class weights, FGM, masked words, and a head with many dropout masks.

python labs/lab07_custom_trainer/train_advanced.py labs/lab07_custom_trainer/configs/base.yaml
deepspeed --num_gpus 2 labs/lab07_custom_trainer/train_advanced.py labs/lab07_custom_trainer/configs/zero2.yaml --fgm 0.5
"""

from __future__ import annotations

import sys

from shardlab.run.experiment import module_of

ADVANCED = {"loss": "asymmetric", "fgm": 0.2, "augment": 0.1, "class_weights": True, "samples": 5, "lora": 0}
"""Options of the program of `train.py`, and their defaults here; 0 switches a number off. LoRA freezes what FGM moves: --fgm 0."""


if __name__ == "__main__":
    sys.exit(module_of("labs/lab07_custom_trainer/train.py").main(sys.argv[1:], ADVANCED))
