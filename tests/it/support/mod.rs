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

mod lanes;
mod nats;
mod proxy;
mod relay;
mod scene;
mod tls;
mod webhook;

use std::{
    fmt::Debug,
    net::{SocketAddr, TcpListener},
    time::Duration,
};

pub use lanes::{Lanes, out_of_order};
pub use nats::{NatsServer, next, publish_all};
pub use proxy::{Network, Proxy};
pub use relay::{Relay, check, usual};
pub use scene::{Mode, Scene};
pub use tls::Authority;
pub use webhook::{Answer, Received, Webhook};

/// An address of this machine that nobody listens on, for a server that must be told where to listen.
pub fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

/// Far longer than anything awaited takes; reaching it is a failure.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `condition` holds, looking again whenever a little time has passed.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    until_ok(what, async || match condition().await {
        true => Ok(()),
        false => Err("not yet"),
    })
    .await;
}

/// Waits until `attempt` succeeds, and returns what it yields; in vain, the last error is shown.
pub async fn until_ok<T, E: Debug>(
    what: &str,
    mut attempt: impl AsyncFnMut() -> Result<T, E>,
) -> T {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match attempt().await {
            Ok(value) => return value,
            Err(error) => assert!(
                tokio::time::Instant::now() < deadline,
                "waited in vain until {what}: {error:#?}"
            ),
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
