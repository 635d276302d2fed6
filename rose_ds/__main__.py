"""``python -m rose_ds`` is ``rose-ds``."""

from rose_ds.cli import program

if __name__ == "__main__":
    program()
