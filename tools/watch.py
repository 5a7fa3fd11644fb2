"""Show the runs of a folder on a page that keeps up with them: status, curves, depth, and in what they differ.

    python -m tools.watch                             all below runs/, at http://127.0.0.1:8765
    python -m tools.watch runs/moe_spannorm port=0    a port that is free
    ssh -L 8765:127.0.0.1:8765 MACHINE                from elsewhere: then the same address there

Reads only, and answers this machine alone. Ctrl-C ends it. docs/monitoring.md has a picture.
"""

from dataclasses import dataclass, field
from pathlib import Path

from core import cli
from core.dataclass_cli import FIRST
from core.errors import ConfigError, one_line, require
from core.printable import printable


@dataclass(frozen=True)
class WatchConfig:
    """Holds the fields that `python -m tools.watch` takes.

    Attributes:
        folder: the folder to look in.
        port: of 127.0.0.1, where the page is; 0: any that is free.
    """

    folder: Path = field(default=Path("runs"), metadata=FIRST)
    port: int = 8765


@cli.tool
def main(config: WatchConfig) -> None:
    from tools.watching.server import Watching

    require(config.folder.is_dir(), "FOLDER", str(config.folder), "a folder with runs")
    require(0 <= config.port < 2**16, "port", config.port, "an integer in [0, 65536)")
    try:
        server = Watching(config.folder, config.port)
    except OSError as error:
        raise ConfigError(
            "port", config.port, f"a port that can be had ({one_line(error)}); port=0 finds one"
        ) from error
    with server:
        print(f"{printable(config.folder)}: http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    cli.run(main)
