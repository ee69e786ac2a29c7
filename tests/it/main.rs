//! The relay as a process, between a real nats-server and a webhook.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

#[cfg(target_os = "linux")]
mod addresses;
mod alerts;
mod buffer;
mod certificates;
mod configuration;
mod documentation;
mod domains;
mod durable;
mod lanes;
mod log;
mod logins;
mod nats_faults;
mod operating;
mod order;
mod outcomes;
mod permissions;
mod receivers;
mod refusals;
mod relaying;
mod service;
mod slow;
mod stopping;
mod streams;
mod web_sockets;
