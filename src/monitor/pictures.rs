//! The pictures on the page, of the last minutes: how many messages were relayed, and how long the webhook took.

use std::{
    collections::VecDeque,
    fmt::Write,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

const MINUTES: u64 = 15;

/// How many attempts of each minute are remembered, picked at random.
const MAX_ATTEMPTS: usize = 500;

/// One of each minute in which something happened.
#[derive(Default)]
pub(super) struct Minutes(VecDeque<Minute>);

#[derive(Default)]
struct Minute {
    number: u64,
    relayed: u32,
    attempts: usize,
    took: Vec<Duration>,
}

impl Minute {
    /// Returns the durations that half of the attempts, and 95 % of them, did not exceed.
    fn quantiles(&self) -> [Duration; 2] {
        let mut took = self.took.clone();
        took.sort_unstable();
        [0.5, 0.95].map(|part| {
            let index = (took.len().saturating_sub(1) as f64 * part).round() as usize;
            took.get(index).copied().unwrap_or_default()
        })
    }
}

impl Minutes {
    pub(super) fn add_relayed(&mut self) {
        self.current().relayed += 1;
    }

    pub(super) fn add_attempt(&mut self, took: Duration) {
        let minute = self.current();
        minute.attempts += 1;
        if minute.took.len() < MAX_ATTEMPTS {
            minute.took.push(took);
        } else if let Some(other) = minute.took.get_mut(fastrand::usize(..minute.attempts)) {
            *other = took;
        }
    }

    fn current(&mut self) -> &mut Minute {
        let number = this_minute();
        if self.0.front().is_none_or(|last| last.number != number) {
            self.0.truncate(MINUTES as usize - 1);
            self.0.push_front(Minute {
                number,
                ..Minute::default()
            });
        }
        &mut self.0[0]
    }

    /// Draws them (SVG).
    pub(super) fn pictures(&self) -> String {
        let oldest = this_minute().saturating_sub(MINUTES - 1);
        let recent = self.0.iter().rev();
        let recent = recent.filter(|minute| minute.number >= oldest);
        let recent: Vec<_> = recent.map(|minute| (minute, minute.quantiles())).collect();
        let most = recent.iter().map(|(minute, _)| minute.relayed).max();
        let most = most.unwrap_or_default();
        let slowest = recent.iter().map(|(_, [_, p95])| *p95).max();
        let slowest = slowest.unwrap_or_default();
        let last = recent.last().map(|(_, quantiles)| *quantiles);
        let last = last.unwrap_or_default();
        let (mut bars, mut p50, mut p95) = (String::new(), String::new(), String::new());
        // Writing to a string never fails.
        for (minute, quantiles) in recent {
            let x = (minute.number - oldest) * 40;
            let height = 96.0 * f64::from(minute.relayed) / f64::from(most.max(1));
            let y = 100.0 - height;
            let _ = write!(
                bars,
                "<rect x=\"{x}\" y=\"{y:.1}\" width=\"36\" height=\"{height:.1}\"/>"
            );
            for (points, took) in [&mut p50, &mut p95].into_iter().zip(quantiles) {
                let part = took.as_secs_f64() / slowest.as_secs_f64().max(1e-6);
                let y = 100.0 - 96.0 * part;
                let _ = write!(points, "{x},{y:.1} {},{y:.1} ", x + 36);
            }
        }
        let figure = |label: String, content: String| {
            format!(
                "<figure><svg role=\"img\" aria-label=\"{label}\" viewBox=\"0 0 600 100\" \
                 preserveAspectRatio=\"none\">{content}</svg><figcaption>{label}</figcaption></figure>"
            )
        };
        let lines =
            format!("<polyline points=\"{p50}\"/><polyline class=\"p95\" points=\"{p95}\"/>");
        let durations = format!(
            "The webhook's answers: p50 {:.1?}, p95 (dashed) {:.1?}, highest p95 {slowest:.1?}",
            last[0], last[1]
        );
        figure(format!("Relayed a minute: up to {most}"), bars) + &figure(durations, lines)
    }
}

fn this_minute() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs() / 60
}
