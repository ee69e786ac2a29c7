//! A relay as a process, and what the kernel knows about it (proc(5)).

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::Context;

/// What counts as a tick in /proc/PID/stat: USER_HZ is 100 on every Linux.
const SECONDS_PER_TICK: f64 = 0.01;

/// A running relay; killed when dropped.
pub struct Process(Child);

/// Seconds of CPU time.
#[derive(Clone, Copy)]
pub struct Cpu {
    pub user: f64,
    pub system: f64,
}

impl Process {
    /// With nothing in its environment but `PATH` and `variables`; its log goes to a file.
    pub fn start(
        command: &mut Command,
        variables: &[(&str, &str)],
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let child = command
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .envs(variables.iter().copied())
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(directory.join("relay.log"))?)
            .spawn()?;
        Ok(Self(child))
    }

    pub fn cpu(&self) -> anyhow::Result<Cpu> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        // The second field, the name in parentheses, may hold anything.
        let (_, fields) = stat.rsplit_once(") ").context("unknown /proc/PID/stat")?;
        let mut ticks = fields.split(' ').skip(11).map(str::parse::<f64>);
        let mut next = || ticks.next().context("unknown /proc/PID/stat");
        Ok(Cpu {
            user: next()?? * SECONDS_PER_TICK,
            system: next()?? * SECONDS_PER_TICK,
        })
    }

    /// Resident memory in MB: `VmRSS` for now, `VmHWM` for the most so far.
    pub fn memory(&self, field: &str) -> anyhow::Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        Ok(kib.context("unknown /proc/PID/status")?.parse::<f64>()? * 1024.0 / 1e6)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
