//! The figures of a disk: what it did, as JSON and as text for Prometheus.
//!
//! The text is version 0.0.4 of Prometheus' format: for each metric a line of help, a line with its type, and
//! a line for each value. All of a metric stands together.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use std::time::Duration;

use blockhouse_block::{EXTENT_BYTES, MapStats};
use blockhouse_vhost::{DeviceStats, RequestKind, RequestStats, latency_bound};
use serde::Serialize;

/// What a disk did since it was opened.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figures {
    /// As the log names it: `disk0`.
    #[serde(skip)]
    pub(crate) disk: String,
    /// The image, as the operator named it.
    #[serde(skip)]
    pub(crate) image: String,
    #[serde(skip)]
    pub(crate) format: String,
    #[serde(skip)]
    pub(crate) serial: String,
    pub(crate) capacity_bytes: u64,
    /// By what they asked for.
    pub(crate) requests: BTreeMap<&'static str, Requests>,
    pub(crate) requests_in_flight: u64,
    /// How often a queue waited because of iops= or bps=.
    pub(crate) limit_waits: u64,
    /// By function.
    pub(crate) component_calls: BTreeMap<&'static str, u64>,
    pub(crate) component_failures: u64,
    pub(crate) component_restarts: u64,
    pub(crate) map: Map,
    /// What images referred to.
    pub(crate) opens_granted: u64,
    pub(crate) opens_refused: u64,
}

/// Requests of one kind.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Requests {
    pub(crate) count: u64,
    pub(crate) errors: u64,
    pub(crate) bytes: u64,
    /// How many took so long at most, from the shortest time to the longest. Those that took longer are in
    /// `count` alone.
    pub(crate) latency: Vec<Bucket>,
    #[serde(rename = "latency_sum_seconds", serialize_with = "as_seconds")]
    pub(crate) latency_sum: Duration,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Bucket {
    #[serde(rename = "at_most_seconds", serialize_with = "as_seconds")]
    pub(crate) at_most: Duration,
    pub(crate) count: u64,
}

/// The extent map.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Map {
    pub(crate) hits: u64,
    pub(crate) misses: u64,
    pub(crate) evicted_extents: u64,
    pub(crate) bytes: u64,
    pub(crate) limit_bytes: u64,
}

fn as_seconds<S: serde::Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64())
}

impl Requests {
    fn new(stats: &RequestStats) -> Self {
        let mut count = 0;
        let latency = stats.latency.iter().enumerate().map(|(bucket, more)| {
            count += more;
            Bucket { at_most: latency_bound(bucket), count }
        });
        let mut latency: Vec<Bucket> = latency.collect();
        // The last one has no bound. What it has is what all have: one look at counters that go on counting.
        let count = latency.pop().map_or(stats.requests, |last| last.count);
        let RequestStats { errors, bytes, latency_sum, .. } = *stats;
        Self { count, errors, bytes, latency, latency_sum }
    }
}

/// The requests of a device, by kind.
pub(crate) fn requests(stats: &DeviceStats) -> BTreeMap<&'static str, Requests> {
    RequestKind::ALL.into_iter().map(|kind| (kind.as_str(), Requests::new(&stats.of(kind)))).collect()
}

impl From<MapStats> for Map {
    fn from(stats: MapStats) -> Self {
        let bytes = |extents: u64| extents.saturating_mul(u64::try_from(EXTENT_BYTES).unwrap_or(u64::MAX));
        Self {
            hits: stats.hits,
            misses: stats.misses,
            evicted_extents: stats.evictions,
            bytes: bytes(stats.extents),
            limit_bytes: bytes(stats.max_extents),
        }
    }
}

