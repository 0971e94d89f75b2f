"""Run a plan: each task in a process of its own, watched, its row in the ledger."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from coembed.data.cells import Cells
from coembed.errors import OutputError, StudyError
from coembed.study.ledger import Ledger, new_row
from coembed.study.plan import Plan, Task
from coembed.study.task import EXIT_OUTPUT, Source

EXECUTOR = "coembed.study.task:execute"

_POLL_S = 0.1
_SERVER_DEATHS = 3


@dataclass(frozen=True)
class Progress:
    """Told at the start and after every task.

    Attributes:
        task: the one that ended; None at the start.
        row: its row.
        left: the tasks that are left.
        total: how many tasks the plan has.
    """

    task: Task | None
    row: Mapping[str, Any] | None
    left: tuple[Task, ...]
    total: int


def run(
    plan: Plan,
    cells: Cells,
    folder: Path | str,
    *,
    workers: int | None = None,
    retry_errors: bool = False,
    progress: Callable[[Progress], None] | None = None,
    executor: str = EXECUTOR,
) -> Ledger:
    """Run what the ledger in `folder` does not hold yet; the same call resumes a stopped study.

    Args:
        plan: what to run.
        cells: its data.
        folder: the ledger's; made if missing, extended if it holds a part of the study.
        workers: tasks at a time; by default the processors divided by the threads per task, and
            one on a GPU.
        retry_errors: run tasks again that ended with an error.
        progress: called at the start and after each task.
        executor: "module:function" that runs a task (`coembed.study.task.Executor`). If the
            module has a `preload(source)`, it is called once before the first task.

    Raises:
        StudyError: other data or settings, a folder in use, or workers that cannot start.
        ParameterError: a model, preset or parameter that does not exist.
        OutputError: results cannot be written.
        KeyboardInterrupt: stopped; unfinished tasks have no row and run at the next call.
    """
    tasks = plan.tasks(cells)
    ledger = Ledger(Path(folder).resolve())
    if workers is None:
        workers = max(1, _processors() // plan.threads) if plan.device == "cpu" else 1
    if workers < 1:
        raise StudyError(f"workers is {workers}", remedy="It must be at least 1")
    with ledger.locked():
        ledger.begin(plan, cells, tasks)
        pending = ledger.pending(tasks, retry_errors=retry_errors)
        source = Source(plan.source, plan.read, plan.fingerprint, plan.models, str(ledger.folder))
        supervisor = _Supervisor(plan, ledger, source, executor, workers, pending)
        report = progress or (lambda _: None)
        report(Progress(None, None, tuple(pending), len(tasks)))
        try:
            with contextlib.closing(supervisor.finished()) as finished:
                for task, row in finished:
                    report(Progress(task, row, supervisor.left, len(tasks)))
        except KeyboardInterrupt:
            done = len(tasks) - len(supervisor.left)
            raise KeyboardInterrupt(
                f"Stopped with {done} of {len(tasks)} tasks done. Run the same command to go on."
            ) from None
    return ledger


class _Host(Protocol):
    """Where tasks run: a fork server, or a new process for each."""

    def start(self, task: Task) -> None: ...

    def kill(self, key: str) -> None: ...

    def events(self, timeout: float) -> list[dict[str, Any]]:
        """Return what `coembed.study.server` says; raise EOFError when the host died."""

    def close(self) -> None:
        """End it and every task."""


class _ForkServer:
    """A `coembed.study.server` process."""

    def __init__(self, executor: str, source: Source, log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "coembed.study.server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=_environment(),
                # Ctrl-C in the terminal is for the study, which then ends its workers.
                start_new_session=True,
            )
        self.buffer = b""
        self.ready = False
        try:
            self._send({"executor": executor, "source": asdict(source)})
        except BaseException:
            self.close()
            raise

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        # A server that died is noticed at its end of output.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def start(self, task: Task) -> None:
        self._send({"task": task.to_dict()})

    def kill(self, key: str) -> None:
        self._send({"kill": key})

    def events(self, timeout: float) -> list[dict[str, Any]]:
        assert self.process.stdout is not None
        stream = self.process.stdout.fileno()
        if not select.select([stream], [], [], timeout)[0]:
            return []
        content = os.read(stream, 1 << 16)
        if not content:
            raise EOFError
        *lines, self.buffer = (self.buffer + content).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()


class _Spawner:
    """A new process for each task, where there is no fork."""

    def __init__(self, executor: str, source: Source, log: Path) -> None:
        self.request = {"executor": executor, "source": asdict(source)}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.said: list[dict[str, Any]] = [{"event": "ready"}]

    def start(self, task: Task) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "coembed.study.server", "--once"],
            stdin=subprocess.PIPE,
            env=_environment(),
        )
        self.running[task.key] = process
        self.said.append({"event": "started", "key": task.key, "pid": process.pid})
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stream:
            stream.write(json.dumps({**self.request, "task": task.to_dict()}).encode() + b"\n")

    def kill(self, key: str) -> None:
        if key in self.running:
            self.running[key].kill()

    def events(self, timeout: float) -> list[dict[str, Any]]:
        if not self.said:
            time.sleep(timeout)
        for key, process in list(self.running.items()):
            if (code := process.poll()) is not None:
                del self.running[key]
                self.said.append({"event": "ended", "key": key, "code": code})
        said, self.said = self.said, []
        return said

    def close(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()


@dataclass
class _Running:
    """A task in its process."""

    task: Task
    started: float
    pid: int | None = None
    verdict: tuple[str, str] | None = None
    """Status and message, where we ended the task ourselves."""


class _Supervisor:
    """Feeds the host, enforces the limits and turns every end into a row."""

    def __init__(
        self,
        plan: Plan,
        ledger: Ledger,
        source: Source,
        executor: str,
        workers: int,
        pending: list[Task],
    ) -> None:
        self.plan, self.ledger, self.workers = plan, ledger, workers
        self.source, self.executor = source, executor
        self.waiting = deque(pending)
        self.running: dict[str, _Running] = {}
        self.kills = oom_kills()

    @property
    def left(self) -> tuple[Task, ...]:
        """The tasks without a row yet."""
        return (*(one.task for one in self.running.values()), *self.waiting)

    def finished(self) -> Generator[tuple[Task, dict[str, Any]], None, None]:
        """Run everything; yield each task with its row as it ends."""
        deaths = 0
        while self.waiting or self.running:
            host = self._host()
            try:
                for ended in self._feed(host):
                    deaths = 0
                    yield ended
            except EOFError:
                deaths += 1
                if deaths == _SERVER_DEATHS:
                    raise StudyError(
                        f"the workers' server died {deaths} times in a row",
                        where=str(self.ledger.log("server")),
                        remedy="Read this log; fewer workers need less memory",
                    ) from None
                for key in list(self.running):
                    yield self._end(key, {"code": -signal.SIGKILL}, "the workers' server died")
            finally:
                host.close()

    def _host(self) -> _Host:
        kind = _ForkServer if hasattr(os, "fork") else _Spawner
        return kind(self.executor, self.source, self.ledger.log("server"))

    def _feed(self, host: _Host) -> Iterator[tuple[Task, dict[str, Any]]]:
        ready = False
        while self.waiting or self.running:
            while ready and self.waiting and len(self.running) < self.workers:
                task = self.waiting.popleft()
                self.ledger.discard(task.key)
                self.running[task.key] = _Running(task, time.monotonic())
                host.start(task)
            for event in host.events(_POLL_S):
                if event["event"] == "ready":
                    ready = True
                elif event["event"] == "failed":
                    raise StudyError(
                        f"the workers cannot start: {event['message']}",
                        remedy=f"The log is {self.ledger.log('server')}",
                    )
                elif event["event"] == "started":
                    self.running[event["key"]].pid = event["pid"]
                else:
                    yield self._end(event["key"], event)
            self._enforce(host)

    def _enforce(self, host: _Host) -> None:
        """End the tasks that are over their limits."""
        for key, one in self.running.items():
            if one.verdict is None and (verdict := self._over(one)):
                one.verdict = verdict
                host.kill(key)

    def _over(self, one: _Running) -> tuple[str, str] | None:
        timeout, memory = self.plan.timeout, self.plan.memory_mb
        if timeout is not None and time.monotonic() - one.started > timeout:
            return "timeout", f"not done after {timeout:g} s; give it more time, or fewer cells"
        if memory is not None and one.pid is not None and (used := _resident_mb(one.pid)) > memory:
            return "out_of_memory", f"held {used:,.0f} MB, and {memory:,.0f} are allowed"
        return None

    def _end(
        self, key: str, event: Mapping[str, Any], reason: str = ""
    ) -> tuple[Task, dict[str, Any]]:
        """Return the task and the row it wrote, or the row that says why there is none."""
        one = self.running.pop(key)
        row = self.ledger.row(key)
        if row is None and event["code"] == EXIT_OUTPUT:
            raise OutputError(
                "a result cannot be written",
                where=str(self.ledger.folder),
                remedy="Free some space there, then run the same command to go on",
            )
        if row is None:
            status, message = one.verdict or self._death(event["code"], reason)
            row = new_row(
                one.task,
                status,
                message=message,
                traceback=_tail(self.ledger.log(key)),
                total_wall_s=time.monotonic() - one.started,
                peak_memory_mb=event.get("peak_memory_mb"),
            )
            self.ledger.write(row)
        return one.task, row

    def _death(self, code: int, reason: str) -> tuple[str, str]:
        """Return the status and the message for a process that ended by itself."""
        before, self.kills = self.kills, oom_kills()
        if code == -signal.SIGKILL and self.kills > before:
            return "out_of_memory", "the kernel ended it for want of memory"
        if reason:
            return "killed", reason
        if code < 0:
            return "killed", f"ended by {signal.Signals(-code).name}"
        return "killed", f"its process ended with code {code} and without a result"


def oom_kills() -> int:
    """Return how many processes of this control group the kernel has ended for memory."""
    try:
        line = Path("/proc/self/cgroup").read_text().splitlines()[-1]
        group = line.split(":", 2)[2].lstrip("/")
    except (OSError, IndexError):
        return 0
    root = Path("/sys/fs/cgroup")
    for path in (
        root / group / "memory.events",
        root / "memory.events",
        root / "memory" / group / "memory.oom_control",
    ):
        with contextlib.suppress(OSError):
            counts = dict(line.split() for line in path.read_text().splitlines())
            return int(counts.get("oom_kill", 0))
    return 0


def _resident_mb(pid: int) -> float:
    import psutil

    try:
        return float(psutil.Process(pid).memory_info().rss / 1e6)
    except psutil.Error:
        return 0.0


def _processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _environment() -> dict[str, str]:
    """Return the environment of the workers: our modules, and one thread until a task asks.

    One thread also keeps the server free of thread pools, which would not survive the fork.
    """
    threads = ("OMP", "OPENBLAS", "MKL", "NUMBA")
    return {
        **os.environ,
        **{f"{library}_NUM_THREADS": "1" for library in threads},
        "NUMBA_THREADING_LAYER": "workqueue",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONUNBUFFERED": "1",
    }


def _tail(path: Path, lines: int = 20) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    return ""
