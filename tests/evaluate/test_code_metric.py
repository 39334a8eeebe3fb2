from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from itertools import combinations
from pathlib import Path

import pytest

from ift_peft.evaluate.code_metric import OUTPUT_BYTES, Outcome, code_of, pass_at_k, run_all, run_candidate

TESTS = "assert square(3) == 9\nassert square(-2) == 4\n"
GOOD = "def square(x):\n    return x * x\n"
confined = pytest.mark.skipif(sys.platform != "linux", reason="the guards of the kernel are Linux's")


def run(code: str, *, tests: str = TESTS, timeout: float = 20.0, memory_mb: int = 256, kernel: bool = True) -> Outcome:
    return run_candidate(code, tests, timeout=timeout, memory_mb=memory_mb, kernel=kernel)


@pytest.mark.parametrize("kernel", [True, False])
def test_right_programs_pass_and_wrong_ones_say_why(kernel: bool) -> None:
    assert run(GOOD, kernel=kernel).reason == "passed"
    assert run(GOOD, kernel=kernel).passed
    assert run("def square(x):\n    return x", kernel=kernel).reason.startswith("AssertionError")
    assert run("def square(x) return x", kernel=kernel).reason.startswith("SyntaxError")
    assert "square" in run("pass", kernel=kernel).reason


def test_what_a_program_may_use() -> None:
    useful = (
        "import asyncio, dataclasses, datetime, math, random, re, tempfile, threading, typing\n"
        "@dataclasses.dataclass\n"
        "class Box:\n    value: int\n"
        "async def later(x):\n    await asyncio.sleep(0)\n    return Box(x * x)\n"
        "def square(x):\n"
        "    found = []\n"
        "    thread = threading.Thread(target=lambda: found.append(asyncio.run(later(x))))\n"
        "    thread.start()\n    thread.join()\n"
        "    with open('note.txt', 'w') as file:\n        file.write('中文')\n"
        "    with tempfile.TemporaryDirectory():\n        return found[0].value\n"
        "print('平方', open('/dev/null', 'w').write('x'))\n"
        "if __name__ == '__main__':\n    input('not asked: ')\n"
    )
    outcome = run(useful)
    assert outcome.passed, outcome.reason
    assert outcome.output == "平方 1\n"


@pytest.mark.parametrize("kernel", [True, False])
def test_an_endless_loop_is_stopped(kernel: bool) -> None:
    began = time.monotonic()
    outcome = run("while True:\n    pass", timeout=1.0, kernel=kernel)
    assert not outcome.passed
    assert outcome.reason == "timed out after 1 s"
    assert time.monotonic() - began < 30
    deaf = (
        "import signal\n"
        "for number in range(1, 30):\n"
        "    try: signal.signal(number, signal.SIG_IGN)\n    except OSError: pass\n"
    )
    assert "timed out" in run(f"{deaf}while True: pass", timeout=1.0, kernel=kernel).reason


@pytest.mark.parametrize("kernel", [True, False])
def test_memory_is_limited(kernel: bool) -> None:
    outcome = run("hoard = []\nwhile True:\n    hoard.append(bytearray(10 ** 7))", kernel=kernel)
    assert outcome.reason.startswith("MemoryError")
    assert run(f"hoard = bytearray(100 << 20)\n{GOOD}", kernel=kernel).passed
    raised = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n"
    if os.getuid() or kernel:  # without the kernel's guards root stays root
        assert run(raised, kernel=kernel).reason.startswith(("ValueError", "PermissionError"))


@pytest.mark.parametrize("kernel", [True, False])
def test_output_without_end_is_cut(kernel: bool) -> None:
    outcome = run("while True:\n    print('x' * 10_000)", timeout=1.0, kernel=kernel)
    assert not outcome.passed
    assert len(outcome.output) == OUTPUT_BYTES
    assert run(f"print('x' * 10_000_000)\n{GOOD}", kernel=kernel).passed


@pytest.mark.parametrize("kernel", [True, False])
def test_a_big_file_cannot_be_written(kernel: bool) -> None:
    outcome = run("open('big', 'wb').write(bytes(64 << 20))", kernel=kernel)
    assert outcome.reason.startswith("OSError")
    assert "large" in outcome.reason


