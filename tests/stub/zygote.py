"""A process that has imported torch but never touched CUDA, and forks one of its kind for each function it is to call.

A fork takes milliseconds, importing torch takes seconds, and each function needs a process of its own: what a process
first sees of the driver, it sees for ever.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS = 30  # a function that takes longer hangs


class Zygote:
    """Calls functions of one module, each in a process of its own that looks for shared libraries in ``libraries``."""

    def __init__(self, module: str, libraries: Path, **environment: str) -> None:
        self.libraries = libraries
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "LD_LIBRARY_PATH": str(libraries), **environment}
        command = [sys.executable, "-m", "tests.stub.zygote", module]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def call(self, function: Callable[..., Any], *arguments: Any, **environment: str) -> Any:
        """What the function returns, through JSON; what it raises is an AssertionError here."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([function.__name__, arguments, environment]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"error": "the zygote has died"}')
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def close(self) -> None:
        self.process.communicate()


def in_a_fork(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What the function returned (``value``) or raised (``error``) in a fork of this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)
        try:
            answer = {"value": function(*arguments)}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        with os.fdopen(writer, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text or json.dumps({"error": f"hung, or crashed: it ended with status {status}"}))


def main(module: str) -> None:
    importlib.import_module("torch")
    before = set(sys.modules)
    functions = importlib.import_module(module)
    os.environ["LOADED_AFTER_TORCH"] = " ".join(sorted(set(sys.modules) - before))
    # Only answers come out here, whatever a function prints.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        name, arguments, environment = json.loads(line)

        def function(name: str = name, arguments: Any = arguments, environment: Any = environment) -> Any:
            os.environ.update(environment)
            return getattr(functions, name)(*arguments)

        print(json.dumps(in_a_fork(function)), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
