//! What /proc tells about a process under test.

use std::fs;
use std::os::fd::RawFd;
use std::path::PathBuf;

use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A process that is not mistaken for a later one with the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    /// When it started, in clock ticks since boot.
    start: u64,
}

/// The fields of /proc/PID/stat from the third (the state) on.
fn stat(pid: i32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    Some(text.rsplit_once(')')?.1.split_whitespace().map(str::to_owned).collect())
}

impl Process {
    /// The process with this id now.
    pub fn of(pid: i32) -> Option<Self> {
        Some(Self { pid, start: stat(pid)?.get(19)?.parse().ok()? })
    }

    /// Its children now, without those that have ended.
    pub fn children(&self) -> Vec<Self> {
        let parent = self.pid.to_string();
        fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|&pid| stat(pid).is_some_and(|stat| stat[1] == parent && stat[0] != "Z"))
            .filter_map(Self::of)
            .collect()
    }

    /// Whether it still runs. One that ended and waits to be reaped, perhaps by an init that never
    /// does, no longer runs.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid) == Some(*self)
            && stat(self.pid).is_some_and(|stat| stat[0] != "Z" && stat[0] != "X")
    }

    /// Sends a signal, unless it has ended.
    pub fn signal(&self, signal: Signal) {
        if self.is_alive() {
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }

    /// Stops it, and waits until all of its threads have stopped.
    pub fn stop(&self) {
        self.signal(Signal::SIGSTOP);
        let threads = format!("/proc/{}/task", self.pid);
        let is_stopped = |thread: fs::DirEntry| {
            let id = thread.file_name().to_str()?.parse().ok()?;
            Some(stat(id)?[0] == "T")
        };
        super::eventually("all threads stop", || {
            let mut threads = fs::read_dir(&threads).ok()?;
            threads.all(|thread| thread.ok().and_then(is_stopped) == Some(true)).then_some(())
        });
    }

    /// What its open descriptors refer to, such as `socket:[123]`.
    pub fn fds(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", self.pid)) else { return Vec::new() };
        entries
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .map(|target: PathBuf| target.to_string_lossy().into_owned())
            .collect()
    }

    /// How many of them are of this kind, such as `socket` or `pipe`.
    pub fn count_fds(&self, kind: &str) -> usize {
        let is_one = |target: &String| target.split(':').next() == Some(kind);
        self.fds().iter().filter(|target| is_one(target)).count()
    }

    /// The sockets in its epoll sets, by number.
    pub fn in_sets(&self) -> Vec<RawFd> {
        let directory = format!("/proc/{}/fdinfo", self.pid);
        let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
        let texts = entries.filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok());
        let number =
            |line: &str| line.strip_prefix("tfd:")?.split_whitespace().next()?.parse().ok();
        let is_socket = |fd: &RawFd| {
            let target = fs::read_link(format!("/proc/{}/fd/{fd}", self.pid));
            target.is_ok_and(|target| target.to_string_lossy().starts_with("socket:"))
        };
        let numbers = texts.flat_map(|text| text.lines().filter_map(number).collect::<Vec<_>>());
        numbers.filter(is_socket).collect()
    }

    /// Sets its soft limit of descriptors; returns the one it had.
    pub fn limit_descriptors(&self, limit: u64) -> u64 {
        let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        let none = std::ptr::null();
        // SAFETY: both structures live until the calls return.
        let result = unsafe {
            match libc::prlimit(self.pid, libc::RLIMIT_NOFILE, none, &raw mut before) {
                0 => {
                    let wanted = libc::rlimit { rlim_cur: limit, ..before };
                    let none = std::ptr::null_mut();
                    libc::prlimit(self.pid, libc::RLIMIT_NOFILE, &raw const wanted, none)
                }
                failed => failed,
            }
        };
        nix::errno::Errno::result(result).unwrap();
        before.rlim_cur
    }

    /// The limit that leaves it room for `count` more descriptors.
    pub fn limit_for_more(&self, count: usize) -> u64 {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.pid)).unwrap();
        let taken: Vec<u64> =
            entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
        (0..).filter(|number| !taken.contains(number)).nth(count).unwrap()
    }

    /// Resident memory in bytes.
    pub fn rss_bytes(&self) -> u64 {
        self.status("VmRSS:") * 1024
    }

    /// Processor time it has taken, in ticks of a hundredth of a second.
    pub fn cpu_ticks(&self) -> u64 {
        let times = stat(self.pid).map(|stat| [stat[11].parse(), stat[12].parse()]);
        times.into_iter().flatten().map(|ticks: Result<u64, _>| ticks.unwrap_or(0)).sum()
    }

    /// How often it has gone to sleep by itself.
    pub fn voluntary_switches(&self) -> u64 {
        self.status("voluntary_ctxt_switches:")
    }

    /// A number in /proc/PID/status; 0 if it is not there.
    fn status(&self, name: &str) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    }

    /// Its thread of this name, as a process of its own.
    pub fn thread(&self, name: &str) -> Option<Self> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid)).ok()?;
        tasks
            .filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok())
            .find(|id: &i32| {
                let comm = fs::read_to_string(format!("/proc/{id}/comm"));
                comm.is_ok_and(|comm| comm.trim() == name)
            })
            .and_then(Self::of)
    }

    /// How it is scheduled: SCHED_OTHER, SCHED_BATCH, ...
    pub fn scheduling_policy(&self) -> i32 {
        stat(self.pid).and_then(|stat| stat.get(38)?.parse().ok()).unwrap_or(-1)
    }

    /// The CPUs it may run on.
    pub fn cpus(&self) -> Vec<usize> {
        let set = sched_getaffinity(Pid::from_raw(self.pid)).unwrap();
        (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap()).collect()
    }

    /// Whether a debugger or strace is attached.
    pub fn is_traced(&self) -> bool {
        self.status("TracerPid:") > 0
    }

    /// The names of its threads, kernel workers (`iou-wrk-N`) included.
    pub fn thread_names(&self) -> Vec<String> {
        let Ok(tasks) = fs::read_dir(format!("/proc/{}/task", self.pid)) else { return Vec::new() };
        tasks
            .filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .map(|name| name.trim().to_owned())
            .collect()
    }
}
