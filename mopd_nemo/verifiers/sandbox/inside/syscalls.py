"""A filter of system calls (seccomp) for programs. Standard library only.

It closes what holds memory that no limit counts, what outlives a program, and large parts of the kernel that no
solution needs.
"""

import ctypes
import errno
import os
import struct

# Numbers of <asm/unistd.h>, by machine, with the machine's constant of <linux/audit.h>.
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLOSED = {
    # Memory in no process's address space.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    # Keys outlive the program and are read by the next one of the same user.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Large, and often where kernels break.
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    # A user namespace gives capabilities, and with them file systems in memory of one's own.
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    # Its flags are in memory, where a filter cannot look. C libraries then use `clone`.
    "clone3": (435, 435),
}
_MMAP = (9, 222)
_MAP_SHARED, _MAP_ANONYMOUS = 0x01, 0x20
_CLONE = (56, 220)
_NAMESPACES = 0x7E020000
"""Flags of `clone` that ask for a new namespace."""
_X32 = 0x40000000
"""Bit of the numbers of x86-64's second set of calls, which nothing else here names."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _MACHINE, _ARGUMENT = 0, 4, (16, 24, 32, 40)
"""Offsets in `struct seccomp_data`; the low halves of arguments, on little-endian machines."""
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_PR_GET_SECCOMP, _PR_SET_SECCOMP, _MODE_FILTER = 21, 22, 2

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def can_filter() -> bool:
    """Whether this kernel has filters and the calls of this machine are known."""
    return os.uname().machine in _MACHINES and _libc.prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) >= 0


def close_calls() -> None:
    """Let the closed calls fail from now on, in this process, its threads, and all that it starts, as if not there."""
    code = filter_of(os.uname().machine)
    program = _Program(len(code) // 8, code)
    if _libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"PR_SET_SECCOMP: {os.strerror(number)}")


def filter_of(machine: str) -> bytes:
    """The filter's program."""
    column = list(_MACHINES).index(machine)
    closed = [(_EQUAL, number) for number in sorted(row[column] for row in _CLOSED.values())]
    if machine == "x86_64":
        closed.append((_AT_LEAST, _X32))
    refuse, allow = _step(_RETURN, _ERROR | errno.ENOSYS), _step(_RETURN, _ALLOW)
    return b"".join(
        [
            _step(_LOAD, _MACHINE),
            _step(_EQUAL, _MACHINES[machine], 1, 0),
            refuse,  # 32-bit calls
            _step(_LOAD, _NUMBER),
            *(step for test, value in closed for step in (_step(test, value, 0, 1), refuse)),
            _step(_EQUAL, _CLONE[column], 0, 4),
            _step(_LOAD, _ARGUMENT[0]),
            _step(_ANY_BIT, _NAMESPACES, 0, 1),
            refuse,
            allow,
            # Shared memory without a file stays when all but a page of it is unmapped, and is in no process's account.
            _step(_EQUAL, _MMAP[column], 0, 4),
            _step(_LOAD, _ARGUMENT[3]),
            _step(_ANY_BIT, _MAP_ANONYMOUS, 0, 2),
            _step(_ANY_BIT, _MAP_SHARED, 0, 1),
            refuse,
            allow,
        ]
    )


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)
