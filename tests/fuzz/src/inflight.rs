//! The memory in which a vhost-user front end keeps what is in flight: hostile, and changed at any time.
//!
//! Whatever it holds: what is recovered is a list of descriptors of that queue, each at most once, and nothing outside
//! of the queue's own part is written. While nobody wrote to it but us, exactly what was taken and not answered is
//! recovered, in the order in which it was taken.

use std::fs::File;
use std::os::unix::fs::FileExt;

use arbitrary::{Result, Unstructured};
use blockhouse_vhost::fuzzing::InFlight;
use blockhouse_virtio::InFlightRecord;

use crate::say;

/// Bytes of the part of a queue (vhost-user, "Inflight I/O tracking").
fn stride(queue_size: u16) -> usize {
    (16 + 16 * usize::from(queue_size)).next_multiple_of(64)
}

fn bytes(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().expect("a file in memory").len() as usize];
    file.read_exact_at(&mut bytes, 0).expect("a file in memory");
    bytes
}

pub(crate) fn run(data: &[u8]) {
    let _input_ends = drive(&mut Unstructured::new(data));
}

fn drive(u: &mut Unstructured<'_>) -> Result<()> {
    let strange = u.ratio(1, 8)?;
    let (queues, size) = if strange { u.arbitrary()? } else { (u.int_in_range(1..=3)?, u.int_in_range(1..=24)?) };
    let created = InFlight::create(queues, size);
    let possible = (1..=blockhouse_vhost::MAX_QUEUES).contains(&queues) && (1..=1024).contains(&size);
    assert_eq!(created.is_some(), possible, "{queues} queues of {size}");
    let Some((mut memory, file)) = created else { return Ok(()) };
    let length = stride(size) * usize::from(queues);
    assert_eq!(bytes(&file).len(), length + 64, "what the specification asks for, and what is ours");

    let index = u.int_in_range(0..=queues - 1)?;
    let mut used: u16 = u.arbitrary()?;
    let (mut record, again) = memory.record(index, size, used).expect("new memory");
    assert!(again.is_empty(), "in flight from the beginning");
    // What is in flight, in its order, as long as it is known.
    let mut model = Some(Vec::<u16>::new());
    for _ in 0..40 {
        if u.is_empty() {
            break;
        }
        match u.int_in_range(0..=9u8)? {
            0..=2 => {
                let head = if u.ratio(1, 12)? { u.arbitrary()? } else { u.int_in_range(0..=size - 1)? };
                say!("taken {head}");
                record.taken(head);
                if let Some(model) = model.as_mut().filter(|_| head < size) {
                    // A driver that gives out a descriptor twice has it in flight once.
                    model.retain(|known| *known != head);
                    model.push(head);
                }
            }
            3 | 4 => {
                let known = model.as_ref().filter(|model| !model.is_empty());
                let head = match known {
                    Some(model) => model[u.choose_index(model.len())?],
                    None => u.arbitrary()?,
                };
                record.answering(head);
                let crash = u.int_in_range(0..=3u8)?;
                say!("answering {head}, {crash}");
                if crash == 0 {
                    // Before the ring has it.
                } else {
                    used = used.wrapping_add(1);
                    if crash != 1 {
                        record.answered(head, used);
                    }
                    if let Some(model) = &mut model {
                        model.retain(|known| *known != head);
                    }
                }
                if crash <= 1 {
                    recover(&memory, index, size, used, &mut record, &model);
                }
            }
            5 => recover(&memory, index, size, used, &mut record, &model),
            6 => {
                say!("adopted");
                let size_told = if u.ratio(1, 4)? { u.arbitrary()? } else { length as u64 };
                let offset = if u.ratio(1, 4)? { u.arbitrary()? } else { 0 };
                let file = file.try_clone().expect("a descriptor");
                let adopted = InFlight::adopt(queues, size, size_told, offset, file);
                if size_told == length as u64 && offset == 0 {
                    assert!(adopted.is_some(), "what was created is refused");
                }
                if offset == 0
                    && let Some(adopted) = adopted
                {
                    memory = adopted;
                    recover(&memory, index, size, used, &mut record, &model);
                }
            }
            7 => {
                let (index, size, used) = u.arbitrary()?;
                // Of another queue, or of none. Nobody uses the record.
                if let Some((_, again)) = memory.record(index, size, used) {
                    check(size, &again);
                    model = None;
                }
            }
            _ => {
                let place = u.choose_index(length)?;
                let count = u.int_in_range(1..=16)?.min(length - place);
                let new = u.bytes(count)?.to_vec();
                say!("overwritten at {place}: {new:?}");
                file.write_all_at(&new, place as u64).expect("a file in memory");
                model = None;
            }
        }
        let start = stride(size) * usize::from(index);
        let mut now = bytes(&file);
        now.truncate(length);
        if model.is_some() {
            let own = start..start + stride(size);
            let outside = now.iter().enumerate().filter(|(at, _)| !own.contains(at));
            assert!(outside.into_iter().all(|(_, byte)| *byte == 0), "the part of another queue was written");
        }
    }
    Ok(())
}

fn check(size: u16, again: &[u16]) {
    assert!(again.iter().all(|head| *head < size), "{again:?} of {size}");
    let mut sorted = again.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), again.len(), "twice: {again:?}");
}

/// What a process that takes over does.
fn recover(
    memory: &InFlight,
    index: u16,
    size: u16,
    used: u16,
    record: &mut Box<dyn InFlightRecord>,
    model: &Option<Vec<u16>>,
) {
    let Some((new, again)) = memory.record(index, size, used) else {
        assert!(model.is_none(), "our own memory is refused");
        return;
    };
    say!("recovered {again:?}");
    check(size, &again);
    if let Some(model) = model {
        assert_eq!(&again, model, "something else was in flight");
    }
    *record = new;
}
