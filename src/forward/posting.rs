//! POSTs one message to all destinations, until each has succeeded or the relay gives up on the message.

use std::{
    collections::BTreeMap,
    fmt,
    net::IpAddr,
    time::{Duration, Instant},
};

use futures::future::join_all;
use log::{info, warn};
use reqwest::header::HeaderValue;
use tokio::time::sleep;

use super::Forward;
use crate::{
    backoff::Backoff,
    monitor::{Attempt, Cause, DestinationMetrics},
    republish::{GivenUp, Unrelayed},
    source::Delivery,
    webhook::{Destination, Endpoint, Failure},
};

/// Growing waits between attempts to POST one message.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(250),
    longest: Duration::from_secs(30),
};

/// A message for a destination.
#[derive(Clone, Copy)]
struct Job<'a> {
    destination: &'a Destination,
    metrics: &'a DestinationMetrics,
    delivery: &'a Delivery,
    id: &'a HeaderValue,
}

/// The success of a destination.
pub(super) struct Posted {
    /// The status of its response.
    pub(super) status: u16,
    /// The number of attempts it took.
    pub(super) attempts: u32,
}

/// Writes the answers for a log line, each with a comma.
pub(super) struct Answers<'a>(pub(super) &'a [Posted]);

impl fmt::Display for Answers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|answer| match answer.attempts {
            1 => write!(f, "{}, ", answer.status),
            attempts => write!(f, "{} after {attempts} attempts, ", answer.status),
        })
    }
}

/// How POSTing to a destination ended: all its successes, or why the message is not relayed.
type Ended = Result<Vec<Posted>, Unrelayed>;

impl Forward {
    /// POSTs to all destinations at the same time, until each has succeeded or the relay gives up on it.
    pub(super) async fn post(&self, delivery: &Delivery, id: &HeaderValue) -> Ended {
        let job = |(destination, metrics)| Job {
            destination,
            metrics,
            delivery,
            id,
        };
        let mut jobs = self.webhook.destinations.iter().zip(&self.metrics).map(job);
        if jobs.len() == 1
            && let Some(only) = jobs.next()
        {
            // The usual case: nothing to join, so no allocation.
            return self.post_to(only).await;
        }
        all_of(join_all(jobs.map(|job| self.post_to(job))).await)
    }

    /// POSTs to a destination until that succeeds, or the relay gives up.
    async fn post_to(&self, job: Job<'_>) -> Ended {
        let mut attempts = 0;
        let mut ended = BTreeMap::new();
        loop {
            attempts += 1;
            let failed = if job.destination.url.every_address {
                // Boxed, so that this rare case does not enlarge the future in all others.
                Box::pin(self.attempt_every_address(job, attempts, &mut ended)).await
            } else {
                match self.attempt(job, &job.destination.endpoint, attempts).await {
                    Ok(posted) => return Ok(vec![posted]),
                    Err(failure) => vec![(None, failure)],
                }
            };
            let mut wait = None;
            for (address, failure) in failed {
                match self.next_wait(job, address, attempts, failure) {
                    Ok(next) => wait = wait.max(Some(next)),
                    Err(given_up) => drop(ended.insert(address, Err(given_up.into()))),
                }
            }
            let Some(wait) = wait else {
                return all_of(ended.into_values());
            };
            sleep(wait).await;
            if !job.delivery.may_be_posted().await {
                return Err(Unrelayed::Abandoned);
            }
        }
    }

