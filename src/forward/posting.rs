//! POSTing one message to all destinations, until each has succeeded or is to be given up.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::join_all;
use log::{info, warn};
use reqwest::{StatusCode, header::HeaderValue};
use tokio::time::sleep;

use crate::{
    backoff::Backoff,
    config::Config,
    monitor::{DestinationMetrics, Monitor},
    republish::{Cause, GivenUp},
    source::Delivery,
    webhook::{Addresses, Destination, Endpoint, Failure, Webhook},
};

/// Growing waits between attempts to POST one message.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(250),
    longest: Duration::from_secs(30),
};

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
    metrics: &'a DestinationMetrics,
    delivery: &'a Delivery,
    id: &'a HeaderValue,
}

/// How it is POSTed.
#[derive(Clone, Copy)]
enum Route<'a> {
    /// To whatever its name leads to.
    Name(&'a Endpoint),
    /// To one of the addresses of its name.
    Address(&'a Addresses, IpAddr, &'a Endpoint),
}

impl<'a> Route<'a> {
    fn endpoint(self) -> &'a Endpoint {
        match self {
            Self::Name(endpoint) | Self::Address(_, _, endpoint) => endpoint,
        }
    }
}

/// An attempt that has failed, and that another one may make good.
struct FailedAttempt {
    attempts: u32,
    reason: String,
    status: Option<u16>,
    retry_after: Option<Duration>,
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

    /// Where messages are POSTed to, in words.
    pub(super) fn destinations(&self) -> String {
        let destinations = self.webhook.destinations().iter();
        let names: Vec<_> = destinations
            .map(|destination| match destination.addresses {
                None => destination.url.to_string(),
                Some(_) => format!("{} at every address of its name", destination.url),
            })
            .collect();
        names.join(" and ")
    }

    /// POSTs to all destinations at the same time, until each has succeeded or is to be given up.
    pub(super) async fn post(
        &self,
        delivery: &Delivery,
        id: &HeaderValue,
    ) -> Result<Vec<Posted>, GivenUp> {
        let destinations = self.webhook.destinations().iter().zip(&self.metrics);
        let ends = join_all(destinations.map(async |(destination, metrics)| {
            let job = Job {
                destination,
                metrics,
                delivery,
                id,
            };
            match &destination.addresses {
                None => self.post_to(job, Route::Name(&destination.endpoint)).await,
                Some(addresses) => self.post_to_every(job, addresses).await,
            }
        }));
        all_of(ends.await)
    }

