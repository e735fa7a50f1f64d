"""Predict the labels of many texts on several processes.

    torchrun --nproc_per_node 4 recipes/predict.py runs/demo/model --file texts.txt --output answers.jsonl --resume
    accelerate launch --multi_gpu --num_processes 4 recipes/predict.py runs/demo/model --data org/texts --split test \
        --text title,abstract --output answers.jsonl --resume

This is `hf-xmc predict` for a launcher, with the same options. Each process answers every fourth block of 1024 texts,
and the first one writes all answers to one file, in the order of the texts. After an interruption, the same command
continues, also with another number of processes. On a CPU use `torchrun`: there, `accelerate launch --num_processes 4`
starts one process, which is refused.
"""

import sys

from hf_xmc.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
