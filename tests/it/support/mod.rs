//! Real parts for tests and the demo: a nats-server of one's own, the relay as a process, and the
//! one fake there is, a webhook endpoint that can misbehave on purpose.

#![allow(
    dead_code,
    unused_imports,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

mod nats;
mod relay;
mod tls;
mod webhook;

use std::time::Duration;

pub use nats::{NatsServer, next};
pub use relay::Relay;
pub use tls::Authority;
pub use webhook::{Answer, Received, Webhook};

/// Far longer than anything awaited takes; reaching it is a failure.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `condition` holds, looking again whenever a little time has passed.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(
            tokio::time::Instant::now() < deadline,
            "waited in vain until {what}"
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
