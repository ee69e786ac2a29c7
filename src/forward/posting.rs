//! POSTs one message to all destinations, until each has succeeded or the relay gives up on the message.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use futures::future::join_all;
use log::{info, warn};
use reqwest::{StatusCode, header::HeaderValue};
use tokio::time::{sleep, timeout};

use crate::{
    backoff::Backoff,
    config::Config,
    monitor::{Attempt, Cause, DestinationMetrics, Monitor},
    republish::{GivenUp, Unrelayed},
    source::Delivery,
    webhook::{Addresses, Destination, Endpoint, Failure, Reach, Webhook, temporary},
};

/// Growing waits between attempts to POST one message.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(250),
    longest: Duration::from_secs(30),
};

/// How long a name may take to resolve at the start.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(1);

/// POSTs messages, with retries.
pub(super) struct Posting {
    webhook: Webhook,
    max_attempts: Option<u32>,
    monitor: Arc<Monitor>,
    /// In the order of the webhook's destinations.
    metrics: Vec<DestinationMetrics>,
}

/// A message for a destination.
#[derive(Clone, Copy)]
struct Job<'a> {
    destination: &'a Destination,
    /// The address that gets it, if each address is a destination of its own.
    address: Option<(IpAddr, &'a Families)>,
    metrics: &'a DestinationMetrics,
    delivery: &'a Delivery,
    id: &'a HeaderValue,
}

/// How the IPv4 and the IPv6 addresses of a name have responded to a message.
#[derive(Default)]
struct Families {
    answered: [AtomicBool; 2],
    succeeded: [AtomicBool; 2],
}

impl Families {
    /// Notes the result of an attempt. Returns whether not to wait for the address, because all addresses of its family
    /// refuse connections and one of the other family has succeeded: the receiver listens only on that one.
    fn may_be_left(&self, address: IpAddr, answer: &Result<StatusCode, Failure>) -> bool {
        let own = usize::from(address.is_ipv6());
        self.succeeded[own].fetch_or(answer.is_ok(), Relaxed);
        let is_refused = matches!(
            answer,
            Err(Failure::Temporary {
                is_refused: true,
                ..
            })
        );
        let has_answered = self.answered[own].fetch_or(!is_refused, Relaxed);
        is_refused && !has_answered && self.succeeded[1 - own].load(Relaxed)
    }
}

/// A destination has succeeded.
pub(super) struct Posted {
    /// The status of its response.
    pub(super) status: StatusCode,
    /// The number of attempts it took.
    pub(super) attempts: u32,
}

impl Posting {
    pub(super) fn new(webhook: Webhook, config: &Config, monitor: &Arc<Monitor>) -> Self {
        let metrics = (0..webhook.destinations().len()).map(|index| monitor.destination(index));
        Self {
            metrics: metrics.collect(),
            max_attempts: config.webhook.max_attempts,
            monitor: Arc::clone(monitor),
            webhook,
        }
    }

    /// Resolves the names of which every address has to succeed, so that the log says at the start how many there
    /// are. A name without any does not prevent the start.
    pub(super) async fn resolve_names(&self) {
        for destination in self.webhook.destinations() {
            if let Reach::EveryAddress(addresses) = &destination.reach {
                let _ = timeout(RESOLVE_TIMEOUT, addresses.current()).await;
            }
        }
    }

    /// Describes where messages are POSTed to.
    pub(super) fn destinations(&self) -> String {
        let destinations = self.webhook.destinations().iter();
        let names: Vec<_> = destinations
            .map(|destination| match destination.reach {
                Reach::Name(_) => destination.url.to_string(),
                Reach::EveryAddress(_) => {
                    format!("{} at every address of its name", destination.url)
                }
            })
            .collect();
        names.join(" and ")
    }

    /// POSTs to all destinations at the same time, until each has succeeded or the relay gives up on it.
    pub(super) async fn post(
        &self,
        delivery: &Delivery,
        id: &HeaderValue,
    ) -> Result<Vec<Posted>, Unrelayed> {
        let job = |(destination, metrics)| Job {
            destination,
            address: None,
            metrics,
            delivery,
            id,
        };
        let mut jobs = self.webhook.destinations().iter().zip(&self.metrics);
        if jobs.len() == 1
            && let Some(only) = jobs.next()
        {
            // The usual case: nothing to join, so no allocation.
            return self.post_to_destination(&job(only)).await;
        }
        let ends = join_all(jobs.map(async |each| self.post_to_destination(&job(each)).await));
        all_of(ends.await)
    }

    async fn post_to_destination(&self, job: &Job<'_>) -> Result<Vec<Posted>, Unrelayed> {
        match &job.destination.reach {
            Reach::Name(endpoint) => self.post_to(job, endpoint).await,
            // Boxed, so that this rare case does not enlarge the future in all others.
            Reach::EveryAddress(addresses) => Box::pin(self.post_to_every(job, addresses)).await,
        }
    }

    /// POSTs to every address that a name has now, at the same time. An address that the name has lost by the next
    /// attempt is not waited for; if it has lost them all, its new addresses get the message.
    async fn post_to_every(
        &self,
        job: &Job<'_>,
        addresses: &Addresses,
    ) -> Result<Vec<Posted>, Unrelayed> {
        let mut attempts = 0;
        let families = &Families::default();
        loop {
            let current = self.look_up(job, addresses, &mut attempts).await?;
            let ends = join_all(current.iter().map(async |(address, endpoint)| {
                let address = Some((*address, families));
                self.post_to(&Job { address, ..*job }, endpoint).await
            }));
            let posted = all_of(ends.await)?;
            if !posted.is_empty() {
                return Ok(posted);
            }
            attempts += 1;
            let failure = temporary("its name has lost all of its addresses".to_owned());
            self.wait_or_give_up(job, attempts, failure).await?;
        }
    }

