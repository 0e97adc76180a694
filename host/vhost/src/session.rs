//! One front end, from its connection to its end.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FileType, fstat};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use vhost::vhost_user::message::{FrontendReq, MAX_ATTACHED_FD_ENTRIES};
use vhost::vhost_user::{BackendReqHandler, Error};

use crate::closing::let_go;
use crate::handler::Handler;
use crate::lines::NewsChannel;

/// Serves one front end until it leaves, `stream` is shut down, or it sends what makes no sense. When this
/// returns, nothing of it is in flight.
///
/// Whatever was wrong is in the log; the next front end does not notice. `waits_for_storage` is set while nothing but
/// the disk can hold up the end.
pub(crate) fn serve(
    stream: UnixStream,
    handler: Handler,
    news: &NewsChannel,
    disk: &str,
    waits_for_storage: &AtomicBool,
) {
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
    waits_for_storage.store(true, Ordering::Release);
    handler.lock().unwrap_or_else(PoisonError::into_inner).stop();
    waits_for_storage.store(false, Ordering::Release);
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
        let Peeked { message, files, mut channel, sockets } = peek(peeked);
        if let Some(message) = message {
            tracing::debug!(disk, "{message:?}");
        }
        if files == Files::TooMany {
            let_go(Some(sockets));
            // The crate would drop the header with them, and take what follows for the next message.
            return Err((message, Error::IncorrectFds));
        }
        let handled = requests.handle_request();
        // By now whoever took them has closed those that it does not keep, and these are the last.
        let_go((!sockets.is_empty()).then_some(sockets));
        if handled.is_ok() && channel.is_some() {
            // The crate has checked by now that it is a socket.
            news.set(channel.take());
        }
        let_go(channel);
        match handled {
            Ok(()) | Err(Error::SocketRetry(_)) => {}
            Err(Error::Disconnected) => return Ok(()),
            Err(Error::SocketBroken(_) | Error::SocketError(_) | Error::PartialMessage) if message.is_none() => {
                return Ok(());
            }
            Err(error) => return Err((message, error)),
        }
    }
}

/// What is known of a message before it is taken.
struct Peeked {
    /// What it is, if all of its header is there.
    message: Option<FrontendReq>,
    files: Files,
    /// The socket that it brings, if it brings one for news about the device.
    channel: Option<OwnedFd>,
    /// The other sockets that it brings, which nobody asked for.
    sockets: Vec<OwnedFd>,
}

/// The descriptors that come with a message.
#[derive(PartialEq, Eq)]
enum Files {
    /// None, or as many as a message may have.
    Some,
    /// More than that.
    TooMany,
}

/// Looks at the next message: waits for it, and leaves it where it is.
fn peek(stream: &UnixStream) -> Peeked {
    let mut header = [0; 12];
    let mut nothing = RecvAncillaryBuffer::default();
    let received = recvmsg(stream, &mut [IoSliceMut::new(&mut header)], &mut nothing, RecvFlags::PEEK);
    let [a, b, c, d, ..] = header;
    let whole = received.as_ref().is_ok_and(|received| received.bytes == header.len());
    let message = FrontendReq::try_from(u32::from_ne_bytes([a, b, c, d])).ok().filter(|_| whole);
    // There was no room for them.
    let brings_files = received.is_ok_and(|received| received.flags.contains(ReturnFlags::CTRUNC));
    if !brings_files {
        return Peeked { message, files: Files::Some, channel: None, sockets: Vec::new() };
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
    let mut files = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(stream, &mut [IoSliceMut::new(&mut header)], &mut files, flags);
    let cut_off = received.is_ok_and(|received| received.flags.contains(ReturnFlags::CTRUNC));
    let rights = files.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let mut files: Vec<OwnedFd> = rights.flatten().collect();
    // There may be room for one more than was asked for.
    let too_many = cut_off || files.len() > MAX_ATTACHED_FD_ENTRIES;
    let is_socket =
        |file: &OwnedFd| fstat(file).is_ok_and(|status| FileType::from_raw_mode(status.st_mode) == FileType::Socket);
    let wanted = message == Some(FrontendReq::SET_BACKEND_REQ_FD) && !files.is_empty();
    let channel = wanted.then(|| files.swap_remove(0));
    // The others are closed here, and taken with the message.
    files.retain(is_socket);
    Peeked { message, files: if too_many { Files::TooMany } else { Files::Some }, channel, sockets: files }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::IoSlice;
    use std::os::fd::AsFd;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;

    /// A message that is a header alone, with so many descriptors of the same file.
    fn sent(message: FrontendReq, files: usize) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let header = [u32::from(message), 1, 0].map(u32::to_ne_bytes).concat();
        let file = tempfile::tempfile().unwrap();
        let all = vec![file.as_fd(); files];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(files == 0 || control.push(SendAncillaryMessage::ScmRights(&all)));
        sendmsg(&ours, &[IoSlice::new(&header)], &mut control, SendFlags::empty()).unwrap();
        theirs
    }

    #[test]
    fn descriptors_are_counted_before_a_message_is_taken() {
        let most = MAX_ATTACHED_FD_ENTRIES;
        for (files, too_many) in [(0, false), (1, false), (most, false), (most + 1, true), (most + 2, true), (64, true)]
        {
            let stream = sent(FrontendReq::SET_MEM_TABLE, files);
            // It stays where it is.
            for _ in 0..2 {
                let peeked = peek(&stream);
                assert_eq!(peeked.message, Some(FrontendReq::SET_MEM_TABLE));
                assert_eq!(peeked.files == Files::TooMany, too_many, "{files}");
                assert!(peeked.channel.is_none());
            }
        }
        assert!(peek(&sent(FrontendReq::SET_BACKEND_REQ_FD, 0)).channel.is_none());
        assert!(peek(&sent(FrontendReq::SET_BACKEND_REQ_FD, 1)).channel.is_some());
    }
}
