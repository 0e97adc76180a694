//! Raw, the template and the probe, fed with a file that is input.
//!
//! What raw says is known: all of the file, as it is. What the probe says has a confidence, and is no essay.

use blockhouse_plugin::Access;
use blockhouse_raw::Raw;
use blockhouse_template::Template;

use crate::image::{IMAGE, spread, storage, walk};

pub(crate) fn run(data: &[u8]) {
    let image = spread(data);
    let storage = storage(image.clone());
    if let Ok(mut disk) = storage.disk::<Template>(IMAGE) {
        let size = disk.info.virtual_size;
        walk(&mut disk.format, size, Access::ReadOnly);
        if size <= 1 << 20 {
            let expected: Vec<u8> = (0..size as usize).map(|at| image.get(512 + at).copied().unwrap_or(0)).collect();
            assert!(disk.read(0, size as usize).expect("it is all there") == expected, "another content");
        }
    }
    let mut disk = storage.disk::<Raw>(IMAGE).expect("every file is a raw image");
    let size = disk.info.virtual_size;
    assert!(size.is_multiple_of(512) && size.abs_diff(image.len() as u64) < 512, "{size} bytes of {}", image.len());
    walk(&mut disk.format, size, Access::ReadOnly);
    let mut expected = image.clone();
    expected.resize(size as usize, 0);
    assert!(disk.read(0, size as usize).expect("it is all there") == expected, "another content");

    let head = &image[..image.len().min(64 << 10)];
    let tail = &image[image.len().saturating_sub(4 << 10)..];
    for guess in blockhouse_probe::probe(head, tail, image.len() as u64) {
        assert!(guess.confidence <= 100 && guess.evidence.len() < 1000, "{guess:?}");
    }
}
