//! What the disk holds, as plain bytes, and requests that change it.

const SECTOR: usize = 512;

/// What is known of a sector.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    Yes,
    /// It was discarded: what it was, or zeroes.
    Discarded,
}

pub(crate) struct Model {
    bytes: Vec<u8>,
    known: Vec<Known>,
    state: u64,
}

impl Model {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        let known = vec![Known::Yes; bytes.len() / SECTOR];
        Self { bytes, known, state: 0 }
    }

    fn below(&mut self, limit: usize) -> usize {
        // splitmix64.
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.state;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((value ^ (value >> 31)) % limit as u64) as usize
    }

    /// Requests in the words of the example, and what it answers.
    pub(crate) fn requests(&mut self, seed: u64, count: usize) -> (Vec<String>, Vec<String>) {
        self.state = seed.wrapping_mul(0xd134_2543_de82_ef95) ^ self.bytes.len() as u64;
        (0..count).map(|_| self.request()).unzip()
    }

    fn request(&mut self) -> (String, String) {
        let all = self.known.len();
        let first = self.below(all);
        let most = [1, 8, 130, 700][self.below(4)];
        let count = (1 + self.below(most)).min(all - first);
        let sectors = first..first + count;
        let bytes = first * SECTOR..(first + count) * SECTOR;
        let ok = "ok".to_owned();
        match self.below(10) {
            0..4 => {
                let seed = self.below(1 << 30) as u64;
                self.bytes[bytes].copy_from_slice(&pattern(seed, count * SECTOR));
                self.known[sectors].fill(Known::Yes);
                (format!("out {first} {count} {seed}"), ok)
            }
            4 => (format!("discard {first} {count}"), {
                self.known[sectors].fill(Known::Discarded);
                ok
            }),
            zeroes @ 5..7 => {
                self.bytes[bytes].fill(0);
                self.known[sectors].fill(Known::Yes);
                (format!("{} {first} {count}", if zeroes == 5 { "zero" } else { "unmap" }), ok)
            }
            7 => ("flush".to_owned(), ok),
            _ => {
                // As much as is known.
                let known = self.known[sectors].iter().take_while(|known| **known == Known::Yes).count();
                let known = known.max(usize::from(self.known[first] == Known::Yes));
                if known == 0 {
                    return ("flush".to_owned(), ok);
                }
                let answer = read_answer(&self.bytes[first * SECTOR..(first + known) * SECTOR]);
                (format!("in {first} {known}"), answer)
            }
        }
    }

    /// Whether these are the bytes; what was discarded is looked at if `strict`.
    pub(crate) fn compare(&self, found: &[u8], strict: bool) -> Result<(), String> {
        if found.len() != self.bytes.len() {
            return Err(format!("{} bytes instead of {}", found.len(), self.bytes.len()));
        }
        let sectors = found.chunks(SECTOR).zip(self.bytes.chunks(SECTOR)).zip(&self.known).enumerate();
        for (sector, ((found, expected), known)) in sectors {
            let right = match known {
                Known::Yes => found == expected,
                Known::Discarded if strict => found.iter().zip(expected).all(|(byte, old)| *byte == 0 || byte == old),
                Known::Discarded => true,
            };
            if !right {
                return Err(format!("sector {sector} differs"));
            }
        }
        Ok(())
    }
}

/// What the example writes: see its `device.rs`.
fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let byte = |at: u64| (at / 8).wrapping_add(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
    (0..length.div_ceil(8) as u64).flat_map(|word| byte(word * 8)).take(length).collect()
}

/// What the example answers to a read of these bytes.
pub(crate) fn read_answer(bytes: &[u8]) -> String {
    let sum = bytes.iter().fold(0, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
    format!("ok {sum:016x}")
}
