"""Who is compared, each with the settings an operator would choose who wants it fast.

A forwarder that knows namespaces gets -f -l -t -c. Any other runs in the namespace it connects from
and inherits the listening socket, bound in the other one: so it too does nothing but accept,
connect and move bytes.
"""

import contextlib
import os
import re
import resource
import shlex
import shutil
import subprocess
import tempfile
import textwrap
from dataclasses import dataclass
from typing import Callable, Optional

from .netns import read, write
from .programs import START_S, Failed, poll_until, start, stop

SERVER_PORT, LISTEN_PORT = 5001, 5002
TARGET = f"127.0.0.1:{SERVER_PORT}"
# More than any work has; each contender's own limit is set to it.
CONNECTIONS_MAX = 9200
# What a forwarder needs beside its connections.
DESCRIPTORS_SPARE = 100
# Where Debian has programs that are not in every user's PATH.
os.environ["PATH"] += ":/usr/sbin:/sbin:/lib/systemd:/usr/lib/systemd"

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@dataclass(frozen=True)
class Contender:
    name: str
    title: str
    settings: str  # what was chosen and why, for the docs
    # Starts it: (contender, place) to its process. None: no forwarder.
    launch: Optional[Callable]
    program: str = ""
    version: tuple = ()  # the command that tells it
    descriptors: int = 2  # in one process for each connection that is open
    most: int = CONNECTIONS_MAX  # connections it is asked to carry, and why no more
    why_most: str = ""

    def start(self, place):
        """Starts it between the namespaces of a place. It may not yet accept."""
        return self.launch(self, place)

    def why_not(self, connections):
        """Why it is not asked to carry so many at a time."""
        if connections > self.most:
            return self.why_most
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if connections * self.descriptors + DESCRIPTORS_SPARE > limit:
            return f"{self.descriptors} descriptors a connection, and RLIMIT_NOFILE is {limit}"
        return None

    def missing(self):
        return bool(self.program) and not shutil.which(self.program)

    def version_text(self):
        if not self.version:
            return ""
        output = subprocess.run(
            self.version, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            stdin=subprocess.DEVNULL, timeout=START_S,
        ).stdout
        found = re.search(r"\d+(?:\.\d+)+\S*|\b\d{3}\b", output)
        return found[0].rstrip(",)") if found else "unknown"


class Place:
    """Two fresh namespaces, a directory for files, and a log for what a forwarder complains of."""

    def __init__(self, listen_netns, connect_netns, directory):
        self.listen_netns, self.connect_netns = listen_netns, connect_netns
        self.directory = directory
        self.log = open(os.path.join(directory, "log"), "w+b")

    def file(self, name, text):
        path = os.path.join(self.directory, name)
        write(path, textwrap.dedent(text))
        return path

    def log_text(self):
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        # The last lines name the consequence, the ones before them the cause.
        return " / ".join(lines[-3:])[-300:] or "it says nothing"

    def run(self, command, **options):
        quiet = {"stdin": subprocess.DEVNULL, "stdout": self.log, "stderr": self.log}
        return start(command, **quiet, **options)

    def until_listening(self, child, name):
        def ready():
            if child.poll() is not None:
                raise Failed(f"ended with status {child.returncode}: {self.log_text()}")
            return self.listen_netns.listens(LISTEN_PORT)

        try:
            poll_until(f"{name} listens", ready)
        except Failed:
            stop(child)
            raise


def cpus():
    """How many there are for a forwarder."""
    return len(os.sched_getaffinity(0))


def between(*arguments):
    """A forwarder that enters both namespaces by itself."""

    def launch(contender, place):
        command = [contender.program, *arguments]
        command += ["-f", place.listen_netns.path, "-t", place.connect_netns.path]
        command += ["-l", f"127.0.0.1:{LISTEN_PORT}", "-c", TARGET]
        child = place.run(command)
        place.until_listening(child, contender.name)
        return child

    return launch


def inheriting(command_for):
    """A forwarder that gets the listening socket; `command_for(contender, place, fd)`."""

    def launch(contender, place):
        with place.listen_netns.listen(LISTEN_PORT) as listener:
            # nginx takes it as it is: a worker that another is faster than would wait in accept(2).
            listener.setblocking(False)
            fd = listener.fileno()
            command, environment = command_for(contender, place, fd)
            with place.connect_netns.entered():
                return place.run(command, pass_fds=[fd], env={**os.environ, **environment})

    return launch


