//! One front end, from its connection to its end.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error};

use crate::handler::Handler;
use crate::lines::NewsChannel;

/// Serves one front end until it leaves, `stream` is shut down, or it sends what makes no sense. When this
/// returns, nothing of it is in flight.
///
/// Whatever was wrong is in the log; the next front end does not notice.
pub(crate) fn serve(stream: UnixStream, handler: Handler, news: &NewsChannel, disk: &str) {
    tracing::info!(disk, "a front end connected");
    let handler = Arc::new(Mutex::new(handler));
    match stream.try_clone() {
        Ok(peeked) => {
            if let Err((message, error)) = messages(stream, &peeked, &handler, news, disk) {
                let message = message.map_or("a message".to_owned(), |message| format!("{message:?}"));
                tracing::warn!(disk, "the front end sent {message}, which ends its session: {error}");
            }
        }
        Err(error) => tracing::error!(disk, %error, "a front end cannot be served"),
    }
    news.set(None);
    handler.lock().unwrap_or_else(PoisonError::into_inner).stop();
    tracing::info!(disk, "the front end left");
}

/// Answers messages to the end of the connection, which is no error.
fn messages(
    stream: UnixStream,
    peeked: &UnixStream,
    handler: &Arc<Mutex<Handler>>,
    news: &NewsChannel,
    disk: &str,
) -> Result<(), (Option<FrontendReq>, Error)> {
    let mut requests = BackendReqHandler::from_stream(stream, Arc::clone(handler));
    loop {
        let (message, channel) = peek(peeked);
        if let Some(message) = message {
            tracing::debug!(disk, "{message:?}");
        }
        match requests.handle_request() {
            Ok(()) => {
                // The crate has checked by now that it is a socket.
                if channel.is_some() {
                    news.set(channel);
                }
            }
            Err(Error::SocketRetry(_)) => {}
            Err(Error::Disconnected) => return Ok(()),
            Err(Error::SocketBroken(_) | Error::SocketError(_) | Error::PartialMessage) if message.is_none() => {
                return Ok(());
            }
            Err(error) => return Err((message, error)),
        }
    }
}

/// What the next message is, if all of its header is there, and the socket that it brings if it brings one
/// for news about the device. Waits for the message, and leaves it where it is.
fn peek(stream: &UnixStream) -> (Option<FrontendReq>, Option<OwnedFd>) {
    let mut header = [0; 12];
    let mut nothing = RecvAncillaryBuffer::default();
    let received = recvmsg(stream, &mut [IoSliceMut::new(&mut header)], &mut nothing, RecvFlags::PEEK);
    let [a, b, c, d, ..] = header;
    let message = received
        .ok()
        .filter(|received| received.bytes == header.len())
        .and_then(|_| FrontendReq::try_from(u32::from_ne_bytes([a, b, c, d])).ok());
    if message != Some(FrontendReq::SET_BACKEND_REQ_FD) {
        return (message, None);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut files = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(stream, &mut [IoSliceMut::new(&mut header)], &mut files, flags);
    let channel = received.ok().and_then(|_| {
        files.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
    });
    (message, channel)
}
