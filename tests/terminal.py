"""A pseudo-terminal that is read all the while, as a real one is: a full one would block whoever writes to it."""

import os
import threading

import pytest


class Terminal:
    """`slave` is what a program writes to, `name` its path; `text` is all that was written."""

    def __init__(self) -> None:
        pty = pytest.importorskip("pty")
        self._master, self.slave = pty.openpty()
        self.name = os.ttyname(self.slave)
        self._pieces: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while piece := os.read(self._master, 1 << 16):
                self._pieces.append(piece)
        except OSError:  # how Linux says that the last writer is gone
            pass

    def text(self) -> str:
        """Close it, and say what was shown. Whoever else has it open must have closed it."""
        os.close(self.slave)
        self._reader.join()
        os.close(self._master)
        return b"".join(self._pieces).decode()
