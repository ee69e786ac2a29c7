//! A relay as a process: on which CPU it runs, and what the kernel knows about it (proc(5)).
//!
//! Left to the scheduler, a relay shares a CPU with the webhook at one time and not at another, and
//! a message then takes up to 2.5 times as long, whatever the relay. So the relay has a CPU to
//! itself; the server, the webhook and the load share another.

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
};

use anyhow::Context;

const RELAY_CPU: usize = 0;
const ALL_ELSE_CPU: usize = 1;

/// The unit of the times in /proc/PID/stat: USER_HZ is 100 on every Linux.
const MICROS_PER_TICK: f64 = 10_000.0;

/// A running relay; killed when dropped.
pub struct Process(Child);

impl Process {
    /// Nothing is in its environment but `PATH` and `variables`; its log goes to a file.
    pub fn start(
        command: &[OsString],
        variables: &[(&str, &str)],
        log: &Path,
    ) -> anyhow::Result<Self> {
        let mut relay = Command::new(&command[0]);
        relay
            .args(&command[1..])
            .env_clear()
            .envs(env::var_os("PATH").map(|path| ("PATH", path)))
            .envs(variables.iter().copied())
            .current_dir(log.parent().context("the log is in no directory")?)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(log)?);
        // A process starts where the thread that starts it runs.
        pin(RELAY_CPU);
        let child = relay.spawn();
        pin(ALL_ELSE_CPU);
        Ok(Self(child?))
    }

    /// Microseconds of CPU time, as user and as system.
    pub fn cpu(&self) -> anyhow::Result<(f64, f64)> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        // The second field, the name in parentheses, may hold anything.
        let (_, fields) = stat.rsplit_once(") ").context("unknown /proc/PID/stat")?;
        let fields: Vec<_> = fields.split(' ').collect();
        let micros = |ticks: &str| anyhow::Ok(ticks.parse::<f64>()? * MICROS_PER_TICK);
        Ok((micros(fields[11])?, micros(fields[12])?))
    }

    /// Resident memory in MB: `VmRSS` is the current one, `VmHWM` the most so far.
    pub fn memory(&self, field: &str) -> anyhow::Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find(|line| line.starts_with(field));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(kib.context("unknown /proc/PID/status")?.parse::<f64>()? * 1024.0 / 1e6)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Moves this thread, and all that it will start, to the CPU of everything but the relay. Returns
/// what the table says of the CPUs.
pub fn pin_all_else() -> String {
    let count = thread::available_parallelism().map_or(1, Into::into);
    match count > 1 && pin(RELAY_CPU) && pin(ALL_ELSE_CPU) {
        true => format!("CPUs: {count}, one for the relay and one for all else"),
        false => format!("CPUs: {count}, shared"),
    }
}

/// Moves this thread to a CPU. Returns whether the system allows it.
#[cfg(target_os = "linux")]
fn pin(cpu: usize) -> bool {
    let mut cpus = rustix::thread::CpuSet::new();
    cpus.set(cpu);
    rustix::thread::sched_setaffinity(None, &cpus).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn pin(_: usize) -> bool {
    false
}