    /// Looks up the addresses that a name has now. A name without any address is a failed attempt: nothing is POSTed
    /// to its earlier addresses, because they may belong to somebody else by now.
    async fn look_up(
        &self,
        job: &Job<'_>,
        addresses: &Addresses,
        attempts: &mut u32,
    ) -> Result<Vec<(IpAddr, Arc<Endpoint>)>, Unrelayed> {
        loop {
            let start = Instant::now();
            let failure = match addresses.current().await {
                Ok(current) => return Ok(current),
                Err(failure) => failure,
            };
            self.monitor
                .end_attempt(job.metrics, ended(&failure), start.elapsed());
            *attempts += 1;
            self.wait_or_give_up(job, *attempts, failure).await?;
        }
    }

    /// POSTs to one endpoint until that succeeds, or the relay gives up. Returns nothing if the endpoint is one
    /// address of several, and its name has lost it.
    async fn post_to(&self, job: &Job<'_>, endpoint: &Endpoint) -> Result<Vec<Posted>, Unrelayed> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            self.monitor.begin_attempt(attempts);
            let start = Instant::now();
            let answer = self
                .webhook
                .post(job.destination, endpoint, job.delivery, job.id)
                .await;
            let may_be_left = job
                .address
                .is_some_and(|(address, families)| families.may_be_left(address, &answer));
            let failure = match answer {
                Ok(status) => {
                    self.monitor
                        .end_attempt(job.metrics, Attempt::Succeeded, start.elapsed());
                    return Ok(vec![Posted { status, attempts }]);
                }
                Err(failure) => failure,
            };
            self.monitor
                .end_attempt(job.metrics, ended(&failure), start.elapsed());
            let (Reach::EveryAddress(addresses), Some((address, _))) =
                (&job.destination.reach, job.address)
            else {
                self.wait_or_give_up(job, attempts, failure).await?;
                continue;
            };
            if may_be_left {
                let (subject, url) = (&job.delivery.subject, &job.destination.url);
                info!(
                    subject:% = subject;
                    "{subject} is not POSTed to {url} at {address}, which refuses connections, as it has \
                     succeeded at an address of the other IP version; take this one out of the name's addresses"
                );
                return Ok(Vec::new());
            }
            self.wait_or_give_up(job, attempts, failure).await?;
            let current = Box::pin(self.look_up(job, addresses, &mut attempts)).await?;
            if current.iter().all(|(known, _)| *known != address) {
                info!(
                    subject:% = job.delivery.subject;
                    "{} is no longer POSTed to {} at {address}: its name has lost this address",
                    job.delivery.subject, job.destination.url
                );
                return Ok(Vec::new());
            }
        }
    }

    /// After a failed attempt, waits until the next one is due.
    ///
    /// # Errors
    /// If there is to be none.
    async fn wait_or_give_up(
        &self,
        job: &Job<'_>,
        attempts: u32,
        failure: Failure,
    ) -> Result<(), Unrelayed> {
        let Destination { url, reach, .. } = job.destination;
        let name = match job.address {
            Some((address, _)) => format!("{url} at {address}"),
            None => url.to_string(),
        };
        let is_only = matches!((reach, self.webhook.destinations()), (Reach::Name(_), [_]));
        let named = |reason: &str| match is_only {
            true => reason.to_owned(),
            false => format!("{name}: {reason}"),
        };
        let (reason, status, retry_after) = match failure {
            Failure::Permanent { reason, status } => {
                let given_up = GivenUp {
                    reason: named(&reason),
                    status: Some(status.as_u16()),
                    attempts,
                    cause: Cause::Refused,
                };
                return Err(given_up.into());
            }
            Failure::Temporary {
                reason,
                status,
                retry_after,
                ..
            } => (reason, status.map(|status| status.as_u16()), retry_after),
        };
        if Some(attempts) == self.max_attempts {
            let reason = format!("gave up after {attempts} attempts: {}", named(&reason));
            let given_up = GivenUp {
                reason,
                status,
                attempts,
                cause: Cause::AttemptsUsed,
            };
            return Err(given_up.into());
        }
        let subject = &job.delivery.subject;
        let wait = BACKOFF.wait(attempts).max(retry_after.unwrap_or_default());
        let text = named(&reason);
        warn!(
            subject:% = subject, status, attempts, reason = text;
            "{subject}, attempt {attempts}: {text}; next attempt in {wait:.1?}"
        );
        self.monitor
            .set_failing(format!("The webhook at {name}"), reason, wait);
        sleep(wait).await;
        match job.delivery.may_be_posted().await {
            true => Ok(()),
            false => Err(Unrelayed::Abandoned),
        }
    }
}

/// Returns the label under which a failure is counted.
fn ended(failure: &Failure) -> Attempt {
    match failure {
        Failure::Temporary { .. } => Attempt::FailedForNow,
        Failure::Permanent { .. } => Attempt::FailedForGood,
    }
}

/// Combines the outcomes of several destinations: all successes, or why the message is not relayed.
fn all_of(ends: Vec<Result<Vec<Posted>, Unrelayed>>) -> Result<Vec<Posted>, Unrelayed> {
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