def haproxy(*splice):
    def command_for(contender, place, fd):
        options = "\n".join(f"option {option}" for option in splice)
        config = f"""
            global
                maxconn {CONNECTIONS_MAX}
                maxpipes 512
                nbthread {cpus()}
                tune.pipesize 1048576
            defaults
                mode tcp
                {options}
                timeout connect 10s
                timeout client 1h
                timeout server 1h
            listen forward
                bind fd@{fd}
                server target {TARGET}
            """
        return [contender.program, "-db", "-f", place.file("haproxy.cfg", config)], {}

    return inheriting(command_for)


def nginx(contender, place, fd):
    build = subprocess.run([contender.program, "-V"], stderr=subprocess.PIPE, text=True).stderr
    modules = re.search(r"--modules-path=(\S+)", build)
    stream = os.path.join(modules[1] if modules else "", "ngx_stream_module.so")
    load = f"load_module {stream};" if os.path.exists(stream) else ""
    config = f"""{load}
        daemon off;
        pid {place.directory}/pid;
        error_log stderr error;
        worker_processes {cpus()};
        events {{ worker_connections {2 * CONNECTIONS_MAX}; }}
        stream {{ server {{
            listen 127.0.0.1:{LISTEN_PORT};
            proxy_pass {TARGET};
            proxy_buffer_size 64k;
            proxy_timeout 1h;
        }} }}
        """
    command = [contender.program, "-c", place.file("nginx.conf", config), "-p", place.directory]
    return command, {"NGINX": f"{fd};"}


def socat(contender, place):
    """An inetd listens and starts one socat for each connection, in the other namespace: socat can
    neither enter one nor accept from an inherited socket before version 1.8."""
    inetd = ["systemd-socket-activate", "--accept", "--inetd", "-l", f"127.0.0.1:{LISTEN_PORT}"]
    enter = ["nsenter", f"--net={place.connect_netns.path}"]
    # -g: socat would not believe that standard input has TCP options.
    options = ["-g", "-b", "65536", "-t", "3600", "STDIO,nodelay", f"TCP4:{TARGET},nodelay"]
    with place.listen_netns.entered():
        child = place.run([*inetd, *enter, contender.program, *options])
    place.until_listening(child, contender.name)
    return child


def proxyd(contender, _place, fd):
    # The protocol wants the socket as descriptor 3 and the process's own id.
    script = f'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&{fd}'
    options = [f"--connections-max={CONNECTIONS_MAX}", TARGET]
    return ["bash", "-c", script, "bash", contender.program, *options], {}


def pasta(contender, place):
    """pasta listens where it is started and reaches into the namespace of a file."""
    file = place.file("netns", "")  # a mount: pasta may not follow another process's descriptors
    target = f"/proc/self/fd/{place.connect_netns.fd}"
    quiet = {"check": True, "stdout": place.log, "stderr": place.log}
    subprocess.run(["mount", "--bind", target, file], pass_fds=[place.connect_netns.fd], **quiet)
    try:
        with place.listen_netns.entered():
            # It refuses to start without a way out, which it will not use.
            for command in (
                "ip tuntap add out0 mode tap", "ip addr add 192.0.2.1/24 dev out0",
                "ip link set out0 up", "ip route add default via 192.0.2.2",
            ):
                subprocess.run(command.split(), **quiet)
            ports = f"-4 -t 127.0.0.1/{LISTEN_PORT}:{SERVER_PORT} -T none -u none -U none"
            options = ["-f", "-e", "-q", "--netns", file, "--netns-only", "--runas", "0"]
            child = place.run([contender.program, *options, *ports.split()])
        place.until_listening(child, contender.name)
        return child
    finally:
        subprocess.run(["umount", "-l", file], **quiet)


def cargo_version(crate):
    """The newest version of a crate that the project is built with."""
    lock = read(os.path.join(ROOT, "Cargo.lock"))
    found = re.findall(rf'name = "{re.escape(crate)}"\nversion = "([^"]+)"', lock)
    return found[-1] if found else "unknown"


def of_nsplice(program, name, title, settings, *arguments):
    return Contender(name, title, settings, between(*arguments), program, (program, "-V"))


