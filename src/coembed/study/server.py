"""The process behind a study: it imports and loads once, then forks one child per task.

Spoken to over its standard input and output, one JSON object a line.

    in   {"executor", "source"}                              once, first
         {"task"}                                            run it
         {"kill": key}                                       end it
    out  {"event": "ready"} or {"event": "failed", "message"}
         {"event": "started", "key", "pid"}
         {"event": "ended", "key", "code", "cpu_s", "peak_memory_mb"}

`code` is the exit code, or minus the signal. A child writes its own row. With `--once` a process
runs one task, read from standard input, by itself: the way where there is no fork.

Everyone dies with the study, even one ended by kill -9: the server and its children ask the
kernel for it (Linux), the server ends when its input does, and a child ends when a pipe whose
other end only the server holds is closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

from coembed.errors import OutputError
from coembed.study.plan import Task
from coembed.study.task import EXIT_OUTPUT, Executor, Source, maxrss_mb, perform

_POLL_S = 0.03


def open_study(opening: Mapping[str, Any]) -> tuple[Executor, Source]:
    """Return the executor named "module:function" and its source, when all is loaded."""
    name, _, function = opening["executor"].partition(":")
    module = importlib.import_module(name)
    source = Source(**opening["source"])
    if hasattr(module, "preload"):
        module.preload(source)
    return getattr(module, function), source


def run_task(task: Task, source: Source, executor: Executor) -> int:
    """Run a task to its row in the ledger and return the exit code of its process."""
    try:
        log = os.open(source.ledger.log(task.key), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable(2)
        source.ledger.write(perform(task, source, executor))
    except (OutputError, OSError):  # the executor's own are in the row
        traceback.print_exc()
        return EXIT_OUTPUT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def die_with(parent: int) -> None:
    """End this process when `parent` ends, where the kernel offers it (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


class Server:
    """The loop: reads requests, forks, reaps."""

    def __init__(self) -> None:
        # What a library prints must not get between the messages: it goes to the log instead.
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.alive, self.life = os.pipe()
        self.children: dict[int, str] = {}
        self.buffer = b""

    def say(self, event: str, **content: Any) -> None:
        """Send one message."""
        self.out.write(json.dumps({"event": event, **content}) + "\n")
        self.out.flush()

    def listen(self, timeout: float | None) -> list[dict[str, Any]]:
        """Return the messages that came within `timeout` seconds. Raises EOFError at the end."""
        if not select.select([0], [], [], timeout)[0]:
            return []
        content = os.read(0, 1 << 16)
        if not content:
            raise EOFError
        *lines, self.buffer = (self.buffer + content).split(b"\n")
        return [json.loads(line) for line in lines]

    def serve(self) -> None:
        """Serve until the input ends, then end the children."""
        messages: list[dict[str, Any]] = []
        while not messages:
            messages = self.listen(None)
        opening, *messages = messages
        try:
            executor, source = open_study(opening)
        except Exception as error:
            traceback.print_exc()
            self.say("failed", kind=type(error).__name__, message=str(error))
            return
        # Keep the collector from touching, and so copying, what the children share.
        gc.collect()
        gc.freeze()
        self.say("ready")
        try:
            while True:
                for message in messages:
                    if "kill" in message:
                        self.kill(message["kill"])
                    else:
                        self.fork(Task.from_dict(message["task"]), source, executor)
                self.reap()
                messages = self.listen(_POLL_S if self.children else None)
        except EOFError:
            for pid in self.children:
                os.kill(pid, signal.SIGKILL)
            for pid in self.children:
                os.waitpid(pid, 0)

    def fork(self, task: Task, source: Source, executor: Executor) -> None:
        """Start a task in a child."""
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            self.become_child(server, task, source, executor)
        self.children[pid] = task.key
        self.say("started", key=task.key, pid=pid)

    def become_child(self, server: int, task: Task, source: Source, executor: Executor) -> NoReturn:
        """Run the task in this forked process and leave, whatever happens."""
        code = 1
        try:
            die_with(server)
            os.close(self.life)
            os.close(self.out.fileno())
            os.close(0)
            os.open(os.devnull, os.O_RDONLY)
            threading.Thread(target=_leave_at_end_of, args=(self.alive,), daemon=True).start()
            code = run_task(task, source, executor)
        finally:
            os._exit(code)

    def kill(self, key: str) -> None:
        """End a task's child, if it still runs."""
        for pid, running in self.children.items():
            if running == key:
                os.kill(pid, signal.SIGKILL)

    def reap(self) -> None:
        """Report the children that ended."""
        for pid in list(self.children):
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                self.say(
                    "ended",
                    key=self.children.pop(pid),
                    code=os.waitstatus_to_exitcode(status),
                    peak_memory_mb=maxrss_mb(usage.ru_maxrss),
                )


def _leave_at_end_of(pipe: int) -> None:
    with contextlib.suppress(OSError):
        os.read(pipe, 1)
    os._exit(1)


def once(request: Mapping[str, Any]) -> int:
    """Run the one task of `request`, which has "executor", "source" and "task"."""
    executor, source = open_study(request)
    return run_task(Task.from_dict(request["task"]), source, executor)


if __name__ == "__main__":
    die_with(os.getppid())
    if sys.argv[1:] == ["--once"]:
        sys.exit(once(json.loads(sys.stdin.readline())))
    Server().serve()
