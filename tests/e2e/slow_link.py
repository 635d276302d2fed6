"""A slow cable between two network namespaces: delay, loss and a limited rate, for kernels without netem too.

    slow_link.py NAMESPACE NAMESPACE INTERFACE DELAY_MS LOSS RATE_MBIT

Makes a TAP interface in each and carries frames between them until it is killed. Prints a line when both are there.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import selectors
import struct
import sys
import time
from collections import deque
from pathlib import Path

_NEWNET = 0x40000000
_TUNSETIFF, _TAP, _NO_PI = 0x400454CA, 0x0002, 0x1000
_FRAME = 65536
_QUEUE = 1000  # frames on their way in a direction, as netem's; more are lost


def tap(namespace: str, interface: str) -> int:
    """A new TAP interface in a namespace: the descriptor that its frames are read from and written to."""
    libc = ctypes.CDLL(None, use_errno=True)
    inside = os.open(Path("/var/run/netns") / namespace, os.O_RDONLY)
    if libc.setns(inside, _NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"cannot enter network namespace {namespace}")
    os.close(inside)
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", interface.encode(), _TAP | _NO_PI))
    return descriptor


class Direction:
    """Frames from one end to the other."""

    def __init__(self, source: int, target: int, delay: float, loss: float, rate: float, seed: int) -> None:
        self.source, self.target = source, target
        self.delay, self.loss, self.rate = delay, loss, rate
        """Seconds, a fraction of frames, bytes a second."""
        self.random = random.Random(seed)
        self.free_at = 0.0
        """When the last frame has left."""
        self.frames: deque[tuple[float, bytes]] = deque()
        """With the time each arrives at."""

    def read(self) -> None:
        now = time.monotonic()
        for _ in range(64):
            try:
                frame = os.read(self.source, _FRAME)
            except OSError:  # nothing more, or the interface is down
                return
            if self.random.random() < self.loss or len(self.frames) >= _QUEUE:
                continue
            self.free_at = max(now, self.free_at) + len(frame) / self.rate
            self.frames.append((self.free_at + self.delay, frame))

    def write(self) -> float | None:
        """Deliver what has arrived; seconds until the next frame does."""
        now = time.monotonic()
        while self.frames and self.frames[0][0] <= now:
            _, frame = self.frames.popleft()
            try:
                os.write(self.target, frame)
            except OSError:  # the interface is down: a cut cable loses frames
                continue
        return self.frames[0][0] - now if self.frames else None


def carry(one: int, other: int, delay: float, loss: float, rate: float) -> None:
    directions = [Direction(one, other, delay, loss, rate, 1), Direction(other, one, delay, loss, rate, 2)]
    selector = selectors.DefaultSelector()
    for direction in directions:
        selector.register(direction.source, selectors.EVENT_READ, direction)
    while True:
        waits = [wait for direction in directions if (wait := direction.write()) is not None]
        for key, _ in selector.select(max(0.0, min(waits)) if waits else None):
            key.data.read()


if __name__ == "__main__":
    first, second, name, *numbers = sys.argv[1:]
    delay_ms, lost, mbit = map(float, numbers)
    ends = tap(first, name), tap(second, name)
    print("ready", flush=True)
    carry(*ends, delay_ms / 1e3, lost, mbit * 1e6 / 8)
