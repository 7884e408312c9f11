"""Generates agent/stonechat/linux/syscall_classes.py from the kernel's headers: the class of every call number.

    python -m stonechat_tools.proofs.syscall_tables            download Debian's header packages, print the module
    python -m stonechat_tools.proofs.syscall_tables --write    replace the module in this working copy

Needs gcc (its preprocessor only) and, for the download, apt-get and dpkg-deb; --headers ABI=DIR takes a folder that
holds usr/ instead. Calls that Debian 12's headers do not know yet have one number on every ABI (NEWER).
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from ..console import working_copy

CLASSES = (
    "other",
    "open",
    "read",
    "write",
    "fmeta",
    "fmod",
    "sockctl",
    "nettx",
    "netrx",
    "proc",
    "mem",
    "ipcsig",
    "wait",
    "info",
    "priv",
    "fdctl",
)

CALLS = {
    "open": "open openat openat2 creat open_by_handle_at name_to_handle_at",
    "read": """read pread64 readv preadv preadv2 sendfile sendfile64 splice tee copy_file_range readahead io_getevents
        io_pgetevents io_pgetevents_time64 vmsplice process_madvise""",
    "write": "write pwrite64 writev pwritev pwritev2 io_submit",
    "fmeta": """stat fstat lstat stat64 fstat64 lstat64 newfstatat fstatat64 statx access faccessat faccessat2 readlink
        readlinkat getdents getdents64 lseek _llseek getcwd statfs fstatfs statfs64 fstatfs64 getxattr lgetxattr
        fgetxattr listxattr llistxattr flistxattr getxattrat listxattrat chdir fchdir inotify_init inotify_init1
        inotify_add_watch inotify_rm_watch fanotify_init fanotify_mark oldstat oldfstat oldlstat readdir statmount
        listmount cachestat ustat""",
    "fmod": """unlink unlinkat rename renameat renameat2 mkdir mkdirat rmdir link linkat symlink symlinkat chmod fchmod
        fchmodat fchmodat2 chown fchown lchown fchownat chown32 fchown32 lchown32 truncate ftruncate truncate64
        ftruncate64 fallocate fsync fdatasync sync syncfs sync_file_range sync_file_range2 arm_sync_file_range utime
        utimes utimensat futimesat utimensat_time64 setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr
        setxattrat removexattrat mknod mknodat umask msync flock""",
    "sockctl": """socket connect bind listen accept accept4 shutdown socketpair getsockname getpeername setsockopt
        getsockopt socketcall""",
    "nettx": "sendto sendmsg sendmmsg send",
    "netrx": "recvfrom recvmsg recvmmsg recvmmsg_time64 recv",
    "proc": """clone clone3 fork vfork execve execveat exit exit_group wait4 waitid waitpid set_tid_address
        set_robust_list get_robust_list rseq""",
    "mem": """mmap mmap2 munmap mprotect brk mremap madvise mlock mlock2 munlock mlockall munlockall mincore mbind
        membarrier pkey_mprotect pkey_alloc pkey_free remap_file_pages cacheflush mseal map_shadow_stack
        process_mrelease set_mempolicy set_mempolicy_home_node migrate_pages move_pages""",
    "ipcsig": """kill tkill tgkill rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait
        rt_sigtimedwait_time64 rt_sigqueueinfo rt_tgsigqueueinfo rt_sigsuspend sigaltstack sigaction sigprocmask
        sigreturn sigpending sigsuspend signal sgetmask ssetmask pause alarm restart_syscall pipe pipe2 eventfd eventfd2
        signalfd signalfd4 shmget shmat shmdt shmctl msgget msgsnd msgrcv msgctl semget semop semctl semtimedop
        semtimedop_time64 mq_open mq_unlink mq_timedsend mq_timedreceive mq_timedsend_time64 mq_timedreceive_time64
        mq_notify mq_getsetattr pidfd_send_signal pidfd_open ipc""",
    "wait": """poll ppoll ppoll_time64 select _newselect pselect6 pselect6_time64 epoll_create epoll_create1 epoll_ctl
        epoll_wait epoll_pwait epoll_pwait2 nanosleep clock_nanosleep clock_nanosleep_time64 futex futex_time64
        futex_waitv futex_wake futex_wait futex_requeue sched_yield timer_create timer_settime timer_settime64
        timer_gettime timer_gettime64 timer_delete timer_getoverrun timerfd_create timerfd_settime timerfd_settime64
        timerfd_gettime timerfd_gettime64 setitimer getitimer""",
    "info": """getpid getppid gettid getuid geteuid getgid getegid getuid32 geteuid32 getgid32 getegid32 getpgid getpgrp
        getsid getgroups getgroups32 getresuid getresgid getresuid32 getresgid32 uname olduname oldolduname sysinfo
        times getrusage getrlimit ugetrlimit prlimit64 getpriority sched_getaffinity sched_getparam sched_getscheduler
        sched_getattr sched_get_priority_max sched_get_priority_min sched_rr_get_interval
        sched_rr_get_interval_time64 getcpu gettimeofday clock_gettime clock_gettime64 clock_getres
        clock_getres_time64 time getrandom capget get_mempolicy ioprio_get sysfs""",
    "priv": """setuid setgid setreuid setregid setresuid setresgid setuid32 setgid32 setreuid32 setregid32 setresuid32
        setresgid32 setfsuid setfsgid setfsuid32 setfsgid32 setgroups setgroups32 setsid setpgid capset prctl
        arch_prctl ptrace mount umount umount2 pivot_root chroot init_module finit_module delete_module create_module
        bpf perf_event_open reboot sethostname setdomainname keyctl add_key request_key unshare setns seccomp
        process_vm_readv process_vm_writev kexec_load kexec_file_load memfd_create memfd_secret iopl ioperm
        modify_ldt vm86 vm86old swapon swapoff quotactl quotactl_fd acct syslog settimeofday stime clock_settime
        clock_settime64 adjtimex clock_adjtime clock_adjtime64 userfaultfd io_uring_setup io_uring_enter
        io_uring_register kcmp personality sched_setscheduler sched_setaffinity sched_setparam sched_setattr
        setpriority nice ioprio_set setrlimit vhangup nfsservctl open_tree open_tree_attr move_mount fsopen fsconfig
        fsmount fspick mount_setattr landlock_create_ruleset landlock_add_rule landlock_restrict_self pidfd_getfd
        lookup_dcookie lsm_get_self_attr lsm_set_self_attr lsm_list_modules""",
    "fdctl": """close close_range dup dup2 dup3 ioctl fcntl fcntl64 fadvise64 fadvise64_64 arm_fadvise64_64 io_setup
        io_destroy io_cancel""",
}

# Linux 6.5 to 6.15 added these; since 5.1 a new call has the same number on every ABI.
NEWER = {
    "cachestat": 451,
    "fchmodat2": 452,
    "map_shadow_stack": 453,
    "futex_wake": 454,
    "futex_wait": 455,
    "futex_requeue": 456,
    "statmount": 457,
    "listmount": 458,
    "lsm_get_self_attr": 459,
    "lsm_set_self_attr": 460,
    "lsm_list_modules": 461,
    "mseal": 462,
    "setxattrat": 463,
    "getxattrat": 464,
    "listxattrat": 465,
    "removexattrat": 466,
    "open_tree_attr": 467,
}

# ABI: (Debian package, its include folders, the header, preprocessor definitions)
ABIS = {
    "x86_64": ("linux-libc-dev", ["usr/include/x86_64-linux-gnu", "usr/include"], "asm/unistd_64.h", []),
    "i386": ("linux-libc-dev", ["usr/include/x86_64-linux-gnu", "usr/include"], "asm/unistd_32.h", []),
    "aarch64": ("linux-libc-dev-arm64-cross", ["usr/aarch64-linux-gnu/include"], "asm/unistd.h", ["__LP64__=1"]),
    "armhf": ("linux-libc-dev-armhf-cross", ["usr/arm-linux-gnueabihf/include"], "asm/unistd.h", ["__ARM_EABI__=1"]),
}
NUMBERS = 512
_NOT_CALLS = {"syscalls", "arch_specific_syscall", "SYSCALL_BASE", "OABI_SYSCALL_BASE", "syscall_compat_last"}
MODULE = "agent/stonechat/linux/syscall_classes.py"  # in the working copy


def numbers(root: Path, abi: str) -> dict[str, int]:
    """-> {call name: number} of one ABI, as the preprocessor reads the headers below `root`."""
    _, folders, header, definitions = ABIS[abi]
    include = ["-nostdinc", *(f"-I{root / folder}" for folder in folders), *(f"-D{text}" for text in definitions)]
    macros = _preprocess(["-dM", *include], f'#include "{header}"\n')
    names = sorted(set(re.findall(r"#define __NR_(\w+) ", macros)) - _NOT_CALLS)
    questions = "\n".join(f"@@ {name} (__NR_{name})" for name in names)
    answers = _preprocess(["-P", *include], f'#include "{header}"\n{questions}\n')
    found = {}
    for name, expression in re.findall(r"^@@ (\w+) (.*)$", answers, re.MULTILINE):
        if re.fullmatch(r"[\d\sxa-fA-F()+]+", expression) and not name.startswith("3264_"):
            terms = re.findall(r"0x[0-9a-fA-F]+|\d+", expression)
            found[name] = sum(int(term, 0) for term in terms)
    return found


def table(calls: dict[str, int]) -> str:
    """{name: number} -> one hexadecimal digit a number: the index of its class, trailing zeros cut."""
    class_of = {name: index for index, group in enumerate(CLASSES) for name in CALLS.get(group, "").split()}
    digits = ["0"] * NUMBERS
    for name, number in {**NEWER, **calls}.items():
        if number < NUMBERS:
            digits[number] = format(class_of.get(name, 0), "x")
    return "".join(digits).rstrip("0")


def module(tables: dict[str, str]) -> str:
    """-> the source of syscall_classes.py."""
    lines = [
        '"""Generated by `python -m stonechat_tools.proofs.syscall_tables --write`; not edited by hand.',
        "",
        "CLASSES names the classes of system calls; TABLES gives each ABI one hexadecimal digit a call number.",
        '"""',
        "",
        "CLASSES = (",
        *(f'    "{name}",' for name in CLASSES),
        ")",
        "",
        "TABLES = {",
    ]
    for abi, digits in tables.items():
        pieces = [digits[i : i + 104] for i in range(0, len(digits), 104)]
        lines += [f'    "{abi}": (', *(f'        "{piece}"' for piece in pieces), "    ),"]
    return "\n".join([*lines, "}", ""])


