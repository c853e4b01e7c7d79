//! The course of a conversation, without IO: whose turn it is, and what is to be said.
//!
//! ```text
//!          request                notification                 told
//!   quiet ─────────► working ──────────────────► notified ──────────► told
//!     ▲               │   ▲                       │   ▲                │ the client answers
//!     └── response ───┘   │                       │   └ it has gone ◄──┤
//!                         ├──── our own answer ───┘                    ▼
//!                         └──── what the client has said, or no ◄── answered
//! ```

use prost::Message;

use super::TalkError;
use super::event::{Event, NotifyScript};
use super::message::{CriuRequest, CriuResponse, RequestType};
use super::packet::Packet;

/// A conversation, from CRIU's start to its last word.
#[derive(Debug, Default)]
pub(super) struct Talk {
    state: State,
    /// What CRIU was asked for last.
    asked: Option<Asked>,
    /// What it has answered, until a client has it.
    response: Option<Packet>,
    /// Answers that a client owes, and nobody waits for.
    owed: u32,
}

/// A request under way.
#[derive(Clone, Copy, Debug)]
struct Asked {
    kind: i32,
    by: By,
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    Us,
    /// Somebody else.
    Client {
        /// It wants to be told of notifications.
        told: bool,
    },
}

/// What is said to a notification.
#[derive(Debug)]
pub(super) enum Answer<'a> {
    Own(Packet),
    /// A client's, as it came.
    Client(&'a Packet),
}

#[derive(Debug, Default)]
enum State {
    /// There is nothing to be answered.
    #[default]
    Quiet,
    /// CRIU works.
    Working,
    /// CRIU waits, and only we know.
    Notified(NotifyScript, Packet),
    /// CRIU waits for what the client says.
    Told(NotifyScript),
    /// The client has said this. CRIU does not know yet.
    Answered(NotifyScript, Packet),
}

impl Answer<'_> {
    pub fn packet(&self) -> &Packet {
        match self {
            Self::Own(packet) => packet,
            Self::Client(packet) => packet,
        }
    }
}

impl Talk {
    /// Something is asked for.
    pub fn request(&mut self, kind: i32, by: By) -> Result<(), TalkError> {
        match self.state {
            State::Quiet => {}
            State::Working => return Err(TalkError::Busy),
            State::Notified(..) | State::Told(_) | State::Answered(..) => {
                return Err(TalkError::AnswerOwed);
            }
        }
        self.asked = Some(Asked { kind, by });
        self.state = State::Working;
        Ok(())
    }

    /// CRIU says something.
    pub fn heard(&mut self, packet: Packet) -> Result<Event, TalkError> {
        let State::Working = self.state else {
            return Err(TalkError::OutOfTurn { who: "criu" });
        };
        let response = CriuResponse::decode(&packet.bytes[..]).map_err(TalkError::Decode)?;
        if response.kind != RequestType::Notify as i32 {
            self.state = State::Quiet;
            self.response = matches!(self.by(), By::Client { .. }).then_some(packet);
            return Ok(Event::Response(response.into()));
        }
        let notify = response.notify.unwrap_or_default();
        let script = notify.script.ok_or(TalkError::NamelessNotification)?;
        let script = NotifyScript::from(script);
        self.state = State::Notified(script.clone(), packet);
        Ok(Event::Notify {
            script,
            pid: notify.pid,
        })
    }

    /// What is to be said to the notification that waits. A client's no is never made a yes.
    pub fn answer(&self, success: bool) -> Result<Answer<'_>, TalkError> {
        match &self.state {
            State::Quiet | State::Working => Err(TalkError::NothingToAnswer),
            State::Told(_) if success => Err(TalkError::AnswerOwed),
            State::Answered(_, packet) if success => Ok(Answer::Client(packet)),
            State::Notified(..) | State::Told(_) | State::Answered(..) => {
                Ok(Answer::Own(answer(success)))
            }
        }
    }

    /// What [`Talk::answer`] gave has been said.
    pub fn answered(&mut self) {
        if matches!(self.state, State::Told(_)) {
            self.owed += 1;
        }
        self.state = State::Working;
    }

    /// What the client is to be told, if it wants to be told and has not been.
    pub fn untold(&self) -> Option<&Packet> {
        match (&self.state, self.by()) {
            (State::Notified(_, packet), By::Client { told: true }) => Some(packet),
            _ => None,
        }
    }

    /// What [`Talk::untold`] gave has been said.
    pub fn told(&mut self) {
        if let State::Notified(script, _) = &self.state {
            self.state = State::Told(script.clone());
        }
    }

    /// The client says something. Whether it is what was waited for.
    pub fn client_said(&mut self, packet: Packet) -> Result<bool, TalkError> {
        if self.owed > 0 {
            self.owed -= 1;
            return Ok(false);
        }
        let State::Told(script) = &self.state else {
            return Err(TalkError::OutOfTurn { who: "the client" });
        };
        let request = CriuRequest::decode(&packet.bytes[..]).map_err(TalkError::Decode)?;
        if request.kind != RequestType::Notify as i32 {
            return Err(TalkError::OutOfTurn { who: "the client" });
        }
        self.state = State::Answered(script.clone(), packet);
        Ok(true)
    }

    /// What the client has said, if it has and CRIU does not know.
    pub fn client_agrees(&self) -> Option<bool> {
        match &self.state {
            State::Answered(_, packet) => {
                let request = CriuRequest::decode(&packet.bytes[..]);
                Some(request.is_ok_and(|request| request.notify_success == Some(true)))
            }
            _ => None,
        }
    }

    /// The client says nothing any more: from now on all is for us to answer.
    pub fn client_gone(&mut self) {
        self.owed = 0;
        if let Some(asked) = &mut self.asked {
            asked.by = By::Us;
        }
        if let State::Told(script) = &self.state {
            self.state = State::Notified(script.clone(), Packet::default());
        }
    }

    /// CRIU says nothing any more, and waits for nothing.
    pub fn criu_gone(&mut self) {
        self.state = State::Quiet;
    }

    /// The notification that waits for an answer.
    pub fn waiting(&self) -> Option<&NotifyScript> {
        match &self.state {
            State::Quiet | State::Working => None,
            State::Notified(script, _) | State::Told(script) | State::Answered(script, _) => {
                Some(script)
            }
        }
    }

    /// Whether a client was told, and has not answered.
    pub fn client_thinks(&self) -> bool {
        matches!(self.state, State::Told(_))
    }

    /// Whether CRIU owes a response.
    pub fn is_under_way(&self) -> bool {
        !matches!(self.state, State::Quiet)
    }

    /// What a client that asked is to hear: CRIU's own response, if there is one. Once.
    pub fn take_response(&mut self) -> Option<(i32, Option<Packet>)> {
        match (self.asked, self.by()) {
            (Some(asked), By::Client { .. }) => {
                self.asked = None;
                Some((asked.kind, self.response.take()))
            }
            (_, By::Us) | (None, _) => None,
        }
    }

    /// Whether CRIU was asked for this last.
    pub fn is_about(&self, kind: RequestType) -> bool {
        self.asked.is_some_and(|asked| asked.kind == kind as i32)
    }

    fn by(&self) -> By {
        self.asked.map_or(By::Us, |asked| asked.by)
    }
}

fn answer(success: bool) -> Packet {
    let answer = CriuRequest {
        kind: RequestType::Notify as i32,
        notify_success: Some(success),
        ..CriuRequest::default()
    };
    answer.encode_to_vec().into()
}

#[cfg(test)]
#[path = "talk_tests.rs"]
mod tests;
