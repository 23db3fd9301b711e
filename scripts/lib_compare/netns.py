"""Network namespaces that this script makes, and what is done inside them."""

import contextlib
import ctypes
import fcntl
import os
import socket
import struct

CLONE_NEWNET = 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1
# Clear of the ports that are listened at; wide enough for the connections of one measurement.
EPHEMERAL_PORTS = "10240 65535"
BACKLOG = 4096
# Closed connections keep their port for a minute. When half of the ports are taken, each connect
# searches among thousands, and that search would be measured.
TIME_WAIT_MAX = 4096

libc = ctypes.CDLL(None, use_errno=True)


def read(path):
    with open(path) as file:
        return file.read()


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def call(function, *arguments):
    if getattr(libc, function)(*arguments) != 0:
        errno = ctypes.get_errno()
        raise SystemExit(f"{function}: {os.strerror(errno)} (it needs root)")


@contextlib.contextmanager
def back_home():
    """Whatever namespace this thread, the only one, enters: afterwards it is where it was."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        yield
    finally:
        call("setns", home, CLONE_NEWNET)
        os.close(home)


class Netns:
    """A network namespace that lives until `close`, or as long as a process is in it."""

    def __init__(self, congestion):
        with back_home():
            call("unshare", CLONE_NEWNET)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                request = struct.pack("16sh14x", b"lo", 0)
                flags = struct.unpack("16sh14x", fcntl.ioctl(probe, SIOCGIFFLAGS, request))[1]
                fcntl.ioctl(probe, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))
            write("/proc/sys/net/ipv4/ip_local_port_range", EPHEMERAL_PORTS)
            write("/proc/sys/net/ipv4/tcp_congestion_control", congestion)
            write("/proc/sys/net/ipv4/tcp_max_tw_buckets", str(TIME_WAIT_MAX))
            self.fd = os.open("/proc/self/ns/net", os.O_RDONLY)
        self.path = f"/proc/{os.getpid()}/fd/{self.fd}"

    def close(self):
        os.close(self.fd)

    @contextlib.contextmanager
    def entered(self):
        """Programs that are started meanwhile are in the namespace."""
        with back_home():
            call("setns", self.fd, CLONE_NEWNET)
            yield

    def listen(self, port):
        """A listening socket inside; its connections inherit TCP_NODELAY."""
        with self.entered():
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(BACKLOG)
        return listener

    def listens(self, port):
        """Whether somebody inside listens at the port, without connecting."""
        with self.entered():
            # Not /proc/net: that is the namespace of the process's first thread, the same here.
            lines = read("/proc/thread-self/net/tcp").splitlines()[1:]
        for line in lines:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                return True
        return False


class AllowCongestion:
    """Lets namespaces other than the first use an algorithm; puts the setting back at the end."""

    PATH = "/proc/sys/net/ipv4/tcp_allowed_congestion_control"

    def __init__(self, name):
        self.before = read(self.PATH).strip()
        if name not in self.before.split():
            write(self.PATH, f"{self.before} {name}")

    def restore(self):
        write(self.PATH, self.before)
