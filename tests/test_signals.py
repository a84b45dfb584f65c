"""Signals, terminals and job control: as without a container, whether we stay in between (--pid) or not."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from namespace_fixtures import Need

pytest_plugins = ["run_fixtures"]

WITH_INIT = [[], ["--pid"]]
EVERY_WAY = [*WITH_INIT, ["--pid", "--no-init"]]  # there the payload is process 1, which nothing kills or stops that it does not handle
WAITS = "TERM INT HUP QUIT USR1 USR2 ALRM PIPE WINCH TSTP TTIN CONT URG".split()

# Says the number of every signal that it gets; none has an effect.
COUNT = r"""
#include <signal.h>
#include <stdio.h>
int main(void) {
    sigset_t all;
    int number;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, NULL);
    setvbuf(stdout, NULL, _IONBF, 0);
    printf("ready\n");
    while (sigwait(&all, &number) == 0) printf("%d\n", number);
    return 0;
}
"""


@pytest.fixture(scope="module")
def counting(rootfs: Path, tmp_path_factory: pytest.TempPathFactory, need: Need) -> Path:
    """A directory with the program, to bind."""
    place = tmp_path_factory.mktemp("count")
    (place / "count.c").write_text(COUNT)
    subprocess.run([need("cc"), "-static", place / "count.c", "-o", place / "count"], check=True)
    return place


@pytest.mark.parametrize("options", EVERY_WAY)
def test_a_signal_to_our_process_reaches_the_payload_once(sciexec_path: Path, image: Path, counting: Path, options: list[str]) -> None:
    with counter(sciexec_path, image, counting, options) as process:
        assert received(process, os.kill, process.pid) == WAITS


@pytest.mark.parametrize("options", WITH_INIT)  # with --no-init it comes twice, as docs/isolation.md says
def test_a_signal_to_the_group_reaches_the_payload_once(sciexec_path: Path, image: Path, counting: Path, options: list[str]) -> None:
    with counter(sciexec_path, image, counting, options) as process:
        assert received(process, os.killpg, process.pid) == WAITS


def test_a_signal_to_sinit_reaches_the_payload_once(sciexec_path: Path, image: Path, counting: Path) -> None:
    """A client that found it in pstree."""
    with counter(sciexec_path, image, counting, ["--pid"]) as process:
        (init,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        assert received(process, os.kill, init) == WAITS


def counter(sciexec_path: Path, image: Path, counting: Path, options: list[str]) -> subprocess.Popen[str]:
    command = [sciexec_path, "exec", *options, "-B", f"{counting}:/count", image, "/count/count"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def received(process: subprocess.Popen[str], send: Callable[[int, int], None], target: int) -> list[str]:
    """The signals that arrived when each of WAITS was sent, one after the other, in the end killing the process."""
    assert process.stdout is not None
    found = []
    for name in WAITS:
        send(target, signal.Signals[f"SIG{name}"])
        found.append(process.stdout.readline())
    time.sleep(0.3)  # for those that come late
    process.kill()
    found += process.stdout
    return [signal.Signals(int(line)).name[3:] for line in found]


# --- terminals ------------------------------------------------------------------------------------------------------------------


def has_input(fd: int, seconds: float) -> bool:
    """Whether there is something to read; select(2) takes no descriptor above 1023, and a long run of tests has many."""
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLHUP)
    return bool(poll.poll(seconds * 1000))


class Terminal:
    """A command on a terminal of its own, whose session it leads."""

    def __init__(self, *command: str | Path) -> None:
        self.shown = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["PS1"] = "$ "
            for number in (signal.SIGINT, signal.SIGHUP):  # ignored where the tests run in the background
                signal.signal(number, signal.SIG_DFL)
            os.execv(command[0], list(map(str, command)))

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, *wanted: str, seconds: float = 15) -> str:
        """What is shown up to the first of `wanted`, which is taken away; "" stands for the end of the session."""
        deadline = time.monotonic() + seconds
        while not (found := [text for text in wanted if text and text in self.shown]):
            assert has_input(self.fd, max(0, deadline - time.monotonic())), f"{wanted} does not come: {self.shown!r}"
            try:
                self.shown += os.read(self.fd, 4096).decode(errors="replace")
            except OSError as error:
                assert error.errno == errno.EIO and "" in wanted, f"{wanted} does not come: {self.shown!r}"
                return self.shown
        before, _, self.shown = self.shown.partition(found[0])
        return before


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def make(*command: str | Path) -> Terminal:
        made.append(Terminal(*command))
        return made[-1]

    yield make
    for each in made:
        os.close(each.fd)
        try:
            os.kill(each.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.waitpid(each.pid, 0)


@pytest.mark.parametrize("options", EVERY_WAY)
def test_keys_reach_the_payload_once(
    sciexec_path: Path, image: Path, counting: Path, options: list[str], terminal: Callable[..., Terminal]
) -> None:
    window = terminal(sciexec_path, "exec", *options, "-B", f"{counting}:/count", image, "/count/count")
    window.until("ready\r\n")
    for key, name in (("\x03", "INT"), ("\x1c", "QUIT"), ("\x1a", "TSTP"), ("", "WINCH")):
        window.type(key)
        if not key:
            fcntl.ioctl(window.fd, termios.TIOCSWINSZ, struct.pack("4H", 50, 100, 0, 0))
        number = int(signal.Signals[f"SIG{name}"])
        window.until(f"{number}\r\n")
    time.sleep(0.3)
    assert not has_input(window.fd, 0)


@pytest.mark.parametrize("options", WITH_INIT)
def test_job_control(sciexec_path: Path, image: Path, options: list[str], terminal: Callable[..., Terminal], nothing_left: None) -> None:
    """Ctrl-Z, jobs, fg, bg, and a pipeline that reads the terminal at its other end."""
    window = terminal("/bin/bash", "--norc", "--noediting", "-i")
    window.until("$ ")
    command = " ".join([str(sciexec_path), "exec", *options, str(image)])
    window.type(f"{command} sh -c 'echo is read''y; read line; echo \"got $line\"; exit 5'\n")
    window.until("is ready")
    for _ in range(2):
        window.type("\x1a")
        window.until("Stopped")
        window.type("echo $(jobs | wc -l) jo''b\n")
        window.until("1 job")
        window.type("fg\n")
        window.until("is read")
        time.sleep(0.2)  # the shell says so before it does so
    window.type("word\n")
    window.until("got word")
    window.type("echo code $?\n")
    window.until("code 5")
    window.type(f"{command} sh -c 'echo is read''y; exec cat'\n")
    window.until("is ready")
    window.type("\x03")
    window.until("$ ")
    window.type("echo co''de $?\n")
    window.until("code 130")
    window.type(f"{command} cat < /dev/tty &\n")
    window.type("sleep 0.5\n\n")
    window.until("Stopped")
    window.type("kill %1; fg\n\necho en''d\n")
    window.until("end")
    window.type(f"{command} echo from inside | (read line; read answer < /dev/tty; echo $line, $answer)\n")
    window.type("typed\n")
    window.until("from inside, typed")
    window.type("exit\n")
    window.until("")


@pytest.mark.parametrize("options", WITH_INIT)
def test_stopped_and_continued_by_a_signal(sciexec_path: Path, image: Path, options: list[str]) -> None:
    """To one process, as a batch system does it; whoever waits for us sees us stopped."""
    script = "echo ready; read line; echo went on; exit 9"
    command = [sciexec_path, "exec", *options, image, "sh", "-c", script]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=os.setpgrp)  # noqa: PLW1509
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    for _ in range(3):
        process.send_signal(signal.SIGTSTP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) in (signal.SIGTSTP, signal.SIGSTOP)
        process.send_signal(signal.SIGCONT)
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.stdout.read() == b"went on\n"
    assert process.wait(10) == 9


@pytest.mark.parametrize("options", WITH_INIT)
def test_a_terminal_that_goes_away_ends_the_payload(sciexec_path: Path, image: Path, options: list[str], nothing_left: None) -> None:
    window = Terminal(sciexec_path, "exec", *options, image, "sh", "-c", "echo ready; sleep 63.5")
    window.until("ready")
    os.close(window.fd)
    status = os.waitpid(window.pid, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGHUP, signal.SIGKILL)


@pytest.mark.parametrize("options", WITH_INIT)
def test_an_interrupt_during_the_start_ends_it(sciexec_path: Path, image: Path, options: list[str], nothing_left: None) -> None:
    for delay in (0.005, 0.01, 0.015, 0.02, 0.03):
        process = subprocess.Popen([sciexec_path, "exec", *options, image, "sleep", "60"], stderr=subprocess.PIPE, text=True)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM
        assert process.stderr is not None and process.stderr.read() == ""