/// The figures of disks as text for Prometheus.
pub(crate) fn prometheus(disks: &[Figures]) -> String {
    let mut text = Text(String::new());
    text.family("blockhouse_disk_info", "gauge", "What the disk is; the value is always 1.");
    for disk in disks {
        let labels = [
            ("disk", disk.disk.as_str()),
            ("image", disk.image.as_str()),
            ("format", disk.format.as_str()),
            ("serial", disk.serial.as_str()),
        ];
        text.sample("blockhouse_disk_info", &labels, 1);
    }
    let gauge = |figure: fn(&Figures) -> u64| figure;
    for (name, kind, help, figure) in [
        ("blockhouse_disk_capacity_bytes", "gauge", "Size of the disk.", gauge(|disk| disk.capacity_bytes)),
        ("blockhouse_requests_in_flight", "gauge", "Requests that were taken and are not answered.", |disk| {
            disk.requests_in_flight
        }),
        ("blockhouse_limit_waits_total", "counter", "Times that a queue waited because of a limit.", |disk| {
            disk.limit_waits
        }),
        ("blockhouse_component_failures_total", "counter", "Calls in which a component broke down.", |disk| {
            disk.component_failures
        }),
        ("blockhouse_component_restarts_total", "counter", "Components that were started again.", |disk| {
            disk.component_restarts
        }),
        ("blockhouse_map_evicted_extents_total", "counter", "Extents dropped to stay within the limit.", |disk| {
            disk.map.evicted_extents
        }),
        ("blockhouse_map_bytes", "gauge", "Memory that the extent map uses.", |disk| disk.map.bytes),
        ("blockhouse_map_limit_bytes", "gauge", "Memory that the extent map may use.", |disk| disk.map.limit_bytes),
    ] {
        text.family(name, kind, help);
        for disk in disks {
            text.sample(name, &[("disk", &disk.disk)], figure(disk));
        }
    }
    for (name, help, label, [(one, first), (other, second)]) in [
        (
            "blockhouse_map_lookups_total",
            "Look-ups in the extent map.",
            "result",
            [("hit", gauge(|disk| disk.map.hits)), ("miss", |disk| disk.map.misses)],
        ),
        (
            "blockhouse_opens_total",
            "Files that images referred to.",
            "outcome",
            [("granted", |disk| disk.opens_granted), ("refused", |disk| disk.opens_refused)],
        ),
    ] {
        text.family(name, "counter", help);
        for disk in disks {
            text.sample(name, &[("disk", &disk.disk), (label, one)], first(disk));
            text.sample(name, &[("disk", &disk.disk), (label, other)], second(disk));
        }
    }
    text.family("blockhouse_component_calls_total", "counter", "Calls of components, by function.");
    for disk in disks {
        for (function, calls) in &disk.component_calls {
            text.sample("blockhouse_component_calls_total", &[("disk", &disk.disk), ("function", function)], calls);
        }
    }
    requests_text(&mut text, disks);
    text.0
}

fn requests_text(text: &mut Text, disks: &[Figures]) {
    let of = |figure: fn(&Requests) -> u64| figure;
    for (name, help, figure) in [
        ("blockhouse_requests_total", "Requests that were answered.", of(|requests| requests.count)),
        ("blockhouse_request_errors_total", "Requests that were answered with an error.", |requests| requests.errors),
        ("blockhouse_request_bytes_total", "Bytes moved, discarded or made zero.", |requests| requests.bytes),
    ] {
        text.family(name, "counter", help);
        for disk in disks {
            for (operation, requests) in &disk.requests {
                text.sample(name, &[("disk", &disk.disk), ("operation", operation)], figure(requests));
            }
        }
    }
    text.family("blockhouse_request_duration_seconds", "histogram", "From when a request was taken to its answer.");
    for disk in disks {
        for (operation, requests) in &disk.requests {
            let labels = [("disk", disk.disk.as_str()), ("operation", operation)];
            let mut bucket = |bound: &str, count: u64| {
                let labels: Vec<_> = labels.into_iter().chain([("le", bound)]).collect();
                text.sample("blockhouse_request_duration_seconds_bucket", &labels, count);
            };
            for Bucket { at_most, count } in &requests.latency {
                bucket(&seconds(*at_most), *count);
            }
            bucket("+Inf", requests.count);
            text.sample("blockhouse_request_duration_seconds_sum", &labels, seconds(requests.latency_sum));
            text.sample("blockhouse_request_duration_seconds_count", &labels, requests.count);
        }
    }
}

struct Text(String);

impl Text {
    /// Begins a metric: its values follow.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to memory does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.0.push_str(name);
        for (number, (label, content)) in labels.iter().enumerate() {
            self.0.push(if number == 0 { '{' } else { ',' });
            self.0.push_str(label);
            self.0.push_str("=\"");
            for character in content.chars() {
                match character {
                    '\\' => self.0.push_str("\\\\"),
                    '"' => self.0.push_str("\\\""),
                    '\n' => self.0.push_str("\\n"),
                    other => self.0.push(other),
                }
            }
            self.0.push('"');
        }
        let _ = writeln!(self.0, "}} {value}");
    }
}

