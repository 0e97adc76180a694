//! The component side: bindings of a world without imports.

use alloc::string::ToString;
use alloc::vec::Vec;

/// Bindings of the world `prober-only`.
#[allow(missing_docs, unsafe_op_in_unsafe_fn, clippy::all, clippy::pedantic, clippy::restriction, unreachable_pub)]
mod bindings {
    wit_bindgen::generate!({ path: "../../wit", world: "blockhouse:format/prober-only" });
}

use bindings::exports::blockhouse::format::prober;

struct Component;

impl prober::Guest for Component {
    fn probe(head: Vec<u8>, tail: Vec<u8>, file_size_bytes: u64) -> Vec<prober::Guess> {
        let guesses = crate::probe(&head, &tail, file_size_bytes).into_iter();
        guesses
            .map(|guess| prober::Guess {
                format: guess.format.to_string(),
                evidence: guess.evidence,
                confidence: guess.confidence,
            })
            .collect()
    }
}

bindings::export!(Component with_types_in bindings);

/// There is nobody to tell: a prober has no log.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    core::arch::wasm32::unreachable()
}