def known(options):
    """Every contender by name."""
    relay = options.relay
    installed = os.path.dirname(os.path.dirname(os.path.abspath(options.reference)))
    reference = ("cat", os.path.join(installed, ".crates.toml"))

    def nsplice(name, title, settings, *arguments):
        return of_nsplice(options.nsplice, name, title, settings, *arguments)

    def of_relay(kind, settings, crate, descriptors=2):
        say = ("echo", cargo_version(crate))
        launch = between("--kind", kind)
        settings += f" (crate {crate}); examples/relay, one thread, TCP_NODELAY on both sides"
        return Contender(kind, f"{kind} relay", settings, launch, relay, say, descriptors)

    all_contenders = [
        Contender("direct", "no forwarder", "client and server in one namespace", None),
        Contender(
            "reference", "netns_tcp_bridge", "it has no settings; its backlog is 16",
            between(), options.reference, reference,
        ),
        nsplice("nsplice", "nsplice", "as it is: `--transfer auto`, up to a worker for each CPU"),
        nsplice("nsplice-copy", "nsplice (copy)", "`--transfer copy`", "--transfer", "copy"),
        nsplice("nsplice-splice", "nsplice (splice)", "`--transfer splice`",
                "--transfer", "splice"),
        nsplice("nsplice-1", "nsplice (1 worker)", "`--workers 1`", "--workers", "1"),
        nsplice("nsplice-poll", "nsplice (busy poll)", "`--busy-poll 50`", "--busy-poll", "50"),
        Contender(
            "haproxy", "HAProxy", "TCP mode, a thread for each CPU, `option splice-request` and "
            "`splice-response`, pipes of 1 MiB; it sets TCP_NODELAY itself",
            haproxy("splice-request", "splice-response"), "haproxy", ("haproxy", "-v"),
        ),
        Contender(
            "haproxy-auto", "HAProxy (splice-auto)", "the same with `option splice-auto`, which "
            "copies most of what bulk is here", haproxy("splice-auto"), "haproxy",
            ("haproxy", "-v"),
        ),
        Contender(
            "nginx", "nginx stream", "a worker for each CPU, `proxy_buffer_size 64k` (16k by "
            "default); it sets TCP_NODELAY itself and cannot splice", inheriting(nginx), "nginx",
            ("nginx", "-v"),
        ),
        Contender(
            "socat", "socat", "`systemd-socket-activate --accept --inetd` listens and starts it by "
            "`nsenter` for each connection, which is most of what connecting costs; buffers of "
            "64 KiB (8 KiB by default), `nodelay`", socat, "socat", ("socat", "-V"),
            most=1000, why_most="a process for each connection",
        ),
        Contender(
            "proxyd", "systemd-socket-proxyd", "`--connections-max`; one thread, splices through "
            "a pipe in each direction; towards the target it cannot set TCP_NODELAY",
            inheriting(proxyd), "systemd-socket-proxyd", ("systemd-socket-proxyd", "--version"),
            descriptors=6,
        ),
        Contender(
            "pasta", "pasta", "started in the listen namespace, `--netns` names the other, `-t` "
            "forwards the port over loopback: it splices; one thread",
            pasta, "pasta", ("dpkg-query", "-W", "passt"), descriptors=6,
        ),
        of_relay("tokio-8k", "`copy_bidirectional` with its 8 KiB buffers", "tokio"),
        of_relay("tokio-64k", "`copy_bidirectional` with buffers of 64 KiB", "tokio"),
        of_relay("tokio-uring", "a copy loop on io_uring", "tokio-uring"),
        of_relay("uring-splice", "IORING_OP_SPLICE through pipes", "io-uring", descriptors=6),
        of_relay("epoll-splice", "epoll and splice(2) through pipes of 1 MiB", "nix"),
    ]
    return {contender.name: contender for contender in all_contenders}


def of_command(text):
    """NAME=COMMAND: a forwarder with the options -f -l -t -c."""
    name, _, command = text.partition("=")
    words = shlex.split(command)
    if not name or not words:
        raise ValueError(f"{text}: not NAME=COMMAND")
    # Where the program lies says nothing to whoever reads the results elsewhere.
    shown = shlex.join([os.path.basename(words[0]), *words[1:]])
    return Contender(name, name, f"`{shown}`", between(*words[1:]), words[0])


@contextlib.contextmanager
def place(listen_netns, connect_netns):
    with tempfile.TemporaryDirectory(prefix="nsplice-compare-") as directory:
        made = Place(listen_netns, connect_netns, directory)
        with made.log:
            yield made
