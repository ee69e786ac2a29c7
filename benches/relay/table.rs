//! Figures of many rounds → a table for the README.

use std::{
    collections::HashMap,
    fmt::{self, Write},
    fs,
    process::Command,
    time::SystemTime,
};

use crate::cpus::Cpus;

/// What one round of one relay yields: names with units, and values.
pub type Figures = Vec<(String, f64)>;

/// The figures of all rounds. The floor is the relay number `floor`.
pub struct Table {
    labels: Vec<String>,
    floor: usize,
    /// The names, in the order of their first appearance.
    names: Vec<String>,
    /// By name: for each round, for each relay.
    values: HashMap<String, Vec<Vec<Option<f64>>>>,
}

impl Table {
    pub fn new(labels: Vec<String>, floor: usize) -> Self {
        Self {
            labels,
            floor,
            names: Vec::new(),
            values: HashMap::new(),
        }
    }

    /// Adds a round: the figures of each relay, none where it failed.
    pub fn add(&mut self, round: &[Option<Figures>]) {
        for (name, _) in round.iter().flatten().flatten() {
            if self.names.contains(name) {
                continue;
            }
            self.names.push(name.clone());
        }
        for name in &self.names {
            let values: Vec<_> = round
                .iter()
                .map(|figures| {
                    let mut figures = figures.iter().flatten();
                    figures.find(|(known, _)| known == name).map(|pair| pair.1)
                })
                .collect();
            if values.iter().any(Option::is_some) {
                self.values.entry(name.clone()).or_default().push(values);
            }
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut head, mut line) = ("| |".to_owned(), "|---|".to_owned());
        for (relay, label) in self.labels.iter().enumerate() {
            if relay == self.floor {
                let _ = write!(head, " {label} |");
                line.push_str("--:|");
            } else {
                let _ = write!(head, " {label} | to floor |");
                line.push_str("--:|--:|");
            }
        }
        writeln!(f, "{head}\n{line}")?;
        for name in &self.names {
            write!(f, "| {name} |")?;
            let rounds = &self.values[name];
            for relay in 0..self.labels.len() {
                let values = rounds.iter().filter_map(|values| values[relay]);
                write!(f, " {} |", show(median(values)))?;
                if relay != self.floor {
                    let ratios = rounds.iter().filter_map(|values| {
                        Some(values[relay]? / values[self.floor].filter(|value| *value > 0.0)?)
                    });
                    let ratio = median(ratios).map(|ratio| format!("{ratio:.2}"));
                    write!(f, " {} |", ratio.as_deref().unwrap_or("–"))?;
                }
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

pub fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        length if length % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// Three digits or more, and thousands apart.
fn show(value: Option<f64>) -> String {
    match value {
        None => "–".to_owned(),
        Some(value) if value >= 1000.0 => {
            let whole = format!("{value:.0}");
            let (thousands, rest) = whole.split_at(whole.len() - 3);
            format!("{thousands},{rest}")
        }
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) if value >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}

/// What was measured on what, and when.
pub fn circumstances(program_bytes: u64, cpus: &Cpus) -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let cpu = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown CPU", |(_, model)| model);
    let kernel = read("/proc/sys/kernel/osrelease");
    let time = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    let date = time.split('T').next().unwrap_or_default();
    format!(
        "{date}, {cpu}, {cpus}, Linux {}; nats-webhook-relay {} ({:.1} MB), {}, {}",
        kernel.trim(),
        env!("CARGO_PKG_VERSION"),
        program_bytes as f64 / 1e6,
        version("nats-server", "--version"),
        version("rustc", "--version"),
    )
}

fn version(program: &str, flag: &str) -> String {
    let output = Command::new(program).arg(flag).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let text = text.unwrap_or_default();
    let words: Vec<_> = text.split_whitespace().take(2).collect();
    words.join(" ")
}