    /// Makes one attempt to POST to each address that a name has now and that has not `ended`, at the same time. Returns
    /// the failures. Nothing is POSTed to an address that the name has lost, because it may belong to somebody else by
    /// now.
    async fn attempt_every_address(
        &self,
        job: Job<'_>,
        attempts: u32,
        ended: &mut BTreeMap<Option<IpAddr>, Ended>,
    ) -> Vec<(Option<IpAddr>, Failure)> {
        let start = Instant::now();
        let current = match job.destination.addresses(self.webhook.timeout).await {
            Ok(current) => current,
            Err(failure) => {
                self.monitor
                    .end_attempt(job.metrics, Attempt::FailedForNow, start.elapsed());
                return vec![(None, failure)];
            }
        };
        let left = current
            .into_iter()
            .filter(|(address, _)| !ended.contains_key(&Some(*address)));
        let results = left.map(async |(address, endpoint)| {
            let result = self.attempt(job, &endpoint, attempts).await;
            (Some(address), result)
        });
        let mut failed = Vec::new();
        for (address, result) in join_all(results).await {
            match result {
                Ok(posted) => drop(ended.insert(address, Ok(vec![posted]))),
                Err(failure) => failed.push((address, failure)),
            }
        }
        let is_ipv6 = |address: &Option<IpAddr>| address.is_some_and(|address| address.is_ipv6());
        let succeeded = ended.iter().filter(|(_, end)| end.is_ok());
        let succeeded: Vec<_> = succeeded.map(|(address, _)| is_ipv6(address)).collect();
        failed.retain(|(address, failure)| {
            let own = is_ipv6(address);
            // The receiver listens only on addresses of the other IP version.
            let is_futile =
                failure.is_unreachable && succeeded.contains(&!own) && !succeeded.contains(&own);
            if is_futile {
                let subject = &job.delivery.subject;
                info!(
                    subject:% = subject;
                    "{subject} has succeeded over the other IP version, so it is not sent to {} again: {}",
                    job.name(*address),
                    failure.reason
                );
            }
            !is_futile
        });
        failed
    }

    /// Makes one attempt to POST to an endpoint.
    async fn attempt(
        &self,
        job: Job<'_>,
        endpoint: &Endpoint,
        attempts: u32,
    ) -> Result<Posted, Failure> {
        self.monitor.begin_attempt(attempts);
        let start = Instant::now();
        let answer = self
            .webhook
            .post(job.destination, endpoint, job.delivery, job.id)
            .await;
        let ended = match &answer {
            Ok(_) => Attempt::Succeeded,
            Err(failure) if failure.is_permanent => Attempt::FailedForGood,
            Err(_) => Attempt::FailedForNow,
        };
        self.monitor
            .end_attempt(job.metrics, ended, start.elapsed());
        let status = answer?.as_u16();
        Ok(Posted { status, attempts })
    }

    /// Logs a failed attempt, and returns how long to wait before the next one.
    ///
    /// # Errors
    /// If there is none.
    fn next_wait(
        &self,
        job: Job<'_>,
        address: Option<IpAddr>,
        attempts: u32,
        failure: Failure,
    ) -> Result<Duration, GivenUp> {
        let is_only = self.webhook.destinations.len() == 1 && !job.destination.url.every_address;
        let (name, status) = (job.name(address), failure.status);
        let reason = match is_only {
            true => failure.reason.clone(),
            false => format!("{name}: {}", failure.reason),
        };
        let given_up = |cause, reason| GivenUp {
            reason,
            status,
            attempts,
            cause,
        };
        if failure.is_permanent {
            return Err(given_up(Cause::Refused, reason));
        }
        if Some(attempts) == self.config.webhook.max_attempts {
            let reason = format!("gave up after {attempts} attempts: {reason}");
            return Err(given_up(Cause::AttemptsUsed, reason));
        }
        let subject = &job.delivery.subject;
        let wait = BACKOFF.wait(attempts).max(failure.retry_after);
        warn!(
            subject:% = subject, status, attempts, reason;
            "{subject}, attempt {attempts}: {reason}; next attempt in {wait:.1?}"
        );
        self.monitor
            .set_failing(format!("The webhook at {name}"), failure.reason, wait);
        Ok(wait)
    }
}

impl Job<'_> {
    /// Returns the name of the destination, or of one of its addresses.
    fn name(&self, address: Option<IpAddr>) -> String {
        let url = &self.destination.url;
        match address {
            Some(address) => format!("{url} at {address}"),
            None => url.to_string(),
        }
    }
}

/// Combines the outcomes of several destinations: all successes, or why the message is not relayed.
fn all_of(ends: impl IntoIterator<Item = Ended>) -> Ended {
    let (mut posted, mut given_up) = (Vec::new(), Vec::new());
    for end in ends {
        match end {
            Ok(successes) => posted.extend(successes),
            Err(Unrelayed::GivenUp(failure)) => given_up.push(failure),
            Err(Unrelayed::Abandoned) => return Err(Unrelayed::Abandoned),
        }
    }
    GivenUp::all(given_up).map_or(Ok(posted), |given_up| Err(given_up.into()))
}
