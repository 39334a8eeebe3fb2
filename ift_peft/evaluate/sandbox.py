"""The inside of the sandbox: what a fresh interpreter does to itself before it runs a candidate and its tests.

Run as a script by `code_metric.run_candidate`, never imported by it, and with the standard library only: the
interpreter is started isolated (`-I -S`), without site-packages. What the guards cover is written in `code_metric`.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import resource
import sys
import types
from typing import Any

ALLOW, DENY = 0x7FFF0000, 0x00050000  # of seccomp: SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
EPERM, ENOSYS = 1, 38
CLONE_THREAD = 0x00010000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of classic BPF
NUMBER_AT, ARCHITECTURE_AT, FIRST_ARGUMENT_AT = 0, 4, 16  # in struct seccomp_data, little-endian
FOREIGN_ABI = 0x40000000  # x32: the same calls under other numbers
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# Number of each call on x86_64 and aarch64; -1 where there is none.
CALLS = {
    "socket": (41, 198),
    "io_uring_setup": (425, 425),  # opens sockets and files past this filter
    "fork": (57, -1),
    "vfork": (58, -1),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "unshare": (272, 97),
    "memfd_create": (319, 279),  # memory that the memory limit does not count
    "shmget": (29, 194),
    "msgget": (68, 186),
    "chmod": (90, -1),  # these are changes that Landlock does not see
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, -1),
    "lchown": (94, -1),
    "fchown": (93, 55),
    "fchownat": (260, 54),
}
CLONE3, CLONE, PRLIMIT = (435, 435), (56, 220), (302, 261)

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
WRITE_FILE, TRUNCATE = 1 << 1, 1 << 14
WRITES = WRITE_FILE | sum(1 << bit for bit in range(4, 13))  # and: remove and make files, folders, links, devices
TRUNCATE_SINCE = 3

NO_FILTER = "system calls are not filtered: network, processes and signals are only taken out of Python's modules"
NO_LANDLOCK = "files outside the working folder can be written, as far as the user may"
NO_MEMORY = "memory is not limited"


def main() -> None:
    """Read what to run from standard input, run it confined, and tell the verdict on the pipe of the first argument."""
    program = json.loads(sys.stdin.buffer.read())
    pipe = int(sys.argv[1])
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    missing = confine(program)
    # What the candidate may replace is taken by name before it runs.
    write, leave, flush = os.write, os._exit, (sys.stdout.flush, sys.stderr.flush)
    write(pipe, json.dumps(missing).encode() + b"\n")
    verdict = run(program["code"], program["tests"])
    try:
        for one in flush:
            one()
    finally:
        write(pipe, program["token"].encode() if verdict is None else verdict.encode("utf-8", "replace")[:4096])
        leave(0)


def run(code: str, tests: str) -> str | None:
    """None where code and then tests ran to their end, else what stopped them."""
    module = types.ModuleType("candidate")  # not __main__: what a script does when it is started is not wanted
    sys.modules["candidate"] = module
    execute = exec  # the candidate may replace what stands under this name
    try:
        parts = [
            compile(source, f"<{name}>", "exec", dont_inherit=True)
            for name, source in (("candidate", code), ("tests", tests))
        ]
        for part in parts:
            execute(part, module.__dict__)
    except BaseException as error:
        try:
            return f"{type(error).__name__}: {error}"
        except BaseException:  # an exception of its own making
            return "an exception that cannot be printed"
    return None


def confine(limits: dict[str, Any]) -> list[str]:
    """Give up everything a candidate has no need of, for good; what could not be given up, in words."""
    missing = []
    seconds, memory = math.ceil(limits["timeout"]) + 1, limits["memory_mb"] << 20
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, limits["file_mb"] << 20),
        (resource.RLIMIT_NOFILE, limits["files"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, memory),
    ):
        if not _limit(kind, value):
            missing.append(NO_MEMORY)
    guarded = sys.platform == "linux" and limits["kernel"]
    library = ctypes.CDLL(None, use_errno=True)
    if guarded:
        library.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _drop_capabilities(library)
    if not (guarded and _write_only_here(library)):
        missing.append(NO_LANDLOCK)
    if not (guarded and _filter_calls(library)):
        missing.append(NO_FILTER)
        _limit(resource.RLIMIT_NPROC, limits["processes"])  # of all processes of the user; root is exempt
        _disarm()
    return missing


def _limit(kind: int, value: int) -> bool:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError):  # macOS has no limit of the address space
        return False
    return True


def _drop_capabilities(library: Any) -> None:
    """What root may do beyond its own files; of an ordinary user nothing is lost."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    library.capset(header, (ctypes.c_uint32 * 6)())


