//! Which JetStream the streams are in: that of the server, or one that is reached through it by the name of
//! its domain, as behind a leaf node.

use std::{fmt, sync::Arc};

use async_nats::{
    Client,
    jetstream::{self, Context},
};

use crate::config::Config;

/// The API of a JetStream.
#[derive(Clone)]
pub struct Api {
    domain: Option<Arc<str>>,
    /// What the subjects of all requests begin with.
    prefix: Arc<str>,
}

impl Api {
    pub(super) fn of(config: &Config) -> Self {
        let domain = config.domain.as_deref();
        let prefix = match domain {
            Some(domain) => format!("$JS.{domain}.API."),
            None => "$JS.API.".to_owned(),
        };
        Self {
            domain: domain.map(Arc::from),
            prefix: prefix.into(),
        }
    }

    /// The name of its domain, if it is known by one.
    #[must_use]
    pub fn domain(&self) -> Option<&str> {
        self.domain.as_deref()
    }

    /// The subject of a request, such as `STREAM.INFO.CMS`.
    #[must_use]
    pub fn subject(&self, request: fmt::Arguments<'_>) -> String {
        format!("{}{request}", self.prefix)
    }

    /// The request of which this is the subject, if it is one.
    pub(super) fn request<'a>(&self, subject: &'a str) -> Option<&'a str> {
        subject.strip_prefix(&*self.prefix)
    }

    pub(super) fn context(&self, client: Client) -> Context {
        match &self.domain {
            Some(domain) => jetstream::with_domain(client, domain),
            None => jetstream::new(client),
        }
    }

    /// Why nobody answers a request, and whether that lasts: a leaf node loses its hub, and finds it again.
    /// `variable` names the stream.
    #[must_use]
    pub fn silence(&self, variable: &str) -> Silence {
        match self.domain() {
            Some(domain) => Silence::Passing(format!(
                "nobody answers for the domain {domain}; check NATS_JS_DOMAIN, and that the leaf node is \
                 connected to it"
            )),
            None => Silence::Lasting(format!(
                "JetStream is not enabled on the NATS server; enable it (behind a leaf node: set \
                 NATS_JS_DOMAIN to the domain of the stream), or unset {variable}"
            )),
        }
    }
}

/// Why nobody answers a request to JetStream.
pub enum Silence {
    /// Somebody may answer the next one.
    Passing(String),
    /// Nobody ever will.
    Lasting(String),
}
