//! POSTing one message to all destinations, until each has succeeded or is to be given up.

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

/// At the start a name gets this long to resolve.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(1);

/// What POSTs messages.
pub(super) struct Posting {
    webhook: Webhook,
    max_attempts: Option<u32>,
    monitor: Arc<Monitor>,
    /// In the order of the webhook's destinations.
    metrics: Vec<DestinationMetrics>,
}

/// A message that a destination is to get.
#[derive(Clone, Copy)]
struct Job<'a> {
    destination: &'a Destination,
    /// The one of its addresses that is to get it, where each is a destination of its own.
    address: Option<(IpAddr, &'a Families)>,
    metrics: &'a DestinationMetrics,
    delivery: &'a Delivery,
    id: &'a HeaderValue,
}

/// What the addresses of a name have done with a message: those of IPv4, and those of IPv6.
#[derive(Default)]
struct Families {
    answered: [AtomicBool; 2],
    succeeded: [AtomicBool; 2],
}

impl Families {
    /// Notes what an attempt has met. Returns whether the address is not to be waited for: its family refuses all
    /// connections, as where the receiver listens on the other one alone, which has succeeded.
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
    /// How it answered.
    pub(super) status: StatusCode,
    /// After how many attempts.
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
    /// are. A name without any is no reason not to start.
    pub(super) async fn resolve_names(&self) {
        for destination in self.webhook.destinations() {
            if let Reach::EveryAddress(addresses) = &destination.reach {
                let _ = timeout(RESOLVE_TIMEOUT, addresses.current()).await;
            }
        }
    }

    /// Where messages are POSTed to, in words.
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

    /// POSTs to all destinations at the same time, until each has succeeded or is to be given up.
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
            // The usual case: there is nothing to join, and so no future to allocate.
            return self.post_to_destination(&job(only)).await;
        }
        let ends = join_all(jobs.map(async |each| self.post_to_destination(&job(each)).await));
        all_of(ends.await)
    }

    async fn post_to_destination(&self, job: &Job<'_>) -> Result<Vec<Posted>, Unrelayed> {
        match &job.destination.reach {
            Reach::Name(endpoint) => self.post_to(job, endpoint).await,
            // In a box: what few relays do must not enlarge the future that all others have.
            Reach::EveryAddress(addresses) => Box::pin(self.post_to_every(job, addresses)).await,
        }
    }

    /// POSTs to every address that a name has now, at the same time. Those that are gone from it by the next
    /// attempt are not waited for; where all are, those that have come instead are told.
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
            let failure = temporary("every address that its name had is gone".to_owned());
            self.wait_or_give_up(job, attempts, failure).await?;
        }
    }

    /// The addresses that a name has now. As long as it has none, nobody knows whose any address is, so that
    /// nothing is POSTed to it: that is a failed attempt.
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

    /// POSTs to one endpoint until that succeeds, or is to be given up; nothing if it is one address of
    /// several, and gone.
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
                    "{} is not POSTed to {} at {address} any more: its name has lost this address",
                    job.delivery.subject, job.destination.url
                );
                return Ok(Vec::new());
            }
        }
    }

    /// An attempt has failed, maybe at one address of several: waits for the time of the next one.
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
            let reason = format!("given up after {attempts} attempts: {}", named(&reason));
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

fn ended(failure: &Failure) -> Attempt {
    match failure {
        Failure::Temporary { .. } => Attempt::FailedForNow,
        Failure::Permanent { .. } => Attempt::FailedForGood,
    }
}

/// What has become of a message that was POSTed to several: all successes, or why it is not relayed.
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
