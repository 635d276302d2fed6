"""``rose-ds train`` as a script, for launchers: deepspeed launch/train.py ..., torchrun launch/train.py ..."""

import sys

from rose_ds.cli import program

if __name__ == "__main__":
    program(["train", *sys.argv[1:]])
