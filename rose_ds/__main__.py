"""``python -m rose_ds`` is ``rose-ds``."""

from rose_ds.cli import main

if __name__ == "__main__":
    main()