def _preprocess(options: list[str], source: str) -> str:
    command = ["gcc", "-E", *options, "-x", "c", "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=True, timeout=60).stdout


def _download(package: str, into: Path) -> Path:
    root = into / package
    if not root.exists():
        root.mkdir()
        subprocess.run(["apt-get", "download", "-q", package], cwd=root, check=True, capture_output=True, timeout=300)
        archive = next(root.glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", archive, root], check=True, timeout=60)
    return root


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--headers", action="append", default=[], metavar="ABI=DIR", help="a folder that holds usr/")
    parser.add_argument("--write", action="store_true", help="replace the module instead of printing it")
    args = parser.parse_args(argv)
    given = dict(item.split("=", 1) for item in args.headers)
    tables = {}
    with tempfile.TemporaryDirectory() as temporary:
        for abi, (package, *_) in ABIS.items():
            root = Path(given[abi]) if abi in given else _download(package, Path(temporary))
            calls = numbers(root, abi)
            tables[abi] = table(calls)
            known = set(" ".join(CALLS.values()).split())
            obscure = sorted(set(calls) - known)
            print(f"{abi}: {len(calls)} calls, {len(obscure)} in class other: {' '.join(obscure)}", file=sys.stderr)
    source = module(tables)
    if args.write:
        (working_copy() / MODULE).write_text(source)
    else:
        print(source, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
