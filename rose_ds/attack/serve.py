"""A trained classifier for programs that cannot import this package, such as an attack library in an environment of its
own: ``python -m rose_ds.attack.serve --model DIR``.

A line of standard input is a JSON list of texts, or of lists of two texts; for each there is a line of standard output:
a JSON list of logits a text, in the order of the task's labels, or {"error": "..."}. It ends where its input does.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from rose_ds.attack.classifier import Classifier
from rose_ds.attack.run import Predict


def serve(predict: Predict, lines: Iterable[str], replies: TextIO) -> None:
    """Answer lines, one by one. A line that cannot be answered is told so, and the next is read.

    Args:
        predict: texts -> logits (texts, classes).
    """
    for number, line in enumerate(lines, start=1):
        reply: Any
        try:
            rows = _texts_of(line)
            reply = predict(rows).tolist()
        except (ValueError, RecursionError) as error:
            reply = {"error": f"line {number}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _texts_of(line: str) -> list[tuple[str, ...]]:
    """Raises ValueError: not a list of texts, or of lists of so many texts each."""
    content: Any = json.loads(line)
    rows: list[Any] = (
        [[row] if isinstance(row, str) else row for row in content] if isinstance(content, list) else [None]
    )
    for row in rows:
        if not isinstance(row, list) or len(row) not in (1, 2) or not all(isinstance(text, str) for text in row):
            raise ValueError("expected a JSON list of texts, or of lists of two texts")
        "".join(row).encode()  # half of a surrogate pair is no text
    if len({len(row) for row in rows}) > 1:
        raise ValueError("one and two texts in one list")
    return [tuple(row) for row in rows]


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; exits with 2 and one line where the model cannot be loaded."""
    parser = argparse.ArgumentParser(
        prog="python -m rose_ds.attack.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="A folder that rose-ds train wrote, or any classifier.")
    parser.add_argument("--max_length", type=int, help="Cut texts to so many tokens. Default: as in the model's run.")
    parser.add_argument("--batch_size", type=int, default=64, help="Texts that the model is given at a time.")
    options = parser.parse_args(arguments)
    # what a library prints must not stand between the replies
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        model = Classifier(options.model, max_length=options.max_length, batch_size=options.batch_size)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    with replies:
        serve(model.predict, io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", errors="surrogateescape"), replies)


if __name__ == "__main__":
    main()
