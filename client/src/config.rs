//! Where the daemon is, and how long to wait for it.

use std::path::PathBuf;
use std::time::Duration;

use crate::error::ClientError;

/// Bounds of every wait, retry and message of a client.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest wait for the reply to one call, to one message of the Decode stream, or to one request on the side socket.
    pub rpc_deadline: Duration,
    /// Longest wait for open slots to be sealed when they are full.
    pub slot_wait: Duration,
    /// Most retries of one call.
    pub retries_max: u32,
    /// Wait before the first retry; doubled before each further one, up to two seconds.
    pub retry_backoff: Duration,
    /// Largest message to send or accept, bytes.
    pub message_bytes_max: usize,
    /// Most requests on the Decode stream without a reply.
    pub stream_in_flight: usize,
    /// Bytes of a GPU's memory that the direct sessions of this client may take; 0: nine tenths of what is free at the first step.
    pub device_bytes: u64,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            rpc_deadline: Duration::from_secs(30),
            slot_wait: Duration::from_secs(30),
            retries_max: 5,
            retry_backoff: Duration::from_millis(50),
            message_bytes_max: 64 << 20,
            stream_in_flight: 16,
            device_bytes: 0,
        }
    }
}

impl ClientConfig {
    /// Longest pause between two retries.
    pub const BACKOFF_MAX: Duration = Duration::from_secs(2);

    /// The pause before retry `attempt` (0 is the first retry).
    #[must_use]
    pub fn backoff(&self, attempt: u32) -> Duration {
        self.retry_backoff.saturating_mul(1 << attempt.min(16)).min(Self::BACKOFF_MAX)
    }

    pub(crate) fn check(&self) -> Result<(), ClientError> {
        let bound = |field, value: u128, low, high| {
            let fits = (low..=high).contains(&value);
            if fits { Ok(()) } else { Err(ClientError::Input { field, value: value.to_string(), bound: format!("{low} to {high}") }) }
        };
        let day = Duration::from_secs(86_400).as_millis();
        bound("connect_timeout (ms)", self.connect_timeout.as_millis(), 1, day)?;
        bound("rpc_deadline (ms)", self.rpc_deadline.as_millis(), 1, day)?;
        bound("slot_wait (ms)", self.slot_wait.as_millis(), 0, day)?;
        bound("retries_max", u128::from(self.retries_max), 0, 1000)?;
        bound("message_bytes_max", self.message_bytes_max as u128, 1 << 12, 1 << 31)?;
        bound("stream_in_flight", self.stream_in_flight as u128, 1, 1 << 12)
    }
}

/// Where the daemon listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// TCP, `http://host:port`. Direct attachment is not possible through it.
    Tcp(String),
}

impl Endpoint {
    /// Reads `/path`, `unix:/path` or `http://host:port`.
    ///
    /// # Errors
    /// The text is none of these.
    pub fn parse(text: &str) -> Result<Self, ClientError> {
        let path = text.strip_prefix("unix://").or_else(|| text.strip_prefix("unix:")).unwrap_or(text);
        if text.starts_with("http://") {
            Ok(Self::Tcp(text.to_owned()))
        } else if path.starts_with('/') || path.starts_with("./") || path.starts_with("../") {
            Ok(Self::Unix(PathBuf::from(path)))
        } else {
            Err(ClientError::Endpoint { text: text.to_owned() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_told_apart() {
        assert_eq!(Endpoint::parse("/run/s.sock").expect("path"), Endpoint::Unix("/run/s.sock".into()));
        assert_eq!(Endpoint::parse("unix:/run/s.sock").expect("unix"), Endpoint::Unix("/run/s.sock".into()));
        assert_eq!(Endpoint::parse("unix:///run/s.sock").expect("unix"), Endpoint::Unix("/run/s.sock".into()));
        assert_eq!(Endpoint::parse("http://127.0.0.1:1").expect("tcp"), Endpoint::Tcp("http://127.0.0.1:1".into()));
        let refused = Endpoint::parse("ftp://x").expect_err("no such scheme");
        assert!(refused.to_string().contains("ftp://x"), "{refused}");
    }

    #[test]
    fn backoff_doubles_up_to_its_bound() {
        let config = ClientConfig { retry_backoff: Duration::from_millis(10), ..ClientConfig::default() };
        let waits: Vec<u128> = (0..10).map(|attempt| config.backoff(attempt).as_millis()).collect();
        assert_eq!(waits, [10, 20, 40, 80, 160, 320, 640, 1280, 2000, 2000]);
        assert_eq!(config.backoff(u32::MAX).as_millis(), 2000);
    }

    #[test]
    fn a_config_out_of_bounds_is_named() {
        let config = ClientConfig { stream_in_flight: 0, ..ClientConfig::default() };
        assert_eq!(config.check().expect_err("zero").to_string(), "stream_in_flight: 0 is outside 1 to 4096");
    }
}