def alive(word: str) -> list[str]:
    """Processes with `word` in their command line."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in line.read_bytes():
                found.append(line.parent.name)
        except OSError:
            continue
    return found


@confined
@pytest.mark.parametrize(
    "start",
    [
        "while True:\n    os.fork()",
        "os.spawnv(os.P_NOWAIT, '/bin/sleep', ['sleep', '98765.4'])",
        "subprocess.Popen(['sleep', '98765.4'], start_new_session=True)",
        "os.posix_spawn('/bin/sleep', ['sleep', '98765.4'], {})",
        "multiprocessing.Process(target=time.sleep, args=(1000,)).start()",
        "os.execv('/bin/sleep', ['sleep', '98765.4'])",
        "ctypes.CDLL(None).system(b'sleep 98765.4 &') == 0 or square",
    ],
)
def test_no_process_can_be_started_and_none_is_left_behind(start: str) -> None:
    outcome = run(f"import ctypes, multiprocessing, os, subprocess, time\n{start}")
    assert not outcome.passed
    assert not alive("98765.4")


@confined
def test_a_program_that_survives_the_refusal_leaves_nothing_behind() -> None:
    daemon = (
        "import os\n"
        "try:\n"
        "    if os.fork() == 0:\n        os.setsid()\n        os.execv('/bin/sleep', ['sleep', '98765.4'])\n"
        "except OSError:\n    pass\n"
    )
    assert run(f"{daemon}{GOOD}").passed
    assert not alive("98765.4")


@confined
@pytest.mark.parametrize("kernel", [True, False])
def test_no_connection_is_made(kernel: bool, socket_enabled: None) -> None:
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        port = listener.getsockname()[1]

        def listen() -> None:
            connection, _ = listener.accept()
            heard.append(connection.recv(10))
            connection.close()

        thread = threading.Thread(target=listen)
        thread.start()
        call = f"import socket\nsocket.create_connection(('127.0.0.1', {port})).sendall(b'%s')\n"
        refused = run(call % "candidate" + GOOD, kernel=kernel)
        assert refused.reason.startswith(("PermissionError", "ModuleNotFoundError"))
        if kernel:
            raw = f"import ctypes\nassert ctypes.CDLL(None).socket({int(socket.AF_INET)}, 1, 0) >= 0, 'refused'\n"
            assert run(raw).reason == "AssertionError: refused"
            by_name = "import socket\nsocket.socket(socket.AF_UNIX)\n"
            assert run(by_name).reason.startswith("PermissionError")
        subprocess.run([sys.executable, "-I", "-c", call % "outside"], check=True, timeout=60)
        thread.join(60)
    assert heard == [b"outside"]


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(
    "attack",
    [
        "os.kill(os.getppid(), 9)",
        "os.killpg(os.getpgid(os.getppid()), 9)",
        "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
        "open(f'/proc/{os.getppid()}/mem', 'r+b')",
        "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    ],
)
def test_the_process_that_started_it_is_out_of_reach(kernel: bool, attack: str) -> None:
    if not kernel and ("prlimit" in attack or "proc" in attack or "pidfd" in attack):
        pytest.skip("this is what is lost without the guards of the kernel")
    if sys.platform != "linux" and "kill" not in attack:
        pytest.skip("Linux's own means")
    outcome = run(f"import os, resource, signal\n{attack}\n{GOOD}", kernel=kernel)
    assert not outcome.passed
    assert outcome.reason.startswith(("PermissionError", "AttributeError"))


@confined
def test_files_outside_are_not_changed(tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("kept")
    mode = kept.stat().st_mode
    for harm in (
        f"open({str(kept)!r}, 'w')",
        f"os.truncate({str(kept)!r}, 0)",
        f"os.remove({str(kept)!r})",
        f"os.rename({str(kept)!r}, 'mine')",
        f"os.link({str(kept)!r}, 'mine')",
        f"os.symlink('/etc', {str(tmp_path / 'link')!r})",
        f"os.mkdir({str(tmp_path / 'made')!r})",
        f"os.chmod({str(kept)!r}, 0)",
        f"shutil.rmtree({str(tmp_path)!r})",
    ):
        outcome = run(f"import os, shutil\n{harm}\n")
        assert outcome.reason.startswith(("PermissionError", "OSError")), (harm, outcome.reason)
    assert kept.read_text() == "kept"
    assert kept.stat().st_mode == mode
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


@confined
def test_root_keeps_no_capabilities() -> None:
    outcome = run("print([line for line in open('/proc/self/status') if line.startswith('CapEff')])")
    assert "0000000000000000" in outcome.output


@pytest.mark.parametrize("kernel", [True, False])
def test_ending_before_the_tests_is_no_pass(kernel: bool) -> None:
    for code, reason in (
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("import os\nos._exit(0)", "ended before its tests did, with exit code 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def square(x):\n    raise SystemExit", "SystemExit"),
        (
            "import os\nfor number in range(3, 64):\n    try: os.close(number)\n    except OSError: pass\n" + GOOD,
            "ended",
        ),
    ):
        outcome = run(code, kernel=kernel)
        assert not outcome.passed
        assert outcome.reason.startswith(reason)


@pytest.mark.parametrize(
    "trick",
    [
        "print('passed'); print('OK')",
        "import builtins\nbuiltins.AssertionError = type('Never', (Exception,), {})",
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\nimport sys\nsys.stdout = None",
        "import os\nfor number in range(3, 64):\n    try: os.write(number, b'passed')\n    except OSError: pass",
        "import sys, os\nsys.excepthook = lambda *a: os._exit(0)",
        "import atexit\natexit.register(print, 'passed')",
        "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E",
        "unfinished = '''",
        "import sys\nsys.settrace(lambda *a: None)",
    ],
)
def test_tricks_do_not_make_a_wrong_program_pass(trick: str) -> None:
    assert not run(f"def square(x):\n    return x\n{trick}\n").passed


def test_the_limits_that_the_documentation_states() -> None:
    """If one of these fails, a guard has become stronger: say so in the module's documentation."""
    all_equal = "class Any:\n    def __eq__(self, other): return True\ndef square(x): return Any()\n"
    assert run(all_equal).passed
    finds_token = (
        "import os, sys\nframe = sys._getframe()\n"
        "while 'program' not in frame.f_locals: frame = frame.f_back\n"
        "os.write(frame.f_locals['pipe'], frame.f_locals['program']['token'].encode())\nos._exit(0)\n"
    )
    assert run(finds_token).passed
    assert run(f"{GOOD}open({__file__!r}).read()").passed


