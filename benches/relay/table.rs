//! Figures of many rounds → a table for docs/speed.md.

use std::process::Command;

/// How many of the relays, the first ones, are yardsticks.
const YARDSTICKS: usize = 2;

/// What was measured of one relay in one round.
pub struct Figure {
    /// With the unit.
    pub name: String,
    /// The index of the relay; the yardsticks come first.
    pub relay: usize,
    pub round: usize,
    pub value: f64,
}

/// Prints the medians of all rounds, and the medians of each round's ratio to the yardsticks.
pub fn print(labels: &[&str], figures: &[Figure]) {
    let (yardsticks, others) = labels.split_at(YARDSTICKS);
    let ratios: String = yardsticks
        .iter()
        .map(|label| format!(" to {label} |"))
        .collect();
    let heads: String = others
        .iter()
        .map(|label| format!(" {label} |{ratios}"))
        .collect();
    println!("| | {} |{heads}", yardsticks.join(" | "));
    let columns = YARDSTICKS + others.len() * (1 + YARDSTICKS);
    println!("|---|{}", "--:|".repeat(columns));
    let mut names: Vec<&str> = Vec::new();
    for figure in figures {
        if !names.contains(&figure.name.as_str()) {
            names.push(&figure.name);
        }
    }
    for name in names {
        print!("| {name} |");
        let of = |relay| {
            let row = figures.iter().filter(move |figure| figure.name == name);
            row.filter(move |figure| figure.relay == relay)
        };
        for relay in 0..labels.len() {
            print!(" {} |", show(median(of(relay).map(|figure| figure.value))));
            if relay < YARDSTICKS {
                continue;
            }
            for yardstick in 0..YARDSTICKS {
                let ratios = of(relay).filter_map(|figure| {
                    let same_round = |other: &&Figure| other.round == figure.round;
                    let value = of(yardstick).find(same_round)?.value;
                    (value > 0.0).then_some(figure.value / value)
                });
                let ratio = median(ratios).map(|ratio| format!("{ratio:.2}"));
                print!(" {} |", ratio.as_deref().unwrap_or("–"));
            }
        }
        println!();
    }
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = values[(values.len() - 1) / 2];
    Some(f64::midpoint(lower, upper))
}

/// Shows three digits or more, and sets thousands apart.
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
pub fn circumstances() -> anyhow::Result<String> {
    let script = "date +%F
        sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1
        uname -sr
        nats-server --version
        rustc --version | cut -d ' ' -f 1,2";
    let output = Command::new("sh").args(["-c", script]).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.trim_end().replace('\n', ", "))
}
