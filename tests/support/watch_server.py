"""The server of tools.watch, in a thread of the test's process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.watching.server import Watching


@contextmanager
def serving(folder: Path) -> Iterator[Watching]:
    """The page of a folder, served meanwhile."""
    with Watching(folder, 0) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield served
        finally:
            served.shutdown()
            thread.join()