    /// POSTs to every address that a name has now, at the same time. Those that are gone from it by the next
    /// attempt are not waited for; where all are, those that have come instead are told.
    async fn post_to_every(
        &self,
        job: Job<'_>,
        addresses: &Addresses,
    ) -> Result<Vec<Posted>, GivenUp> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let start = Instant::now();
            let reason = match addresses.current().await {
                Ok(current) => {
                    let ends = join_all(current.iter().map(|(address, endpoint)| {
                        let route = Route::Address(addresses, *address, endpoint);
                        self.post_to(job, route)
                    }));
                    let posted = all_of(ends.await)?;
                    if !posted.is_empty() {
                        return Ok(posted);
                    }
                    "every address that its name had is gone".to_owned()
                }
                Err(reason) => {
                    job.metrics.add_unresolved(start.elapsed());
                    reason
                }
            };
            let reason = format!("{}: {reason}", job.destination.url);
            let failure = FailedAttempt {
                attempts,
                reason,
                status: None,
                retry_after: None,
            };
            self.wait_or_give_up(job, failure).await?;
        }
    }

    /// POSTs along one route until that succeeds, or is to be given up; nothing if its address is gone.
    async fn post_to(&self, job: Job<'_>, route: Route<'_>) -> Result<Vec<Posted>, GivenUp> {
        let Job {
            destination,
            metrics,
            delivery,
            id,
        } = job;
        let endpoint = route.endpoint();
        let name = |reason: String| match (route, self.webhook.destinations()) {
            (Route::Address(_, address, _), _) => {
                format!("{} at {address}: {reason}", destination.url)
            }
            (Route::Name(_), [_]) => reason,
            (Route::Name(_), _) => format!("{}: {reason}", destination.url),
        };
        let mut attempts = 0;
        loop {
            attempts += 1;
            let start = Instant::now();
            let answer = self.webhook.post(destination, endpoint, delivery, id).await;
            metrics.add_attempt(&answer, start.elapsed());
            let failure = match answer {
                Ok(status) => return Ok(vec![Posted { status, attempts }]),
                Err(Failure::Permanent { reason, status }) => {
                    let (reason, status) = (name(reason), Some(status.as_u16()));
                    return Err(GivenUp {
                        reason,
                        status,
                        attempts,
                        cause: Cause::Refused,
                    });
                }
                Err(Failure::Temporary {
                    reason,
                    status,
                    retry_after,
                }) => FailedAttempt {
                    attempts,
                    reason: name(reason),
                    status: status.map(|status| status.as_u16()),
                    retry_after,
                },
            };
            self.wait_or_give_up(job, failure).await?;
            if let Route::Address(addresses, address, _) = route
                && !self
                    .has_address(job, addresses, address, &mut attempts)
                    .await?
            {
                info!(
                    subject:% = delivery.subject;
                    "{} is not POSTed to {} at {address} any more: its name has lost this address",
                    delivery.subject, destination.url
                );
                return Ok(Vec::new());
            }
        }
    }

    /// Whether a name still has an address. While it does not resolve, nobody knows whose that is now, so that
    /// nothing is POSTed to it: that is a failed attempt.
    async fn has_address(
        &self,
        job: Job<'_>,
        addresses: &Addresses,
        address: IpAddr,
        attempts: &mut u32,
    ) -> Result<bool, GivenUp> {
        loop {
            let start = Instant::now();
            let reason = match addresses.current().await {
                Ok(current) => return Ok(current.iter().any(|(known, _)| *known == address)),
                Err(reason) => reason,
            };
            job.metrics.add_unresolved(start.elapsed());
            *attempts += 1;
            let failure = FailedAttempt {
                attempts: *attempts,
                reason: format!("{} at {address}: {reason}", job.destination.url),
                status: None,
                retry_after: None,
            };
            self.wait_or_give_up(job, failure).await?;
        }
    }

    /// Waits for the time of the next attempt.
    ///
    /// # Errors
    /// If there is to be none.
    async fn wait_or_give_up(&self, job: Job<'_>, failure: FailedAttempt) -> Result<(), GivenUp> {
        let FailedAttempt {
            attempts,
            reason,
            status,
            retry_after,
        } = failure;
        if Some(attempts) == self.max_attempts {
            let reason = format!("given up after {attempts} attempts: {reason}");
            return Err(GivenUp {
                reason,
                status,
                attempts,
                cause: Cause::AttemptsUsed,
            });
        }
        let subject = &job.delivery.subject;
        let wait = BACKOFF.wait(attempts).max(retry_after.unwrap_or_default());
        let failure = format!("{subject}, attempt {attempts}: {reason}");
        warn!(
            subject:% = subject, status, attempts, reason;
            "{failure}; next attempt in {wait:.1?}"
        );
        self.monitor.set_last_failure(failure);
        sleep(wait).await;
        Ok(())
    }
}

/// What has become of a message that was POSTed to several: all successes, or why it is given up.
fn all_of(ends: Vec<Result<Vec<Posted>, GivenUp>>) -> Result<Vec<Posted>, GivenUp> {
    let (mut posted, mut given_up) = (Vec::new(), Vec::new());
    for end in ends {
        match end {
            Ok(successes) => posted.extend(successes),
            Err(failure) => given_up.push(failure),
        }
    }
    GivenUp::all(given_up).map_or(Ok(posted), Err)
}
