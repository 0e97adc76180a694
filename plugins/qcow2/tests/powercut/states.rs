//! What a power cut leaves of the changes of the files: after the last sync before it, any part.

use blockhouse_plugin::testing::Change;

use crate::SECTOR;
use crate::images::Made;
use crate::random::Random;

/// The files that are written: the image, and the file of its data.
pub(crate) type Files = [Vec<u8>; 2];

/// A change of one of them.
pub(crate) type Numbered = (usize, Change);

pub(crate) fn files(made: &Made) -> Files {
    [made.image.clone(), made.data.clone()]
}

/// States after cuts that come later and later.
pub(crate) struct States<'a> {
    changes: &'a [Numbered],
    /// The files with the changes before `at` that were durable there.
    durable: Files,
    /// Of each file, the changes from here on are not in `durable`.
    from: [usize; 2],
}

impl<'a> States<'a> {
    pub(crate) fn new(files: Files, changes: &'a [Numbered]) -> Self {
        Self { changes, durable: files, from: [0, 0] }
    }

    /// Where to cut, in order: half at random, half right before a sync, when most can be missing.
    pub(crate) fn cuts(changes: &[Numbered], count: usize, random: &mut Random) -> Vec<usize> {
        let syncs: Vec<usize> = (0..changes.len()).filter(|at| changes[*at].1 == Change::Sync).collect();
        let mut cuts: Vec<usize> = (0..count)
            .map(|number| match syncs.get(random.below(syncs.len() as u64) as usize) {
                Some(sync) if number % 2 == 0 => *sync,
                _ => random.below(changes.len() as u64 + 1) as usize,
            })
            .collect();
        cuts.sort_unstable();
        cuts
    }

    /// A state that a cut before change `cut` could leave. Of what came after the last sync of its file, each
    /// sector of each write, and each new size, is there or not. That covers every order of them, too.
    pub(crate) fn at(&mut self, cut: usize, random: &mut Random) -> Files {
        let Self { changes, durable, from } = self;
        for (file, from) in from.iter_mut().enumerate() {
            let of_file = |at: &usize| changes[*at].0 == file;
            let synced = (*from..cut).rev().filter(of_file).find(|at| changes[*at].1 == Change::Sync);
            if let Some(synced) = synced {
                for at in (*from..synced).filter(of_file) {
                    changes[at].1.apply(&mut durable[file]);
                }
                *from = synced + 1;
            }
        }
        let mut state = durable.clone();
        // Sometimes nearly nothing is lost, sometimes nearly everything, and if only the program died, nothing.
        let kept = [5, 50, 95, 100][random.below(4) as usize];
        for at in from[0].min(from[1])..cut {
            let (file, change) = &changes[at];
            if at >= from[*file] {
                tear(&mut state[*file], change, || random.below(100) < kept);
            }
        }
        state
    }
}

fn tear(bytes: &mut Vec<u8>, change: &Change, mut kept: impl FnMut() -> bool) {
    let Change::Write(offset, new) = change else {
        if kept() {
            change.apply(bytes);
        }
        return;
    };
    // The size of the file is kept elsewhere than the bytes.
    let end = *offset as usize + new.len();
    if bytes.len() < end && kept() {
        bytes.resize(end, 0);
    }
    let mut at = 0;
    while at < new.len() {
        let start = *offset as usize + at;
        let stop = new.len().min(at + SECTOR - start % SECTOR);
        if kept() {
            if bytes.len() < start + stop - at {
                bytes.resize(start + stop - at, 0);
            }
            bytes[start..start + stop - at].copy_from_slice(&new[at..stop]);
        }
        at = stop;
    }
}