/// A time in seconds, exactly: `0.000002048`.
fn seconds(time: Duration) -> String {
    let text = format!("{}.{:09}", time.as_secs(), time.subsec_nanos());
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use blockhouse_vhost::LATENCY_BUCKETS;

    use super::*;

    fn figures(disk: &str, image: &str) -> Figures {
        let mut read = RequestStats { requests: 6, errors: 1, bytes: 20480, ..RequestStats::default() };
        (read.latency[0], read.latency[2], read.latency[LATENCY_BUCKETS]) = (3, 2, 1);
        read.latency_sum = Duration::from_nanos(20_000_000_500);
        Figures {
            disk: disk.to_owned(),
            image: image.to_owned(),
            format: "raw".to_owned(),
            serial: "s".to_owned(),
            capacity_bytes: 1 << 20,
            requests: BTreeMap::from([("read", Requests::new(&read))]),
            requests_in_flight: 2,
            limit_waits: 0,
            component_calls: BTreeMap::from([("locate", 7)]),
            component_failures: 0,
            component_restarts: 0,
            map: MapStats { hits: 5, misses: 1, evictions: 0, extents: 2, max_extents: 10 }.into(),
            opens_granted: 1,
            opens_refused: 3,
        }
    }

    /// A line with a value: its name, its labels as they stand, and the value.
    fn parse(line: &str) -> (&str, &str, f64) {
        let (name, rest) = line.split_once('{').unwrap();
        let (labels, value) = rest.rsplit_once("} ").unwrap();
        (name, labels, value.parse().unwrap())
    }

    #[test]
    fn a_histogram_is_cumulative_and_ends_with_all() {
        let text = prometheus(&[figures("disk0", "/a")]);
        let buckets: Vec<(f64, f64)> = text
            .lines()
            .filter(|line| line.starts_with("blockhouse_request_duration_seconds_bucket"))
            .map(|line| {
                let (_, labels, value) = parse(line);
                let bound = labels.split_once("le=\"").unwrap().1.trim_end_matches('"');
                (if bound == "+Inf" { f64::INFINITY } else { bound.parse().unwrap() }, value)
            })
            .collect();
        assert_eq!(buckets.len(), LATENCY_BUCKETS + 1);
        assert!(buckets.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1), "{buckets:?}");
        assert_eq!(buckets[..3], [(0.000_002_048, 3.0), (0.000_004_096, 3.0), (0.000_008_192, 5.0)]);
        assert_eq!(buckets[LATENCY_BUCKETS], (f64::INFINITY, 6.0));
        let labels = "{disk=\"disk0\",operation=\"read\"}";
        assert!(text.contains(&format!("\nblockhouse_request_duration_seconds_sum{labels} 20.0000005\n")), "{text}");
        assert!(text.contains(&format!("\nblockhouse_request_duration_seconds_count{labels} 6\n")));
    }

    /// As the format demands: every value after the help and the type of its metric, all of a metric together,
    /// no name and labels twice, a line feed at the end.
    #[test]
    fn the_text_is_of_the_format() {
        let text = prometheus(&[figures("disk0", "/a"), figures("disk1", "/b")]);
        assert!(text.ends_with('\n'));
        let (mut families, mut samples, mut current) = (Vec::new(), Vec::new(), String::new());
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, words) = help.split_once(' ').unwrap();
                let kind = lines.next().unwrap().strip_prefix(&format!("# TYPE {name} ")).unwrap();
                assert!(["counter", "gauge", "histogram"].contains(&kind) && !words.is_empty(), "{name}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{name}");
                assert!(!families.contains(&name), "{name} is twice");
                families.push(name);
                current = name.to_owned();
                continue;
            }
            let (name, labels, _) = parse(line);
            let of = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
            assert_eq!(of, current, "{line}");
            assert!(!samples.contains(&(name, labels)), "{line} is twice");
            samples.push((name, labels));
        }
        assert!(samples.contains(&("blockhouse_component_calls_total", "disk=\"disk1\",function=\"locate\"")));
        assert!(text.contains("\nblockhouse_opens_total{disk=\"disk0\",outcome=\"refused\"} 3\n"));
        assert!(text.contains("\nblockhouse_map_bytes{disk=\"disk0\"} 48\n"));
    }

    #[test]
    fn names_cannot_leave_their_quotes() {
        let text = prometheus(&[figures("disk0", "/a\"} 1\nevil{x=\"\\")]);
        assert!(text.contains("image=\"/a\\\"} 1\\nevil{x=\\\"\\\\\",format="), "{text}");
        assert!(!text.lines().any(|line| line.starts_with("evil")));
    }
}
