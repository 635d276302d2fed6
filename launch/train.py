"""``rose-ds train`` as a script, for launchers: deepspeed launch/train.py ..., torchrun launch/train.py ..."""

import sys

from rose_ds.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