def test_missing_guards_are_named() -> None:
    missing = run(GOOD, kernel=False).missing
    assert any("network" in guard for guard in missing)
    assert any("files" in guard for guard in missing)


def test_the_working_folder_is_empty_and_removed_afterwards() -> None:
    outcome = run(
        f"import os\nprint(os.listdir(), os.getcwd(), dict(os.environ).get('PATH'))\nopen('left', 'w')\n{GOOD}"
    )
    listing, folder, path = outcome.output.split()
    assert listing == "[]"
    assert not Path(folder).exists()
    assert path == "None"


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample() -> None:
    """By counting subsets, and the values that HumanEval's own estimator gives."""
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations(range(n), k))
                share = sum(min(subset) < c for subset in subsets) / len(subsets)
                assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    assert pass_at_k(200, 3, 10) == pytest.approx(1 - (190 * 189 * 188) / (200 * 199 * 198))
    assert pass_at_k(100_000, 5, 1000) == pytest.approx(1 - 0.99**5, rel=1e-3)


def test_many_candidates_keep_their_places() -> None:
    seen: list[tuple[int, int]] = []
    outcomes = run_all(
        [[GOOD, "pass"], [GOOD]],
        [TESTS, "assert square(3) == 10"],
        workers=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [[outcome.passed for outcome in row] for row in outcomes] == [[True, False], [False]]
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_program_is_taken_out_of_its_answer() -> None:
    assert code_of("Here:\n```python\nx = 1\n```\nand\n```\ny = 2\n```") == "x = 1"
    assert code_of("x = 1") == "x = 1"
    assert code_of("```py\nx = 1\n") == "x = 1\n"
