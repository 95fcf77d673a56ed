"""A process that has loaded torch and starts training runs by forking, so that a run costs half a second, not five.

Each run is a process of its own that can be killed. `python -m tests.forge` reads a JSON object a line, {"argv", "env",
"output"}, and answers with a pid; {"wait": pid} is answered with the exit status (minus the signal that ended it).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def serve() -> None:
    """Answer until stdin ends. One thread only: a fork copies no others."""
    import matplotlib.figure  # noqa: F401
    import torch

    from vibechat.programs import base_loss, train
    from vibechat.train_step import use_deterministic_algorithms
    from vibechat.trainer import peak_rate

    # What takes seconds and is the same for all is done once: loading Inductor, and the matmul rate.
    use_deterministic_algorithms()
    peak_rate(torch.device("cpu"))
    programs = {"train": train.main, "base_loss": base_loss.main}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            status = os.waitpid(request["wait"], 0)[1]
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(request["env"])
            code = 1
            try:
                code = programs[request["program"]](request["argv"])
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)


class Forge:
    """The other side of `serve`."""

    def __init__(self) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "VIBECHAT_DTYPE": "float32", "TERM": "xterm", "COLUMNS": "150"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forge"],
            cwd=Path(__file__).parent.parent,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, program: str, argv: list[str], output: Path, **env: str) -> int:
        """Begin a run; its stdout and stderr are appended to `output`. Returns its pid."""
        return self._ask({"program": program, "argv": argv, "env": env, "output": str(output)})

    def wait(self, pid: int) -> int:
        """The exit status of a run, once it has ended; minus the signal if one ended it."""
        return self._ask({"wait": pid})

    def close(self) -> None:
        """End the forge."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


if __name__ == "__main__":
    serve()
