//! Fork and truncate: what happens to a sequence's past, whichever way it is attached.

use sluice_proto::v1;

use crate::connection::Retry;
use crate::error::ClientError;
use crate::options::OpenOptions;
use crate::session::{Session, Way, Yielding};

/// What has become of a truncation by another worker of the same sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truncation {
    /// It was carried out.
    Done,
    /// It was refused.
    Refused,
}

impl Session {
    /// A new session that shares the first `position` tokens of this one, attached the same way.
    ///
    /// # Errors
    /// A position beyond the committed tokens, or one whose window rows are gone; the message names the nearest that work.
    pub fn fork(&mut self, position: usize) -> Result<Session, ClientError> {
        self.finish_truncation()?;
        let core = &self.core;
        let request =
            v1::ForkRequest { lease: Some(core.lease), position: position as u64, open_slots: core.options.open_slots, holder_pid: 0 };
        // As Open: a lost answer leaves a lease that nobody uses until this process ends.
        let reply =
            core.client.connection().call("Fork", Retry::Idempotent, request, async |client, request| client.fork(request).await)?;
        // The parent calibrates for all of them.
        let options = OpenOptions { calibrate: None, ..core.options.clone() };
        core.client.session(&core.model, &options, reply)
    }

    /// Drops all tokens from `position` on, and the rows of an unfinished run.
    ///
    /// # Errors
    /// A position beyond the committed tokens, one whose window rows are gone, or another worker of the sequence that has not given up its
    /// tokens from there on ([`Session::begin_truncate`]): nothing has changed. When the daemon does not answer, the truncation is finished at
    /// the session's next call.
    pub fn truncate(&mut self, position: usize) -> Result<(), ClientError> {
        self.finish_truncation()?;
        if position > self.core.committed {
            let bound = format!("0 to {}, the committed tokens", self.core.committed);
            return Err(ClientError::Input { field: "position", value: position.to_string(), bound });
        }
        if let Way::Direct(way) = &mut self.way {
            way.begin_truncate(position)?;
        }
        self.truncating = Some(position);
        self.finish_truncation()
    }

    /// Where several workers share the sequence: gives up this worker's tokens from `position` on, so that another one may
    /// [`Session::truncate`] it to there. Until [`Session::end_truncate`] this session answers steps of the tokens that stay, and nothing else.
    ///
    /// # Errors
    /// A position beyond this worker's committed tokens, or a Stream session.
    pub fn begin_truncate(&mut self, position: usize) -> Result<(), ClientError> {
        self.finish_truncation()?;
        let Way::Direct(way) = &mut self.way else {
            return Err(ClientError::Unsupported { what: "begin_truncate", needed: "Attach::Direct" });
        };
        way.begin_truncate(position)?;
        self.yielding = Some(Yielding { position, truncations: way.truncations() });
        Ok(())
    }

    /// Follows the truncation that another worker has carried out since [`Session::begin_truncate`]; with [`Truncation::Refused`] everything is
    /// as it was before.
    ///
    /// # Errors
    /// Nothing was begun, or the daemon has not truncated: ask again when the other worker's [`Session::truncate`] has returned.
    pub fn end_truncate(&mut self, outcome: Truncation) -> Result<(), ClientError> {
        let input = |value: String, bound: String| Err(ClientError::Input { field: "end_truncate", value, bound });
        let (Some(Yielding { position, truncations }), Way::Direct(way)) = (self.yielding, &mut self.way) else {
            return input("nothing was begun".to_owned(), "begin_truncate first".to_owned());
        };
        match outcome {
            Truncation::Refused => way.abort_truncate(),
            Truncation::Done => {
                if way.truncations() == truncations {
                    return input("Done".to_owned(), format!("Refused: the other worker has not truncated to {position}"));
                }
                way.truncated(position);
                self.core.committed = position;
                self.core.run = None;
                self.core.token_ids.truncate(position);
            }
        }
        self.yielding = None;
        Ok(())
    }

    /// Carries out a truncation that has been begun. Until its outcome is known nothing else is done: the daemon may already reuse the
    /// slots of the dropped chunks.
    pub(crate) fn finish_truncation(&mut self) -> Result<(), ClientError> {
        let Some(position) = self.truncating else { return Ok(()) };
        let request = v1::TruncateRequest { lease: Some(self.core.lease), position: position as u64 };
        let connection = self.core.client.connection();
        let reply = connection.call("Truncate", Retry::Idempotent, request, async |client, request| client.truncate(request).await);
        match reply {
            Ok(reply) => {
                self.truncating = None;
                self.core.boot_epoch = reply.boot_epoch;
                self.core.committed = position;
                self.core.run = None;
                self.core.token_ids.truncate(position);
                match &mut self.way {
                    Way::Stream(way) => way.truncated(),
                    Way::Direct(way) => way.truncated(position),
                }
                Ok(())
            }
            Err(refusal @ ClientError::Refused { .. }) => {
                self.truncating = None;
                if let Way::Direct(way) = &mut self.way {
                    way.abort_truncate();
                }
                Err(refusal)
            }
            // The outcome is unknown: it is asked for again at the next call.
            Err(unknown) => Err(unknown),
        }
    }
}
