//! What is measured of a server, how it is judged, and how it is drawn.

use std::fmt::{self, Write as _};
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use crate::work::Counts;

/// A server at a moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    at: Duration,
    /// Resident memory, in KiB.
    resident: u64,
    descriptors: u64,
    threads: u64,
}

impl Sample {
    pub(crate) fn of(process: u32, at: Duration) -> Self {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        let descriptors = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap().count() as u64;
        Self { at, resident: number("VmRSS:"), descriptors, threads: number("Threads:") }
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, resident, descriptors, threads } = self;
        write!(f, "{:>6.0} s: {resident} KiB, {descriptors} descriptors, {threads} threads", at.as_secs_f64())
    }
}

/// One figure of a sample, and how much it may grow from the first quarter to the last.
struct Figure {
    name: &'static str,
    of: fn(&Sample) -> u64,
    /// Absolute, or percent of the first quarter's, whichever is more.
    slack: (u64, u64),
}

const FIGURES: [Figure; 3] = [
    // The allocator's arenas and the extent maps of disks that are written all the time move a little.
    Figure { name: "resident KiB", of: |sample| sample.resident, slack: (2048, 5) },
    // A front end may just be there or not.
    Figure { name: "descriptors", of: |sample| sample.descriptors, slack: (8, 0) },
    Figure { name: "threads", of: |sample| sample.threads, slack: (4, 0) },
];

/// Samples of one server, or of several of the same kind.
pub(crate) struct Series {
    name: &'static str,
    pub(crate) samples: Vec<Sample>,
}

impl Series {
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name, samples: Vec::new() }
    }

    /// The medians of the first and the last quarter, without the warm-up: the first eighth.
    fn quarters(&self, of: fn(&Sample) -> u64) -> (u64, u64) {
        let warm = &self.samples[self.samples.len() / 8..];
        let quarter = warm.len().div_ceil(4);
        let median = |samples: &[Sample]| {
            let mut values: Vec<u64> = samples.iter().map(of).collect();
            values.sort_unstable();
            values.get(values.len() / 2).copied().unwrap_or(0)
        };
        (median(&warm[..quarter]), median(&warm[warm.len() - quarter..]))
    }

    pub(crate) fn is_flat(&self) -> bool {
        FIGURES.iter().all(|figure| {
            let (first, last) = self.quarters(figure.of);
            last <= first + figure.slack.0.max(first * figure.slack.1 / 100)
        })
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} samples), first quarter → last:", self.name, self.samples.len())?;
        for figure in &FIGURES {
            let (first, last) = self.quarters(figure.of);
            write!(f, " {first} → {last} {},", figure.name)?;
        }
        f.write_str(if self.is_flat() { " flat" } else { " NOT flat" })
    }
}

pub(crate) fn json(all: &[Series], counts: &Counts, file: &Path) {
    let series = all.iter().map(|series| {
        let samples = series.samples.iter().map(|sample| {
            json!({
                "seconds": sample.at.as_secs_f64(), "resident_kib": sample.resident,
                "descriptors": sample.descriptors, "threads": sample.threads,
            })
        });
        json!({ "name": series.name, "flat": series.is_flat(), "samples": samples.collect::<Vec<_>>() })
    });
    let text = json!({ "done": counts.to_string(), "series": series.collect::<Vec<_>>() });
    std::fs::write(file, format!("{text:#}\n")).unwrap();
}

/// A line for each figure of each series, from 0 to its largest value.
pub(crate) fn svg(all: &[Series], file: &Path) {
    const WIDTH: f64 = 900.0;
    const HEIGHT: f64 = 120.0;
    let mut text = String::new();
    let charts = all.len() * FIGURES.len();
    let whole = (HEIGHT + 50.0) * charts as f64 + 10.0;
    writeln!(
        text,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{whole}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>",
        WIDTH + 40.0
    )
    .unwrap();
    let mut top = 25.0;
    for series in all {
        let end = series.samples.last().map_or(1.0, |sample| sample.at.as_secs_f64());
        for figure in &FIGURES {
            let most = series.samples.iter().map(figure.of).max().unwrap_or(0).max(1);
            let (first, last) = series.quarters(figure.of);
            let points: Vec<String> = series
                .samples
                .iter()
                .map(|sample| {
                    let x = 20.0 + WIDTH * sample.at.as_secs_f64() / end;
                    let y = top + HEIGHT - HEIGHT * (figure.of)(sample) as f64 / most as f64;
                    format!("{x:.1},{y:.1}")
                })
                .collect();
            writeln!(
                text,
                "<text x=\"20\" y=\"{}\">{}: {}, at most {most}; first quarter {first}, last {last}</text>\n\
                 <rect x=\"20\" y=\"{top}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"none\" stroke=\"#bbb\"/>\n\
                 <polyline points=\"{}\" fill=\"none\" stroke=\"#2a7f62\" stroke-width=\"1.5\"/>\n\
                 <text x=\"20\" y=\"{}\" fill=\"#777\">0 to {:.0} minutes</text>",
                top - 6.0,
                series.name,
                figure.name,
                points.join(" "),
                top + HEIGHT + 14.0,
                end / 60.0
            )
            .unwrap();
            top += HEIGHT + 50.0;
        }
    }
    text.push_str("</svg>\n");
    std::fs::write(file, text).unwrap();
}

#[cfg(test)]
mod unit {
    use super::*;

    fn series(figures: impl Fn(u64) -> (u64, u64, u64)) -> Series {
        let sample = |minute: u64| {
            let (resident, descriptors, threads) = figures(minute);
            Sample { at: Duration::from_secs(60 * minute), resident, descriptors, threads }
        };
        Series { name: "a server", samples: (0..60).map(sample).collect() }
    }

    #[test]
    fn what_grows_is_not_flat() {
        // It warms up, and some front ends are there now and then.
        let steady =
            |minute: u64| (60_000 + minute.min(5) * 4000 + minute % 3 * 500, 150 + minute % 5, 50 + minute % 3);
        assert!(series(steady).is_flat());
        assert!(series(|minute| (60_000 - minute * 300, 150, 50)).is_flat());
        // A page for each of a few thousand requests; a descriptor every four minutes; a thread every eight.
        assert!(!series(|minute| (60_000 + minute * 150, 150, 50)).is_flat());
        assert!(!series(|minute| (60_000, 150 + minute / 4, 50)).is_flat());
        assert!(!series(|minute| (60_000, 150, 50 + minute / 8)).is_flat());
        assert!(series(|_| (0, 0, 0)).is_flat());
    }

    #[test]
    fn one_sample_is_enough_not_to_fail() {
        let mut one = series(|_| (1, 1, 1));
        one.samples.truncate(1);
        assert!(one.is_flat());
        let none = Series::new("nobody");
        assert!(none.is_flat());
    }
}
