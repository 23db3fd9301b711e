//! Names of namespaces that a test makes, changes and deletes: links, which need no privilege, and
//! mounts as `ip netns` makes them; and processes with an id that was chosen before.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;

use crate::support::{Netns, TempDir};

/// A directory for names.
pub struct Names(TempDir);

impl Names {
    pub fn new() -> Self {
        Self(TempDir::new())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Makes `name` stand for the namespace from now on, whatever it stood for: in one step.
    pub fn link(&self, name: &str, netns: &Netns) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let new = self.path("new");
        symlink(netns.path(), &new).unwrap();
        fs::rename(new, path).unwrap();
    }

    /// A file that is no namespace.
    pub fn empty_file(&self, name: &str) {
        fs::write(self.path(name), "").unwrap();
    }

    /// Mounts the namespace on the file; it is unmounted at the end.
    pub fn mount(&self, name: &str, netns: &Netns) -> io::Result<()> {
        let [source, target] = [netns.path(), self.path(name)].map(|path| c_string(&path));
        let none = std::ptr::null();
        // SAFETY: the paths live until the call returns, and a bind mount has no data.
        let result = unsafe {
            libc::mount(source.as_ptr(), target.as_ptr(), none, libc::MS_BIND, none.cast())
        };
        Errno::result(result).map(drop).map_err(Into::into)
    }

    /// Deletes the name as `ip netns delete` does.
    pub fn delete(&self, name: &str) {
        let path = self.path(name);
        unmount(&path);
        fs::remove_file(path).unwrap();
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.0.path()).into_iter().flatten().flatten() {
            unmount(&entry.path());
        }
    }
}

fn unmount(path: &Path) {
    let path = c_string(path);
    // SAFETY: the path lives until the call returns. Nothing mounted there is as good.
    let _ = unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) };
}

fn c_string(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

/// A process that does nothing. Dropped, it is killed.
pub struct Sleeper(libc::pid_t);

impl Sleeper {
    /// A high process id that is not in use, another one for each call: the kernel comes to it
    /// late.
    pub fn unused_pid() -> libc::pid_t {
        static GIVEN: AtomicUsize = AtomicUsize::new(0);
        let max: libc::pid_t =
            fs::read_to_string("/proc/sys/kernel/pid_max").unwrap().trim().parse().unwrap();
        let ids = (1..max).rev().skip(GIVEN.fetch_add(100, Ordering::Relaxed));
        ids.take(100).find(|pid| !Path::new(&format!("/proc/{pid}")).exists()).unwrap()
    }

    pub fn pid(&self) -> libc::pid_t {
        self.0
    }

    /// A child of this process, in the calling thread's namespaces.
    pub fn with_pid(pid: libc::pid_t) -> io::Result<Self> {
        // SAFETY: all zeroes is a valid value of these plain numbers.
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        let ids = [pid];
        args.exit_signal = libc::SIGCHLD as u64;
        args.set_tid = ids.as_ptr() as u64;
        args.set_tid_size = 1;
        // SAFETY: the arguments live until the call returns. The child, which has a copy of this
        // memory and none of the other threads, does nothing but system calls.
        let child = unsafe {
            match libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) {
                0 => loop {
                    // It must not outlive a test that is killed by much.
                    libc::alarm(300);
                    libc::pause();
                },
                child => child,
            }
        };
        Errno::result(child).map(|child| Self(child as libc::pid_t)).map_err(Into::into)
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // SAFETY: both calls take numbers; the child has not been reaped yet, so the id is its.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}