def _write_only_here(library: Any) -> bool:
    """Landlock: files are made, changed and removed in the working folder only. False where the kernel has none."""
    abi = library.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if abi < TRUNCATE_SINCE:
        return False
    handled = ctypes.c_uint64(WRITES | TRUNCATE)
    rules = library.syscall(LANDLOCK_CREATE, ctypes.byref(handled), ctypes.c_size_t(8), ctypes.c_uint32(0))
    if rules < 0:
        return False
    for path, allowed in ((".", WRITES | TRUNCATE), (os.devnull, WRITE_FILE | TRUNCATE)):
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = allowed.to_bytes(8, "little") + folder.to_bytes(4, "little")
        if library.syscall(LANDLOCK_ADD, rules, 1, rule, 0):
            return False
        os.close(folder)
    restricted = library.syscall(LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)
    return bool(restricted == 0)


def _filter_calls(library: Any) -> bool:
    """Seccomp: no sockets, no further processes or programs, no signals. False where it cannot be had."""
    machine = MACHINES.get(platform.machine())
    if machine is None or sys.maxsize <= 1 << 32:
        return False
    architecture, column = machine
    program = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, DENY | EPERM),
        (LOAD, 0, 0, NUMBER_AT),
        (AT_LEAST, 0, 1, FOREIGN_ABI),
        (RETURN, 0, 0, DENY | EPERM),
        (EQUAL, 0, 1, CLONE3[column]),
        (RETURN, 0, 0, DENY | ENOSYS),  # its flags lie in memory; the C library then takes clone
    ]
    for numbers in CALLS.values():
        if numbers[column] >= 0:
            program += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, DENY | EPERM)]
    # Threads yes, processes no; limits of its own process yes, of others no.
    for number, test in ((CLONE[column], (ANY_BIT, 1, 0, CLONE_THREAD)), (PRLIMIT[column], (EQUAL, 1, 0, 0))):
        load = (LOAD, 0, 0, FIRST_ARGUMENT_AT)
        program += [(EQUAL, 0, 4, number), load, test, (RETURN, 0, 0, DENY | EPERM), (RETURN, 0, 0, ALLOW)]
    program.append((RETURN, 0, 0, ALLOW))
    packed = b"".join(
        code.to_bytes(2, "little") + bytes((yes, no)) + value.to_bytes(4, "little") for code, yes, no, value in program
    )
    code = ctypes.create_string_buffer(packed, len(packed))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    whole = Program(len(program), ctypes.addressof(code))
    arguments = (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(whole), 0, 0)
    return bool(library.prctl(*arguments) == 0)


def _disarm() -> None:
    """Without help of the kernel: modules and functions that a program does harm with by accident are gone."""
    for name in ("socket", "_socket", "subprocess", "_posixsubprocess", "multiprocessing", "ctypes", "_ctypes"):
        sys.modules[name] = None  # type: ignore[assignment]
    banned = ("kill", "killpg", "fork", "forkpty", "posix_spawn", "posix_spawnp", "setsid", "setpgid", "system")
    for name in (*banned, "execv", "execve", "popen"):
        for module in (os, sys.modules["posix"]):
            if hasattr(module, name):
                delattr(module, name)


if __name__ == "__main__":
    main()
