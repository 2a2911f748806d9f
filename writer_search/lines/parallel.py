"""Works on many line images in several threads."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from PIL import Image

from writer_search.common.cores import usable_cores

AHEAD = 1024  # results that wait to be taken: 100 MB of decoded lines at 96 px

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Iterator[Result]]:
    """Give an iterator over the results of work on items, done in a thread on each core.

    No result is begun that is far from being taken: where that is slow, they would fill the memory.
    What is not begun when an error or a signal ends the `with` block is left undone.
    """
    pool = ThreadPoolExecutor(usable_cores())

    def results() -> Iterator[Result]:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    with warnings.catch_warnings():  # they are the process's, not a thread's
        # `decode_line` refuses what is too large.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            yield results()
        finally:
            pool.shutdown(cancel_futures=True)
